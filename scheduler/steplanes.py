"""The lanes of a training step's task graph: drives, link, cores; and how those that work at once slow each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from math import ceil
from typing import Final

from ..memory.requests import request_nbytes
from .cost import CostModel
from .operations import Operation
from .schedule import TaskGraph

_DISK: Final = frozenset({"read", "read states", "write states", "write weights", "read gradients", "write gradients"})
_WRITES: Final = frozenset(lane for lane in _DISK if lane.startswith("write"))
_COMPUTING: Final = frozenset({"update", "update at once", "gradients"})


class StepLanes:
    """Issues tasks, and sums up what they take of each resource.

    Args:
        cost: Of the machine.
        separate: Whether a device computes that is apart from the CPU.
    """

    def __init__(self, cost: CostModel, *, separate: bool) -> None:
        self._cost = cost
        self._separate = separate
        self.graph = TaskGraph(
            {"cores": self._cores_left, "disk": self._disk_left, "link": self._link_left, "device": 1.0}
        )
        self.times = 1
        """How often what is issued happens, for the sums."""
        self.busy_s: dict[str, float] = defaultdict(float)
        self.nbytes: dict[str, float] = defaultdict(float)
        """Moved, by the names of `Traffic`."""

    def clear(self) -> None:
        """Begin the sums anew."""
        self.busy_s.clear()
        self.nbytes.clear()

    def compute(self, name: str, seconds: float, after: Iterable[int]) -> int:
        """What the model computes, on the processor that does."""
        self.busy_s["GPU" if self._separate else "CPU"] += self.times * seconds
        shared = "device" if self._separate else "cores"
        return self.graph.add(name, "compute", seconds, after=after, shared=shared, nbytes=seconds)

    def cores(self, name: str, lane: str, seconds: float, after: Iterable[int]) -> int:
        """Work of the CPU beside the model."""
        self.busy_s["CPU"] += self.times * seconds
        return self.graph.add(name, lane, seconds, after=after, shared="cores", nbytes=seconds)

    def read(self, lane: str, nbytes: float, after: Iterable[int]) -> int:
        """From the drives, in requests as they are cut."""
        return self._on_disk(lane, self._cost.read_s(nbytes, _request(nbytes)), after)

    def write(self, lane: str, nbytes: float, after: Iterable[int]) -> int:
        """To them."""
        return self._on_disk(lane, self._cost.write_s(nbytes, _request(nbytes)), after)

    def device(self, name: str, seconds: float, after: Iterable[int]) -> int:
        """Work of a device apart beside the model."""
        self.busy_s["GPU"] += self.times * seconds
        return self.graph.add(name, name, seconds, after=after, shared="device", nbytes=seconds)

    def copy(
        self, nbytes: float, after: Iterable[int], *, back: bool = False, what: str = "", piece_nbytes: float = 0.0
    ) -> int:
        """To the device, or `back` from it.

        Args:
            nbytes: How much.
            after: Tasks that it waits for.
            back: Which way.
            what: Its lane, where it need not come after all else that goes that way.
            piece_nbytes: Of each copy, at most; else as blocks are copied.
        """
        lane = f"{'d2h' if back else 'h2d'} {what}".rstrip()
        request = min(piece_nbytes, nbytes) if piece_nbytes else _request(nbytes)
        seconds = self._cost.copy_s(nbytes, request, back=back)
        self.busy_s["device-to-host link" if back else "host-to-device link"] += self.times * seconds
        return self.graph.add(lane, lane, seconds, after=after, shared="link", nbytes=seconds)

    def moved(self, name: str, nbytes: float) -> None:
        """Note bytes, by a name of `Traffic`."""
        self.nbytes[name] += self.times * nbytes

    def memory_s(self, nbytes: float, operations: float) -> float:
        """Seconds of the CPU for reading and writing so much of its memory, in so many operations."""
        if not nbytes:
            return 0.0
        return self._cost.operation_s(Operation(kind="memory", nbytes=nbytes, launches=max(1, ceil(operations))), "cpu")

    def _on_disk(self, lane: str, seconds: float, after: Iterable[int]) -> int:
        self.busy_s["disk"] += self.times * seconds
        return self.graph.add(lane, lane, seconds, after=after, shared="disk", nbytes=seconds)

    def _cores_left(self, lanes: Set[str]) -> float:
        """Of all cores' time, what is left beside the drives."""
        return self._cost.hardware.sharing.compute_while_reading if lanes & _DISK else 1.0

    def _disk_left(self, lanes: Set[str]) -> float:
        sharing, busy = self._cost.hardware.sharing, lanes & _DISK
        computing = bool(lanes & _COMPUTING) or ("compute" in lanes and not self._separate)
        both = bool(busy & _WRITES) and bool(busy - _WRITES)
        mixed = min((drive.mixed for drive in self._cost.hardware.drives), default=1.0) if both else 1.0
        return mixed * (sharing.read_while_computing if computing else 1.0)

    def _link_left(self, lanes: Set[str]) -> float:
        link = self._cost.hardware.link
        both = all(any(lane.startswith(way) for lane in lanes) for way in ("d2h", "h2d"))
        return 2 * link.duplex if both and link is not None else 1.0


def _request(nbytes: float) -> float:
    """Bytes of each request, or copy, that so much is moved in."""
    return max(min(request_nbytes(round(nbytes)), nbytes), 1.0)
