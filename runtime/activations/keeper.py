"""Decides for each tensor that autograd saves whether it stays, leaves or is made again, and learns what there is.

The first forward shows what segments save, by which operations that is made, and what computing takes. From then on
the plan decides (`scheduler/activations.py`); larger inputs ask for another one. What the plan has no room for when it
comes (other batches, several forwards before a backward) is made again, or goes to disk where nothing may be.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ...scheduler.activations import Part, Place
from .hold import HeldTensor, Hold
from .operations import NOT_MADE, Kind, OperationLog, Reads, Spent
from .records import OUTSIDE, ActivationPlan, Key, Machine, Measured, Places, SegmentRecord, plan_activations
from .segmentsteps import Recorded, Result, SavedStorage
from .store import ActivationStore
from .trail import Trail

SMALL: Final = 4096
"""Bytes of a storage that is not worth moving: less than a page."""


class SegmentCall:
    """One forward of one segment, as far as it is decided what becomes of what it saves."""

    def __init__(self, keeper: ActivationKeeper, key: Key, unit: int, label: str, inputs: Sequence[Tensor]) -> None:
        self.key, self.unit, self.label = key, unit, label
        self.log: OperationLog | None = None
        self.places: Places | None = None
        self.results: Mapping[Result, Sequence[Part]] = {}
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs if tensor.layout is torch.strided}
        self.inputs_nbytes = sum(tensor.nbytes for tensor in inputs)
        self.saved: list[SavedStorage] = []
        self._numbers: dict[tuple[int, int], tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.held: dict[tuple[int, int], HeldTensor] = {}
        """By operation and result: results that are held, as they were when they were made."""
        self._keeper = keeper
        self._next = 0
        self.skips = not _autocast()
        """Whether operations may be skipped when it runs again: casts of weights, taken from a cache, may differ."""

    def take(self, tensor: Tensor) -> HeldTensor | None:
        """What stands for a saved tensor; None where it is to be made again."""
        return self._keeper.take(self, tensor)

    def stays(self, tensor: Tensor) -> bool:
        """Whether it is there all the same, for as long as the segment is."""
        return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self.inputs

    def number(self, storage: torch.UntypedStorage, version: int) -> int:
        """Of a storage, among those that it saves: the next one for one that has none."""
        found = self._numbers.get((storage._cdata, version))
        if found is not None and found[0]() is storage:  # else another one has come to lie there
            return found[1]
        self._numbers[storage._cdata, version] = weakref.ref(storage), self._next
        self._next += 1
        return self._next - 1

    @property
    def decides(self) -> bool:
        """Whether it is known what becomes of its tensors: else all of them are made again."""
        return self.places is not None

    def recorded(self) -> Recorded:
        """What it did, as far as that was noted."""
        log = self.log
        if log is None:
            return Recorded()
        return Recorded(
            operations=log.operations,
            changed=frozenset(log.changed),
            looked_at=frozenset(log.looked_at),
            opaque=log.opaque or not self.skips,
        )

    def skippable(self) -> dict[int, tuple[HeldTensor, ...]]:
        """Operations that need not be carried out again, with their results."""
        if self.log is None:
            return {}
        found = {}
        for number in {number for number, _ in self.held}:
            outputs = self.log.operations[number].outputs
            held = [self.held.get((number, place)) for place in range(len(outputs))]
            if (
                outputs
                and number not in self.log.changed
                and all(each is not None and not each.witness.changed for each in held)
            ):
                found[number] = tuple(each for each in held if each is not None)
        return found


class ActivationKeeper:
    """What becomes of saved tensors of one model.

    Args:
        own: Gives the model's own tensors, parameters and buffers.
        store: Where those go that leave.
        machine: Where they can go, and what that takes.
        is_lent: Whether a tensor is a weight in a slot.
        told: Called with each plan that is made.
    """

    def __init__(
        self,
        own: Callable[[], Iterable[Tensor]],
        store: ActivationStore,
        machine: Machine,
        *,
        is_lent: Callable[[Tensor], bool],
        told: Callable[[ActivationPlan], None],
    ) -> None:
        self.store = store
        self.machine = machine
        self.plan: ActivationPlan | None = None
        self._own_tensors = own
        self._is_lent = is_lent
        self._told = told
        self._recording = True
        """Whether the next forward is to show what there is."""
        self._noting = False
        """Whether this one does."""
        self._own: set[int] = set()
        self._trail: Trail | None = None
        self._calls: Counter[int] = Counter()
        self._records: list[SegmentRecord] = []
        self._logs: list[OperationLog] = []
        self.call: SegmentCall | None = None

    # --- around a forward ---------------------------------------------------------------------------------------------

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A root call that autograd records."""
        before = self._trail, self._calls, self._records, self._logs, self._own, self._noting
        self._trail, self._calls, self._records, self._logs = Trail(self.store), Counter(), [], []
        self._noting = self._recording
        with torch._C.DisableTorchFunctionSubclass():  # of weights that are away: asking would bring them, all of them
            self._own = {each.untyped_storage()._cdata for each in self._own_tensors()}
        self.store.begin_forward()
        try:
            yield
        finally:
            self._trail.end()
            records, logs, noting = self._records, self._logs, self._noting
            self._trail, self._calls, self._records, self._logs, self._own, self._noting = before
        if noting and any(record.saved for record in records):
            self._make_plan(records, logs)

    def _make_plan(self, records: Sequence[SegmentRecord], logs: Sequence[OperationLog]) -> None:
        spent: dict[Kind, Spent] = {"product": Spent(), "attention": Spent(), "other": Spent()}
        for log in logs:
            for kind, each in log.spent.items():
                spent[kind].seconds += each.seconds
                spent[kind].flops += each.flops
        measured = Measured(spent=spent)
        self.plan = plan_activations(records, measured, self.machine)
        self._recording = False
        self._told(self.plan)

    @contextmanager
    def segment(self, number: int, label: str, inputs: Sequence[Tensor]) -> Iterator[SegmentCall]:
        """A forward of a part of the model."""
        assert self._trail is not None
        key = number, self._calls[number]
        self._calls[number] += 1
        call = SegmentCall(self, key, self._trail.begin_unit(), label, inputs)
        plan = self.plan
        if plan is not None:
            call.places = plan.places.get(key, {}) if key in plan.inputs_nbytes else None
            call.results = plan.results.get(key, {})
            if call.inputs_nbytes > plan.inputs_nbytes.get(key, -1):
                self._recording = True  # from the next forward on: this one has begun
        elif not self.machine.again:
            call.places = {}
        recording = self._noting
        some = call.decides and self.machine.again and (plan is None or key not in plan.whole)
        before, self.call = self.call, call
        try:
            with ExitStack() as around:
                if recording or (some and call.skips):
                    call.log = OperationLog(
                        self.is_weight,
                        self._passed if recording else None,
                        given=call.inputs,
                        made=partial(self._note_result, call) if call.results else None,
                    )
                    around.enter_context(call.log)
                    around.enter_context(Reads(call.log))
                yield call
        finally:
            self.call = before
        if recording:
            self._records.append(
                SegmentRecord(
                    key=key, inputs_nbytes=call.inputs_nbytes, saved=tuple(call.saved), recorded=call.recorded()
                )
            )
            if call.log is not None:
                self._logs.append(call.log)

    def _passed(self) -> None:
        self.store.device.wait(self.store.device.computed())

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it is one of the model's own tensors."""
        return tensor.untyped_storage()._cdata in self._own or self._is_lent(tensor)

    # --- a tensor -----------------------------------------------------------------------------------------------------

    def outside(self, tensor: Tensor) -> HeldTensor | None:
        """What stands for a tensor that is saved outside of segments; None where it stays as it is."""
        if self.machine.again or self._trail is None:
            return None
        number = self._calls[OUTSIDE]
        call = SegmentCall(self, (OUTSIDE, number), -1, "the model", ())
        if self.plan is not None:
            call.places = self.plan.places.get(call.key)
        held = self.take(call, tensor)
        if call.saved:
            self._calls[OUTSIDE] += 1
            if self._noting:
                nbytes = call.saved[0].nbytes
                self._records.append(SegmentRecord(key=call.key, inputs_nbytes=nbytes, saved=tuple(call.saved)))
        return held

    def take(self, call: SegmentCall, tensor: Tensor) -> HeldTensor | None:
        """What stands for a saved tensor."""
        trail = self._trail
        if trail is None or not self.movable(tensor):
            return None
        storage, version = tensor.untyped_storage(), tensor._version
        hold = trail.find(storage, version)
        if hold is None:
            hold = self._taken(call, trail, tensor, storage, version)
        else:
            if call.unit < 0:
                call.unit = trail.begin_unit()
            trail.use(hold, call.unit)
            if call.log is not None:
                self._note_output(call, tensor, hold)
        return None if hold is None else HeldTensor(hold, tensor, call.unit)

    def _taken(
        self, call: SegmentCall, trail: Trail, tensor: Tensor, storage: torch.UntypedStorage, version: int
    ) -> Hold | None:
        number = call.number(storage, version)
        if number == len(call.saved):
            source, output = (NOT_MADE, 0) if call.log is None else call.log.maker(tensor)
            holds = self._maker(call, tensor)[0] != NOT_MADE
            call.saved.append(
                SavedStorage(number=number, nbytes=storage.nbytes(), source=source, output=output, holds=holds)
            )
        parts = self._parts(call, number, storage.nbytes())
        hold = None if parts is None else self._hold(storage, parts, call)
        if hold is not None:
            if call.unit < 0:
                call.unit = trail.begin_unit()
            trail.add(hold, storage, version, call.unit)
            if call.log is not None:
                self._note_output(call, tensor, hold)
        return hold

    def movable(self, tensor: Tensor) -> bool:
        """Whether it is an activation in the memory that computes."""
        if tensor.layout is not torch.strided or (tensor.is_leaf and tensor.requires_grad):
            return False
        here = tensor.device.type == self.store.device.torch_device.type and tensor.untyped_storage().nbytes() > 0
        return here and not self.is_weight(tensor)

    def _parts(self, call: SegmentCall, number: int, nbytes: int) -> Sequence[Part] | None:
        """Where its bytes go, nowhere if it is too small for that; None to make it again."""
        if call.places is None and self.machine.again:
            return None
        if nbytes < SMALL:
            return ()
        parts = (call.places or {}).get(number)
        if parts is not None and sum(part.nbytes for part in parts) == nbytes:
            return parts
        if self.machine.again:
            first = parts[0].place if parts else None  # of another size than when it was planned
            return None if first is None else (Part(place=first, nbytes=nbytes),)
        place: Place = next((tier.place for tier in self.machine.tiers if tier.place != "keep"), "keep")
        return (Part(place=place, nbytes=nbytes),)

    def _hold(self, storage: torch.UntypedStorage, parts: Sequence[Part], call: SegmentCall) -> Hold | None:
        nbytes = storage.nbytes()
        if not parts:
            return self.store.keep(storage, label=call.label)
        hold = self.store.send(storage, parts, label=call.label)
        if hold is None and not self.machine.again:  # no room there: it has to be somewhere
            hold = self.store.send(storage, (Part(place="disk", nbytes=nbytes),), label=call.label)
            if hold is None:
                hold = self.store.keep(storage, label=call.label)
        return hold

    def _maker(self, call: SegmentCall, tensor: Tensor) -> tuple[int, int]:
        """The operation that could be skipped for a storage, and which of its results that is."""
        if call.log is None or tensor._version or not call.skips:
            return NOT_MADE, 0
        number, output = call.log.maker(tensor)
        if number == NOT_MADE or not call.log.operations[number].holds:
            return NOT_MADE, 0
        return number, output

    def _note_result(self, call: SegmentCall, number: int, outputs: Sequence[Tensor]) -> None:
        """An operation was carried out: its results are held where the plan says so, and backward has no use for them.

        It is called below autograd, within the operation.
        """
        for output, tensor in enumerate(outputs):
            storage = tensor.untyped_storage()
            parts = call.results.get((number, output))
            if parts is None or sum(part.nbytes for part in parts) != storage.nbytes() or self._trail is None:
                continue
            hold = self._hold(storage, () if storage.nbytes() < SMALL else parts, call)
            if hold is not None:
                self._trail.add(hold, storage, tensor._version, call.unit)
                call.held[number, output] = HeldTensor(hold, tensor, call.unit)

    def _note_output(self, call: SegmentCall, tensor: Tensor, hold: Hold) -> None:
        """Note that the result of an operation is held, as it was when it was made."""
        number, output = self._maker(call, tensor)
        if number == NOT_MADE or (number, output) in call.held:
            return
        assert call.log is not None
        held = HeldTensor(hold, tensor, call.unit)
        held.shape = call.log.operations[number].outputs[output]
        call.held[number, output] = held

    def tensor(self, held: HeldTensor) -> Tensor:
        """A held tensor, when backward asks for it.

        Raises:
            RuntimeError: it was changed in place since it was saved.
            PenstockError: it cannot be brought back.
        """
        held.check()
        hold = held.hold
        if hold.trail is not None:
            hold.trail.arrive(held.unit)
        return held.shape.on(self.store.storage_of(hold))


def _autocast() -> bool:
    """Whether operations are cast."""
    return any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
