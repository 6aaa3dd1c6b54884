"""What becomes of the activations of a run: kept, made again, or moved by a plan; and the memory that this takes."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Final

from torch import Tensor, nn

from ...memory.arena import PAGE
from ...scheduler.activations import Lane, Tier
from ...scheduler.plan import Plan
from ..activations.carrying import carrying_byte_s, cores
from ..activations.keeper import ActivationKeeper
from ..activations.records import ActivationPlan, Machine
from ..activations.store import LEAST_BUFFER, LEAVING, MOST_BUFFER, ActivationStore
from ..build import Machinery
from ..explain import gib, seconds
from ..links import LinkCache, disk_write_rate
from ..recompute import mark_segments, recompute
from .roomplan import TrainingRoom, moves_activations
from .run import Settings

logger = logging.getLogger(__name__)

DISK_RATE: Final = 2e9
LINK_RATE: Final = 2e10
"""Bytes per second, as the planner takes them where nothing was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationRoom:
    """Memory for activations that a plan places."""

    kept_nbytes: int
    """Of the tier that computes."""
    host_nbytes: int
    """Of host memory beside a device apart."""
    buffer_nbytes: int
    """Of each buffer on the way to disk; 0 for none."""

    @property
    def any(self) -> bool:
        """Whether there is any."""
        return bool(self.kept_nbytes or self.host_nbytes or self.buffer_nbytes)


def room_for_activations(machinery: Machinery, settings: Settings, granted_nbytes: int) -> ActivationRoom:
    """Cut what host memory there is for activations.

    Args:
        machinery: Of the model.
        settings: Of the run.
        granted_nbytes: Host memory, buffers included.
    """
    buffer = _buffer_nbytes(granted_nbytes)
    if not buffer:
        return ActivationRoom(kept_nbytes=0, host_nbytes=0, buffer_nbytes=0)
    rest = granted_nbytes - ActivationStore.buffers_nbytes(buffer)
    if not machinery.device.separate:
        return ActivationRoom(kept_nbytes=rest, host_nbytes=0, buffer_nbytes=buffer)
    kept = 0
    budget = None if machinery.plan is None else machinery.plan.device_budget_nbytes
    if settings.activations == "auto" and budget is not None and settings.device_is_named:
        kept = max(0, budget - machinery.layout.device_nbytes)
    return ActivationRoom(kept_nbytes=kept, host_nbytes=rest // PAGE * PAGE, buffer_nbytes=buffer)


def kept_nbytes(granted_nbytes: int) -> int:
    """What is left of so much host memory for activations, beside their buffers."""
    buffer = _buffer_nbytes(granted_nbytes)
    return granted_nbytes - ActivationStore.buffers_nbytes(buffer) if buffer else 0


def _buffer_nbytes(granted_nbytes: int) -> int:
    """Of each buffer on the way to disk; 0 where there is no room for any."""
    if granted_nbytes < ActivationStore.buffers_nbytes(LEAST_BUFFER):
        return 0
    parts = ActivationStore.buffers_nbytes(1)
    return max(LEAST_BUFFER, min(MOST_BUFFER, granted_nbytes // 8 // parts // PAGE * PAGE))


def arrange_activations(
    model: nn.Module,
    machinery: Machinery,
    settings: Settings,
    room: TrainingRoom,
    paths: Sequence[str],
    cache: LinkCache,
) -> None:
    """See to the activations of a model, once it is known what memory there is for them.

    Args:
        model: In training.
        machinery: That runs it.
        settings: Of the run.
        room: What gradients and states have left.
        paths: Scratch files for activations, one per drive.
        cache: Knows how fast drives are written, where they were calibrated.
    """
    if settings.activations == "recompute":
        recompute(machinery.session, model)
    if not moves_activations(machinery.layout, settings, frozen=not machinery.trains):
        return
    again = settings.activations == "auto"
    segments = (recompute if again else mark_segments)(machinery.session, model)
    cut = room_for_activations(machinery, settings, room.activations_nbytes)
    write_rate = disk_write_rate([os.path.dirname(path) for path in paths], cache, machinery.device)
    note = announced(settings, layers=bool(segments), room=cut.any)
    if not cut.any or (again and not segments):
        _tell(model, machinery, note)
        return
    store = ActivationStore(
        device=machinery.device,
        engine=machinery.engine,
        host_nbytes=cut.host_nbytes,
        buffer_nbytes=cut.buffer_nbytes,
        paths=paths,
        keep_nbytes=cut.kept_nbytes,
        leaving_nbytes=max(LEAVING, ActivationStore.buffers_nbytes(cut.buffer_nbytes)),
    )
    machinery.before_close(store.stop)
    machinery.on_close(store.close)
    machinery.count(store.arena)
    carrying_s = 0.0
    if cut.buffer_nbytes and not machinery.device.separate:
        carrying_s = carrying_byte_s(store, machinery.engine, paths[0]) / cores()
    machine = _machine(machinery, settings, room, cut, write_rate, again=again, carrying_s=carrying_s)
    assumed = _assumed(machinery, write_rate)
    saved = machinery.session.saved
    there = weakref.ref(model)  # which owns what owns the keeper

    def own() -> Iterator[Tensor]:
        module = there()
        if module is not None:
            yield from module.parameters()
            yield from module.buffers()

    def told(plan: ActivationPlan) -> None:
        module = there()
        if module is not None:
            _tell(module, machinery, described(plan) + assumed)

    saved.keeper = ActivationKeeper(own, store, machine, is_lent=saved.is_lent, told=told)
    _tell(model, machinery, note)


def announced(settings: Settings, *, layers: bool, room: bool) -> str:
    """What is said of activations that a plan decides about, before a first forward has shown what there is.

    Args:
        settings: Of the run.
        layers: Whether there are any that could run again.
        room: Whether there is any for activations.
    """
    again = settings.activations == "auto"
    if again and not layers:
        return "activations: they stay where they are made: there are no layers to run again"
    if not room:
        return "activations: layers make theirs again in backward; there is no room for any of them"
    first = "layers make theirs again" if again else "what layers save leaves memory"
    return f"activations: {first}, until a first forward has shown what there is"


def _machine(
    machinery: Machinery,
    settings: Settings,
    room: TrainingRoom,
    cut: ActivationRoom,
    write_rate: float | None,
    *,
    again: bool,
    carrying_s: float,
) -> Machine:
    """Where activations can go, with what the ways there carry anyway in a forward and its backward.

    `carrying_s`: that a byte on its way to disk and back takes of what computes."""
    plan = machinery.plan
    assert plan is not None
    passes = settings.accumulate
    read_rate = plan.links.disk_read or DISK_RATE
    write_rate = write_rate or read_rate
    link_rate = plan.links.h2d or LINK_RATE
    states, gradients = room.states_on_disk_nbytes / passes, room.gradients_on_disk_nbytes
    weights = plan.disk_nbytes_per_sweep
    read = 2 * weights + states + gradients
    written = states + gradients + (weights / passes if machinery.trains else 0)
    lanes = {"disk": Lane(busy_s=read / read_rate + written / write_rate, byte_s=1 / read_rate + 1 / write_rate)}
    link: tuple[str, ...] = ()
    if machinery.device.separate:
        link = "device to host", "host to device"
        updated = room.states_over_link_nbytes / passes
        back = (plan.weights_nbytes if machinery.trains else 0) + updated
        there = 2 * plan.link_nbytes_per_sweep + updated
        lanes |= {
            link[0]: Lane(busy_s=back / (plan.links.d2h or link_rate), byte_s=1 / (plan.links.d2h or link_rate)),
            link[1]: Lane(busy_s=there / link_rate, byte_s=1 / link_rate),
        }
    tiers = []
    if cut.kept_nbytes:
        tiers.append(Tier(place="keep", room_nbytes=cut.kept_nbytes))
    if cut.host_nbytes:
        tiers.append(Tier(place="host", room_nbytes=cut.host_nbytes, lanes=link))
    if cut.buffer_nbytes:
        tiers.append(Tier(place="disk", room_nbytes=inf, lanes=(*link, "disk"), processor_byte_s=carrying_s))
    return Machine(tiers=tiers, lanes=lanes, again=again)


def _assumed(machinery: Machinery, write_rate: float | None) -> str:
    """Which rates the plan takes without having been told."""
    assert machinery.plan is not None
    links, separate = machinery.plan.links, machinery.device.separate
    taken = {
        f"the drive to be read at {DISK_RATE / 1e9:g} GB/s": not links.disk_read,
        "the drive to be written as fast as it is read": not write_rate,
        f"the link to the device to carry {LINK_RATE / 1e9:g} GB/s": separate and not links.h2d,
        "the link from the device to be as fast as that to it": separate and not links.d2h,
    }
    words = [what for what, is_taken in taken.items() if is_taken]
    return f"; not measured, so taken: {', '.join(words)} (penstock calibrate measures it)" if words else ""


def described(plan: ActivationPlan) -> str:
    """Where activations go, and why, in a sentence."""
    placement = plan.placement
    kept, host, disk = (placement.nbytes_at(place) for place in ("keep", "host", "disk"))
    again = plan.again_nbytes
    places = [
        f"{gib(nbytes)} {where}"
        for nbytes, where in (
            (kept, "stay where they are made"),
            (host, "go to host memory"),
            (disk, "go to disk"),
            (again, "are made again"),
        )
        if nbytes
    ]
    why = f"a pass is foreseen to take {seconds(placement.seconds)}"
    if placement.plain_s > placement.seconds:
        why += f", and {seconds(placement.plain_s)} if layers made all of theirs again"
    elif again:
        why += ", which moving more of them would not shorten: what they would pass is what it waits for"
    return f"activations: of {gib(plan.saved_nbytes)} that layers save, {', '.join(places) or 'none'}; {why}"


def _tell(model: nn.Module, machinery: Machinery, note: str) -> None:
    """Put it into the model's plan, in the place of what was said of activations before."""
    handle = model.penstock
    plan: Plan = handle.plan  # type: ignore[union-attr, assignment]
    notes = (*(each for each in plan.notes if not each.startswith("activations: ")), note)
    handle.plan = machinery.plan = replace(plan, notes=notes)  # type: ignore[union-attr]
    logger.info("%s", note)
