"""How far steps are from the least time that computing and links allow, as the profiler defines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..links import LinkCache, disk_read_rate, disk_write_rate
from .metrics import StepRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRates:
    """Bytes per second of each link by itself; None where it was not measured: then it bounds nothing."""

    disk_read: float | None = None
    disk_write: float | None = None
    h2d: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """Some steps against their bound."""

    seconds: float
    """That they took."""
    bound_s: float
    """That they would have taken at least: the time in which they computed, or the bytes of a link at its rate."""
    binds: str
    """compute, or the link."""

    @property
    def value(self) -> float | None:
        """Of the two; 1 is the limit. None where nothing takes time."""
        return self.seconds / self.bound_s if self.bound_s else None


def distance_of(records: Sequence[StepRecord], rates: LinkRates) -> Distance:
    """The distance of these steps together."""
    moved = {
        "disk reads": (sum(each.disk_read_nbytes for each in records), rates.disk_read),
        "disk writes": (sum(each.disk_written_nbytes for each in records), rates.disk_write),
        "host-to-device link": (sum(each.copied_nbytes for each in records), rates.h2d),
    }
    terms = {"compute": sum(each.computed_s for each in records)}
    terms |= {name: nbytes / rate for name, (nbytes, rate) in moved.items() if rate}
    binds = max(terms, key=lambda name: terms[name])
    return Distance(seconds=sum(each.seconds for each in records), bound_s=terms[binds], binds=binds)


def rates_of(model: Any, files: Sequence[str], cache: LinkCache) -> LinkRates:
    """Rates of the links of a model in training, from a calibration, or measured in a moment (reads; writes wear).

    Args:
        model: In training.
        files: Of its run, which steps read and write.
        cache: Where rates are kept.
    """
    plan, machinery = model.penstock.plan, model.penstock.machinery
    if machinery is None:
        return LinkRates()
    return LinkRates(
        disk_read=disk_read_rate(files, cache, machinery.device),
        disk_write=disk_write_rate(files, cache, machinery.device),
        h2d=plan.links.h2d,
    )
