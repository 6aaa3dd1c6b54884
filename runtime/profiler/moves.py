"""What the executor's timeline says of blocks, as records of a profile: of runs measured and simulated alike."""

from __future__ import annotations

from collections.abc import Mapping

from ...scheduler.timeline import Record as Happened
from .recorder import Recorder
from .schema import NONE, Cause, Link, Transfer, Use, Wait


class Moves:
    """Makes them.

    Args:
        rows: Of blocks in the profile, by the executor's number.
    """

    def __init__(self, recorder: Recorder, rows: Mapping[int, int]) -> None:
        self._recorder = recorder
        self._rows = rows
        self._reads: dict[int, int] = {}
        """By block: the transfer that read it last, as parent of its copy."""

    def of(self, record: Happened) -> Transfer | Wait | Use | None:
        """The record of a read, a copy, a wait or a use; None of what else happens."""
        block = self._rows.get(record.block, NONE)
        if record.kind == "use":
            return Use(block=block, at=record.start_ns, ready=record.end_ns, issued=record.issued_ns)
        if record.kind == "wait":
            return Wait(block=block, needed=record.start_ns, ready=record.end_ns)
        if record.kind not in ("read", "copy"):
            return None
        number, reading = self._recorder.transfer_id(), record.kind == "read"
        parent = NONE if reading else self._reads.get(record.block, NONE)
        if reading:
            self._reads[record.block] = number
        return Transfer(
            id=number,
            parent=parent,
            block=block,
            link=Link.DISK_READ if reading else Link.H2D,
            nbytes=record.nbytes,
            cause=Cause.DEMAND if record.urgent else Cause.PREFETCH,
            issued=record.issued_ns,
            start=record.start_ns,
            end=record.end_ns,
        )
