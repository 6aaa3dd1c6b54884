"""The least time that a step of decoding can take, however it is scheduled."""

from __future__ import annotations

from dataclasses import dataclass

from .split import Binding, KvRates


@dataclass(frozen=True, kw_only=True, slots=True)
class AttendedBytes:
    """Keys and values that one step attends to, in all layers and sequences, and what else it reads. Bytes."""

    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0
    device_weights: float = 0.0
    """Read from device memory beside them."""
    scoring: float = 0.0
    """What a policy reads in host memory to choose; it is not part of the others."""
    disk_passes: float = 2.0
    """As in `ColdBlocks`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBound:
    """What binds, and the seconds that it takes."""

    seconds: float
    binds: Binding
    cpu_share: float
    """Of what is cold, attended to by the CPU."""


def decode_bound(attended: AttendedBytes, rates: KvRates) -> DecodeBound:
    """Everything overlaps, blocks have no size, starting costs nothing; each byte still passes where it has to.

    The CPU's part is the one with the least time of them all: a shorter queue at the link is no gain while the disk
    binds, so among equal ones the smallest part is told.
    """
    cold = attended.host + attended.disk
    fixed: dict[Binding, float] = {
        "disk": _over(attended.disk, rates.disk),
        "host memory": _over(cold + attended.disk * attended.disk_passes + attended.scoring, rates.host_memory),
    }
    share = 1.0 if rates.link is None else _share(attended, rates, max(fixed.values()))
    taken: dict[Binding, float] = {
        **fixed,
        "cpu": (share * cold + attended.scoring) / rates.cpu,
        "link": _over((1 - share) * cold, rates.link or 0.0),
        "device": _over(attended.device + attended.device_weights + (1 - share) * cold, rates.device),
    }
    binds = max(taken, key=lambda what: taken[what])
    return DecodeBound(seconds=taken[binds], binds=binds, cpu_share=share)


def _share(attended: AttendedBytes, rates: KvRates, floor_s: float) -> float:
    assert rates.link is not None
    cold = attended.host + attended.disk
    if not cold:
        return 0.0
    here = attended.device + attended.device_weights
    with_link = (cold / rates.link - attended.scoring / rates.cpu) / (cold / rates.cpu + cold / rates.link)
    ends = [with_link]
    if rates.device:
        ends.append(
            ((here + cold) / rates.device - attended.scoring / rates.cpu) / (cold / rates.cpu + cold / rates.device)
        )
    best = min(max(*ends, 0.0), 1.0) if len(ends) > 1 else min(max(with_link, 0.0), 1.0)
    enough = 1 - floor_s * rates.link / cold
    if rates.device:
        enough = max(enough, 1 - (floor_s * rates.device - here) / cold)
    return min(best, max(enough, 0.0))


def _over(nbytes: float, rate: float) -> float:
    return nbytes / rate if rate else 0.0
