"""What of a layer is held and what is made again: the results to hold, by the seconds that a byte of them saves.

A layer that runs again need not do all of it. A step of it (one operation) is carried out if backward needs its result
and that is not held, or if a step that is carried out uses it. So holding the sum after attention saves the product in
front of it, though backward has no use for that sum itself; and of two results of which one is soon made of the other,
one is enough. For a price of a byte the best choice is a cheapest cut (the selection of projects and what they share,
Rhys, 1970; with memory as the price, Jain et al., 2020). Growing choices are found by the greatest saving per byte
first (Dinkelbach, 1967): each adds to the one before, and saves less per byte than that did.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from .mincut import FlowNetwork

LEAST: Final = 1e-6
"""Of what a layer takes: what saves less is left to the last choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One operation of a layer."""

    inputs: tuple[int, ...] = ()
    """Steps before it whose results it computes with."""
    seconds: float
    """Of carrying it out."""
    nbytes: float
    """Of its results; infinite where they cannot be held."""
    needed: bool = False
    """Whether backward uses one of them."""
    forced: bool = False
    """Whether it is carried out whenever the layer runs again: it draws random numbers, or changes something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Results to hold beside those of the choices before."""

    steps: tuple[int, ...]
    """Whose they are."""
    nbytes: int
    seconds: float
    """That are saved."""


def choices(steps: Sequence[Step]) -> list[Choice]:
    """What to hold, in order: with all of it, the layer need not run again. The first saves most per byte.

    Takes some milliseconds for a hundred steps.
    """
    held: set[int] = set()
    found: list[Choice] = []
    now = carried_s(steps, held)
    least = LEAST * now
    while (better := _best(steps, held, now)) is not None:
        left = carried_s(steps, better)
        if now - left <= least:
            break
        found.append(_choice(steps, better - held, now - left))
        held, now = better, left
    rest = {number for number, step in enumerate(steps) if step.needed} - held
    if rest or now:
        found.append(_choice(steps, rest, now))
    return _falling(found)


def carried_out(steps: Sequence[Step], held: Collection[int]) -> frozenset[int]:
    """The steps that are carried out when the results of some are held."""
    wanted = [n for n, step in enumerate(steps) if step.forced or (step.needed and n not in held)]
    found: set[int] = set()
    while wanted:
        number = wanted.pop()
        if number not in found:
            found.add(number)
            wanted += [each for each in steps[number].inputs if each not in held]
    return frozenset(found)


def carried_s(steps: Sequence[Step], held: Collection[int]) -> float:
    """Seconds of those."""
    return sum(steps[number].seconds for number in carried_out(steps, held))


def _best(steps: Sequence[Step], held: set[int], now: float) -> set[int] | None:
    """What to hold, of all that includes `held`, so that a byte more saves most; None where nothing saves anything."""
    most = sum(step.nbytes for n, step in enumerate(steps) if step.nbytes < inf and n not in held)
    price = LEAST * now / most if most else 0.0
    best = None
    while now and most:
        found = held | _cheapest(steps, held, price)
        nbytes = sum(steps[number].nbytes for number in found - held)
        saved = now - carried_s(steps, found)
        if not nbytes or saved <= price * nbytes * (1 + 1e-9):
            break
        best, price = found, saved / nbytes
    return best


def _cheapest(steps: Sequence[Step], held: Collection[int], price: float) -> set[int]:
    """What is held if a byte costs so much: a cut that has what is there, and what is carried out, on its one side."""
    there, carried = range(0, 2 * len(steps), 2), range(1, 2 * len(steps), 2)
    source, sink = 2 * len(steps), 2 * len(steps) + 1
    network = FlowNetwork(2 * len(steps) + 2)
    for number, step in enumerate(steps):
        if step.needed:
            network.connect(source, there[number], inf)
        if step.forced:
            network.connect(source, carried[number], inf)
        holding = 0.0 if number in held else step.nbytes * price if step.nbytes < inf else inf
        network.connect(there[number], carried[number], holding)
        network.connect(carried[number], sink, step.seconds)
        for each in step.inputs:
            network.connect(carried[number], there[each], inf)
    side = network.source_side(source, sink)
    return {n for n in range(len(steps)) if there[n] in side and carried[n] not in side}


def _choice(steps: Sequence[Step], added: Collection[int], seconds: float) -> Choice:
    nbytes = sum(steps[number].nbytes for number in added)
    assert nbytes < inf, "a result that cannot be held is to be"
    return Choice(steps=tuple(sorted(added)), nbytes=int(nbytes), seconds=seconds)


def _falling(found: Sequence[Choice]) -> list[Choice]:
    """The same, each of which saves no more per byte than the one before: two where it is not so are one."""
    merged: list[Choice] = []
    for each in found:
        while merged and each.seconds * merged[-1].nbytes > merged[-1].seconds * each.nbytes:
            last = merged.pop()
            each = Choice(
                steps=tuple(sorted({*last.steps, *each.steps})),
                nbytes=last.nbytes + each.nbytes,
                seconds=last.seconds + each.seconds,
            )
        merged.append(each)
    return merged
