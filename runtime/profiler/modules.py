"""What each module did: its time, its waiting, the bytes that moved for it, the bytes it held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .intervals import Ints
from .links import moved
from .profile import Columns, Profile
from .schema import NONE, Category, Compute, Link, Memory, Phase, Tier, Transfer, Wait
from .summary import ModuleUse
from .window import Window

_DEEPEST: Final = 100
"""Nesting is followed so far: models stay below 20, and a damaged file may say anything."""


def module_uses(profile: Profile, window: Window, memory_window: Window) -> tuple[ModuleUse, ...]:
    """Every module of which anything is known inside the window: most waiting first, then most time.

    `memory_window` is the stretch of time that peaks of memory are taken over.
    """
    numbers = np.array(sorted(profile.modules), dtype=np.int64)
    if not len(numbers):
        return ()
    modules = _Modules(numbers=numbers)
    times = _times(profile, window, modules)
    waited = _waited(profile, window, modules)
    nbytes = _moved(profile, window, modules)
    held = _held(profile, memory_window, modules)
    found = []
    for row, number in enumerate(numbers.tolist()):
        moved_nbytes = {link.name: int(nbytes[link][row]) for link in Link if nbytes[link][row]}
        peak_nbytes = {category.name: int(held[category][row]) for category in Category if held[category][row] > 0}
        if not (times.spans[row] or waited[row] or moved_nbytes or peak_nbytes):
            continue
        by_phase = times.own_ns[:, row].tolist()
        found.append(
            ModuleUse(
                path=profile.module_path(number),
                kind=profile.modules[number].kind,
                calls=int(times.calls[row]),
                total_ns=int(times.total_ns[row]),
                self_ns=sum(by_phase),
                forward_ns=by_phase[Phase.FORWARD],
                backward_ns=by_phase[Phase.BACKWARD],
                optimizer_ns=by_phase[Phase.OPTIMIZER],
                waited_ns=int(waited[row]),
                moved_nbytes=moved_nbytes,
                peak_nbytes=peak_nbytes,
            )
        )
    return tuple(sorted(found, key=lambda use: (-use.waited_ns, -use.total_ns)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Modules:
    """The modules of the table, a row for each; one row more takes what belongs to none of them."""

    numbers: Ints

    def rows(self, modules: Ints) -> Ints:
        """The row of each module; the last one for none and unknown ones."""
        row: Ints = np.minimum(np.searchsorted(self.numbers, modules), len(self.numbers) - 1)
        return np.where(self.numbers[row] == modules, row, len(self.numbers))

    def sampled(self, profile: Profile) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """By row: whether it is recorded by turns, itself or as a part of something; and whether it holds such."""
        sampled, holders = np.zeros((2, len(self.numbers) + 1), dtype=bool)
        row = {number: index for index, number in enumerate(self.numbers.tolist())}
        for number, index in row.items():
            chain = [number]
            while len(chain) < _DEEPEST and profile.modules[chain[-1]].parent in row:
                chain.append(profile.modules[chain[-1]].parent)
            taken = [place for place, each in enumerate(chain) if profile.modules[each].sampled]
            if taken:
                sampled[index] = True
                holders[[row[each] for each in chain[taken[-1] + 1 :]]] = True
        return sampled, holders & ~sampled

    def sums(self, modules: Ints, values: Ints) -> Ints:
        """Sums of values by module."""
        result = np.zeros(len(self.numbers) + 1, dtype=np.int64)
        np.add.at(result, self.rows(modules), values)
        return result[:-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Times:
    """Nanoseconds and counts, by module."""

    spans: Ints
    """Of any length, inside the window at least in part."""
    calls: Ints
    """Spans that begin inside the window, of the phase that has most: a backward pass is no second call."""
    total_ns: Ints
    own_ns: Ints
    """By phase and module."""


def _times(profile: Profile, window: Window, modules: _Modules) -> _Times:
    spans = profile[Compute]
    spans = spans.where((spans.end >= spans.start) & (window.share(spans.start, spans.end) > 0))
    spans = spans.where(np.lexsort((spans.end, spans.depth, spans.start, spans.lane)))
    inside = window.inside(spans.start, spans.end)
    parent = parents(spans)
    nested = np.zeros(len(spans), dtype=np.int64)
    np.add.at(nested, parent[parent >= 0], inside[parent >= 0])
    # Spans of a damaged file may overlap within one lane: nobody then has less than no time.
    own = np.maximum(inside - nested, 0)
    begun = window.holds(spans.start).astype(np.int64)
    sampled, holders = modules.sampled(profile)
    if sampled.any():
        factor = _factors(spans, parent, inside, sampled[modules.rows(spans.module)])
        row = modules.rows(spans.module)
        # What holds layers that were not recorded this time has their time in its own: only calls that have them tell.
        own = np.where(sampled[row] | holders[row], np.rint(own * factor).astype(np.int64), own)
        inside, begun = (np.where(sampled[row], np.rint(x * factor).astype(np.int64), x) for x in (inside, begun))
    own_ns, calls = [], []
    for phase in Phase:
        mask = spans.phase == phase
        own_ns.append(modules.sums(spans.module[mask], own[mask]))
        calls.append(modules.sums(spans.module[mask], begun[mask]))
    return _Times(
        spans=modules.sums(spans.module, np.ones(len(spans), dtype=np.int64)),
        calls=np.max(calls, axis=0),
        total_ns=modules.sums(spans.module, inside),
        own_ns=np.array(own_ns),
    )


def _factors(spans: Columns, parent: Ints, inside: Ints, sampled: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """By span, what the times of layers are to be multiplied with: those that ran in some calls of a root only.

    It is the time of all calls of a root over that of the calls whose layers were recorded; 0 in the other calls. Calls
    are told apart by their length, in powers of two: a prompt's layers say nothing of a token's. Of calls of a length
    of which none was recorded, those twice or half as long tell: to be recorded takes time as well.
    """
    outermost = np.arange(len(spans))
    while (parent[outermost] >= 0).any():
        outermost = np.where(parent[outermost] >= 0, parent[outermost], outermost)
    whole = np.zeros(len(spans), dtype=bool)
    whole[outermost[sampled]] = True
    root = parent < 0
    length = np.log2(np.maximum(spans.end - spans.start, 1)).round().astype(np.int64)
    keys, kind = np.unique(np.stack([spans.module, spans.phase, length]), axis=1, return_inverse=True)
    told = np.bincount(kind.reshape(-1)[root & whole], minlength=keys.shape[1]) > 0
    kind = _joined(keys, told)[kind.reshape(-1)]
    total, recorded = np.zeros((2, keys.shape[1]))
    np.add.at(total, kind[root], inside[root])
    np.add.at(recorded, kind[root & whole], inside[root & whole])
    factor = np.divide(total, recorded, out=np.ones_like(total), where=recorded > 0)[kind]
    factor[root & ~whole & (recorded[kind] > 0)] = 0
    result: npt.NDArray[np.float64] = factor[outermost]
    return result


def _joined(keys: Ints, told: npt.NDArray[np.bool_]) -> Ints:
    """For each kind of calls the one that tells of it: itself, or one of the next length where nothing tells of it.

    `keys` are module, phase and length by kind: shape [3, kinds]; `told` is whether any call of a kind was recorded.
    """
    number = {(module, phase, length): kind for kind, (module, phase, length) in enumerate(keys.T.tolist())}
    joined = np.arange(keys.shape[1])
    for (module, phase, length), kind in number.items():
        beside = [number.get((module, phase, length + step), kind) for step in (1, -1)]
        joined[kind] = next((other for other in (kind, *beside) if told[other]), kind)
    return joined


def parents(spans: Columns) -> Ints:
    """The row of the span that each one runs directly inside; -1 for outermost ones.

    The spans are ordered by lane, start, depth and end. Spans of one lane and depth do not overlap, so that the last
    one that began is the only one that can be around. Where the span right above was lost, the next one above counts.
    """
    rows = np.arange(len(spans))
    parent = np.full(len(spans), NONE, dtype=np.int64)
    depth = np.clip(spans.depth, 0, _DEEPEST)
    for above in reversed(np.unique(depth)[:-1].tolist()):
        latest = np.maximum.accumulate(np.where(depth == above, rows, NONE))
        open_rows = rows[(parent == NONE) & (depth > above) & (latest != NONE)]
        around = latest[open_rows]
        inside = (spans.lane[around] == spans.lane[open_rows]) & (spans.end[around] >= spans.end[open_rows])
        parent[open_rows[inside]] = around[inside]
    return parent


def _waited(profile: Profile, window: Window, modules: _Modules) -> Ints:
    waits = profile[Wait]
    module = np.where(waits.module == NONE, _module_of(profile, waits.block), waits.module)
    return modules.sums(module, window.inside(waits.needed, waits.ready))


def _moved(profile: Profile, window: Window, modules: _Modules) -> dict[Link, Ints]:
    transfers = profile[Transfer]
    module = _module_of(profile, transfers.block)
    nbytes = np.rint(moved(transfers, window)).astype(np.int64)
    masks = {link: transfers.link == link for link in Link}
    return {link: modules.sums(module[mask], nbytes[mask]) for link, mask in masks.items()}


def _module_of(profile: Profile, blocks: Ints) -> Ints:
    """The module that leases each block; -1 for none, several, or a block that no table knows."""
    numbers, row = np.unique(blocks, return_inverse=True)
    owners = [profile.blocks[n].module if n in profile.blocks else NONE for n in numbers.tolist()]
    return np.array(owners, dtype=np.int64)[row]


def _held(profile: Profile, window: Window, modules: _Modules) -> npt.NDArray[np.int64]:
    """The most that was live at once in memory, by category and module: shape [categories, modules]."""
    memory = profile[Memory]
    memory = memory.where((memory.tier != Tier.DISK) & (memory.category >= 0) & (memory.category < len(Category)))
    memory = memory.where((memory.at < window.start) | window.holds(memory.at))
    width = len(modules.numbers) + 1
    key = memory.category * width + modules.rows(memory.module)
    # By key and time; what came before the window only adds up to what is live when it begins.
    at = np.maximum(memory.at, window.start)
    order = np.lexsort((at, key))
    at, key = at[order], key[order]
    peak = np.zeros(len(Category) * width, dtype=np.int64)
    if len(key):
        first = np.append(True, key[1:] != key[:-1])
        last = np.append((key[1:] != key[:-1]) | (at[1:] != at[:-1]), True)
        total = np.cumsum(memory.nbytes[order])
        group = np.cumsum(first) - 1
        total -= np.concatenate(([0], total[np.flatnonzero(first)[1:] - 1]))[group]
        np.maximum.at(peak, key[last], total[last])
    return peak.reshape(len(Category), width)[:, :-1]
