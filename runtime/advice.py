"""The one change of a machine that would help most, found by foreseeing each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import msgspec

from ..memory.errors import DoesNotFitError
from ..scheduler.hardware import Hardware

GIB: Final = 2**30
WORTH: Final = 1.1
"""A change that helps less is not worth a word."""
ENOUGH: Final = 0.9
"""Of what the best change gains: the smallest one that gains so much is the one to make."""


class Foreseen(Protocol):
    """What was foreseen of some work on a machine."""

    @property
    def hardware(self) -> Hardware:
        """The machine."""

    @property
    def seconds(self) -> float:
        """What is to be made shorter."""

    @property
    def moves(self) -> bool:
        """Whether anything is moved: otherwise no memory, drive or link would change anything."""


F = TypeVar("F", bound=Foreseen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Something that could be had."""

    words: str
    """For example "32 GiB more RAM"."""
    hardware: Hardware


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A change, and what it gains."""

    change: Change
    speedup: float
    """Of the whole answer, or of a step."""

    def __str__(self) -> str:
        return f"{self.change.words}: {self.speedup:.1f}×"


def changes(hardware: Hardware) -> Iterator[Change]:
    """What can be bought for a machine, the small before the large."""
    for more in (16, 32, 64, 128):
        yield _more_memory(hardware, more)
    if hardware.gpu is not None:
        for more in (8, 24, 48):
            gpu = msgspec.structs.replace(hardware.gpu, memory_nbytes=hardware.gpu.memory_nbytes + more * GIB)
            words = f"a GPU like it with {gpu.memory_nbytes / GIB:.0f} GiB"
            yield Change(words=words, hardware=msgspec.structs.replace(hardware, gpu=gpu))
    if hardware.link is not None:
        link = msgspec.structs.replace(hardware.link, h2d=hardware.link.h2d.scaled(2), d2h=hardware.link.d2h.scaled(2))
        words = f"a link of {link.h2d.best / 1e9:.0f} GB/s"
        yield Change(words=words, hardware=msgspec.structs.replace(hardware, link=link))
    if hardware.drives:
        drives = tuple(
            msgspec.structs.replace(drive, read=drive.read.scaled(2), write=drive.write.scaled(2))
            for drive in hardware.drives
        )
        words = f"drives that read {2 * hardware.disk_read / 1e9:.1f} GB/s"
        yield Change(words=words, hardware=msgspec.structs.replace(hardware, drives=drives))


def _more_memory(hardware: Hardware, more: int) -> Change:
    nbytes = hardware.host_nbytes + more * GIB
    cpu = msgspec.structs.replace(hardware.cpu, memory_nbytes=max(hardware.cpu.memory_nbytes, nbytes))
    changed = msgspec.structs.replace(hardware, host_nbytes=nbytes, cpu=cpu)
    return Change(words=f"{more} GiB more RAM", hardware=changed)


def advise(forecast: F, foresee: Callable[[Hardware], F]) -> Advice | None:
    """What would help most; None where nothing helps much. `foresee` gives the forecast of the same work elsewhere."""
    if not forecast.moves:
        return None
    found = []
    for change in changes(forecast.hardware):
        try:
            other = foresee(change.hardware)
        except DoesNotFitError:
            continue
        found.append(Advice(change=change, speedup=forecast.seconds / other.seconds))
    best = max((each.speedup for each in found), default=0.0)
    if best < WORTH:
        return None
    return next(each for each in found if each.speedup - 1 >= ENOUGH * (best - 1))


def smallest_that_fits(hardware: Hardware, foresee: Callable[[Hardware], F]) -> tuple[Change, F] | None:
    """The first of the changes with which the work fits at all."""
    for change in changes(hardware):
        try:
            return change, foresee(change.hardware)
        except DoesNotFitError:
            continue
    return None
