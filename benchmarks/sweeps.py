"""What a worker sees of its model sweep by sweep: when each forward began, what was read, who waited.

A sweep is one forward of the model that decodes. Its time runs from one forward's start to the next one's, so whatever
`generate` does between them (sampling, a draft's turn) is in it.
"""

import functools
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

from .contenders.protocol import read_nbytes

LEARNING = 2
"""Calls before the figures start. The first decoder call of an encoder–decoder projects the cross-attention keys, later
ones do not: the order of the second call is the one that repeats, and it is new when it is first seen."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Counters at one instant."""

    at_ns: int
    """On the clock of the timeline."""
    read_nbytes: int
    """By the whole process, from block devices."""
    acquires: int
    on_time: int
    copied_nbytes: int


class SweepClock:
    """Wraps the forward of a model, resident or streamed, and stamps every call."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.starts: list[Snapshot] = []
        self.stop: Snapshot | None = None
        inner = model.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.starts.append(self.snapshot())
            return inner(*args, **kwargs)

        model.forward = forward

    def snapshot(self) -> Snapshot:
        """The counters now."""
        handle = getattr(self._model, "penstock", None)
        totals = None if handle is None else handle.statistics()
        return Snapshot(
            at_ns=time.monotonic_ns(),
            read_nbytes=read_nbytes(),
            acquires=totals.acquires if totals else 0,
            on_time=totals.prefetched_on_time if totals else 0,
            copied_nbytes=totals.h2d_nbytes if totals else 0,
        )

    def end(self) -> None:
        """Generation is over."""
        self.stop = self.snapshot()

    def report(self) -> dict[str, Any]:
        """The figures of the sweeps after the first `LEARNING` ones, as JSON can hold them."""
        assert self.stop is not None, "end() comes first"
        stamps = [*self.starts[LEARNING:], self.stop]
        first, last, count = stamps[0], stamps[-1], len(stamps) - 1
        sweeps_s = [(after.at_ns - before.at_ns) / 1e9 for before, after in itertools.pairwise(stamps)]
        found = {
            "sweeps_s": sweeps_s,
            "s_per_sweep": statistics.mean(sweeps_s),
            "s_per_sweep_median": statistics.median(sweeps_s),
            "read_nbytes_per_sweep": (last.read_nbytes - first.read_nbytes) / count,
            "acquires": last.acquires - first.acquires,
            "on_time": last.on_time - first.on_time,
            "copied_nbytes": last.copied_nbytes - first.copied_nbytes,
            "elapsed_s": (last.at_ns - first.at_ns) / 1e9,
        }
        handle = getattr(self._model, "penstock", None)
        if handle is not None:
            found |= _from_timeline(handle.timeline.records(), first.at_ns, last.at_ns)
            found["plan"] = str(_plan_text(self._model))
            found["plan_disk_nbytes"] = handle.plan.disk_nbytes_per_sweep
            found["plan_link_nbytes"] = handle.plan.link_nbytes_per_sweep
            found["measured_link_nbytes_per_s"] = handle.plan.links.h2d
        return found


def _plan_text(model: Any) -> str:
    import penstock  # only workers that stream get here

    return str(penstock.explain(model))


def _from_timeline(records: Any, start_ns: int, stop_ns: int) -> dict[str, Any]:
    inside = [record for record in records if record.end_ns > start_ns and record.start_ns < stop_ns]
    copies = [(max(r.start_ns, start_ns), min(r.end_ns, stop_ns)) for r in inside if r.kind == "copy"]
    return {
        "streamed": sum(record.kind == "read" for record in inside),
        "waits": sum(record.kind == "wait" for record in inside),
        "mismatches": sum(record.kind in ("demand", "mismatch") for record in inside),
        "copying_s": union_ns(copies) / 1e9,
    }


def union_ns(intervals: list[tuple[int, int]]) -> int:
    """Length of the union of half-open intervals."""
    total, reached = 0, 0
    for start, stop in sorted(intervals):
        start = max(start, reached)
        if stop > start:
            total += stop - start
            reached = stop
    return total


def used_nbytes(model: Any, run: Any) -> int:
    """Bytes of the parameters that the last forward during `run()` uses whole, of a resident model.

    Lookups in an embedding use a few rows of it: it counts only where another module shares it.
    """
    import torch

    used: dict[int, int] = {}

    def note(module: Any, *_: Any) -> None:
        if not isinstance(module, torch.nn.Embedding):
            used.update({id(p): p.nbytes for p in module._parameters.values() if p is not None})

    forget = model.register_forward_pre_hook(lambda *_: used.clear())
    hooks = [forget, *(module.register_forward_pre_hook(note) for module in model.modules() if module is not model)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(used.values())
