"""Carrying a layout out: arenas, tiers, executor and bindings for one module."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Set
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from ..memory.arena import AnyArena, HostArena, debug_enabled, round_up
from ..memory.disk import DiskEngine
from ..memory.image import DeviceImage, Image
from ..memory.layout import FileSpan
from ..memory.ledger import Reservation
from ..memory.requests import CHUNK, THREADS
from ..memory.trim import return_free_memory
from ..scheduler.core import Core
from ..scheduler.cost import CostModel
from ..scheduler.executor import Executor
from ..scheduler.order import AccessOrders
from ..scheduler.plan import Plan
from ..scheduler.residence import Tier
from ..scheduler.timeline import Timeline
from .backing import Backing, ModuleBacking, Portion
from .binding import Binding, Bound, placeholder
from .devices.base import Device
from .experts.runner import ExpertRunner
from .guess import guess_of
from .layout import Changing, Draft, Layout
from .mover import BlockMover
from .oncpu import OnCpu
from .partition import callable_module
from .session import Session
from .tables import Piece, Table
from .units import find_units

OPAQUE = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
"""Modules that choose their kernel by whether a weight, absent ones too, has a `__torch_function__` of its own."""


class Machinery:
    """Everything that runs one streamed module, and its end.

    Args:
        share: What the ledger has booked of the host; it is told how much of that the arenas have touched.
        changing: It is to be trained. Where weights change, a block has one home, in host memory or on disk, and every
            other copy follows it.
    """

    def __init__(
        self,
        *,
        device: Device,
        layout: Layout,
        backing: Backing,
        module: nn.Module,
        share: Reservation,
        changing: Changing | None = None,
    ) -> None:
        self.device = device
        self.layout = layout
        self.share = share
        self.changing = changing
        self.trains = changing is not None and changing.weights_change
        """Whether weights in blocks change."""
        self.lent_for_good = False
        """Whether all of them were lent once, and nobody leases them again."""
        self.timeline = Timeline()
        self.plan: Plan | None = None
        """What the layout means, once the links have been measured."""
        self.costs: CostModel | None = None
        """What operations take on this machine, where a calibration says so."""
        self.host_left_nbytes: int | None = None
        """What a named host budget leaves for keys and values of layers that the CPU computes; None where none was."""
        self._lock = threading.Lock()
        self._closed = False
        self._on_close: list[Callable[[], None]] = []
        self._before_close: list[Callable[[], None]] = []
        with ExitStack() as made:
            self._make(layout, backing, module, share, made)
            made.pop_all()

    def _make(self, layout: Layout, backing: Backing, module: nn.Module, share: Reservation, made: ExitStack) -> None:
        device = self.device
        self.host, self.front_arena = _arenas(device, layout, made)
        self._counted: set[AnyArena] = {self.host, self.front_arena}
        share.touched = partial(_touched, self._counted, layout.own_host_nbytes - layout.granted_nbytes)
        self.engine = DiskEngine(throttle=device.disk_throttle, staging_nbytes=layout.staging_nbytes)
        made.callback(self.engine.close)  # before the arenas: it joins the threads that use them
        droppable = frozenset() if self.trains else _droppable(layout, backing)
        self.units = find_units(module, layout, device.torch_device)
        on_cpu = self.units.on_cpu
        self.front, self.back = _tiers(layout, self.host, self.front_arena, droppable, on_cpu.keys())
        self.images = _images(self, backing)
        self.parameters = dict(module.named_parameters())
        if isinstance(backing, ModuleBacking):
            _preload(self, backing)
        return_free_memory()  # of the originals, or of what building the model took
        self.bindings = _bindings(self, backing)
        self.mover = BlockMover(
            device=device,
            engine=self.engine,
            images=self.images,
            device_images={b.id: b.device_image for b in layout.blocks if b.device_image is not None},
        )
        made.callback(self.mover.close)
        orders = AccessOrders(guess_of(module, layout, on_cpu), first=0)
        nbytes = {block.id: block.image.nbytes for block in layout.blocks}
        core = Core(
            front=self.front,
            back=self.back,
            nbytes=nbytes,
            mover=self.mover,
            orders=orders,
            clock=time.monotonic_ns,
            timeline=self.timeline,
            inflight_nbytes=max(2 * THREADS * CHUNK, 2 * max(nbytes.values())),
            poison=debug_enabled(),
            on_cpu=sorted(on_cpu),
            unordered=0 if layout.experts is None else len(layout.blocks) - layout.experts.first,
        )
        self.executor = Executor(core, self.mover)
        made.callback(self.executor.close)
        self.tables = _tables(self, backing)
        self.session = Session(
            device=device,
            executor=self.executor,
            front=self.front_arena,
            bindings=self.bindings,
            tables=self.tables,
            spare_slots=layout.spare_slots,
            # Frozen weights want no gradient in memory either: nothing is to be computed as if they did.
            pretrained=not isinstance(backing, ModuleBacking) and (self.changing is None or self.trains),
        )
        if layout.experts is not None:
            self.session.experts = ExpertRunner(
                layout, self.front_arena, self.host, device, self.executor, self.session.sweep_here
            )
        if on_cpu:
            self.session.on_cpu = OnCpu(self.session, self.units, self.host)

    def start(self, module: nn.Module) -> None:
        """Start prefetching, lend the small tensors for good, and wrap the forwards."""
        _keep_root(module)
        self.executor.start()
        self.session.lend(0, observed=False)
        on_path = _ancestors(path for path, child in module.named_modules() if self._concerns(path, child))
        keys = {path: key for key, (path, _) in enumerate(module.named_modules())}
        for key, (path, child) in enumerate(module.named_modules()):
            if path in on_path and callable_module(child):
                opaque = isinstance(child, OPAQUE)
                self.session.wrap(child, key, self.layout.leases.get(path, ()), opaque=opaque)
        if self.session.on_cpu is not None:
            self.session.on_cpu.install(module, keys)
        if self.session.experts is not None:
            self.session.experts.install(module)

    def _concerns(self, path: str, child: nn.Module) -> bool:
        """Whether the module itself leases a block or owns a table."""
        return bool(self.layout.leases.get(path)) or any(id(p) in self.tables for p in child._parameters.values())

    def load_all(self, module: nn.Module) -> None:
        """Bring every block, lend all of them for good, and stop everything but the arenas."""
        _keep_root(module)
        self.lent_for_good = True
        self.executor.start()
        for block in self.layout.blocks:
            self.session.lend(block.id, observed=False)
        self.device.wait(self.device.copied())  # a lease is granted as soon as its copy has been enqueued
        self.executor.close()
        self.mover.close()
        self.engine.close()
        if self.back is not None:
            self.host.close()  # blocks only passed through
        if isinstance(self.front_arena, HostArena):
            self.front_arena.allow_fork()

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def count(self, arena: AnyArena) -> None:
        """Another arena takes of what the ledger has booked."""
        self._counted.add(arena)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Have something released at the end."""
        self._on_close.append(callback)

    def before_close(self, callback: Callable[[], None]) -> None:
        """Have something done at the end while everything still works."""
        self._before_close.append(callback)

    def close(self) -> None:
        """Stop threads and give all memory back. May be called twice, from any thread but the executor's own."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with ExitStack() as end:  # every step runs, whatever another one raises; the last one pushed is the first
            for callback in self._on_close:
                end.callback(callback)
            for arena in {id(a): a for a in (self.front_arena, self.host)}.values():
                end.callback(arena.close)
            end.callback(self.session.close)
            end.callback(self.device.close)
            end.callback(self.mover.close)
            end.callback(self.engine.close)  # joins the threads that write into the arenas
            end.callback(self.executor.close)
            for callback in self._before_close:
                end.callback(callback)


def _keep_root(module: nn.Module) -> None:
    """Let every part of the model keep the model alive: its end takes the weights of all parts with it."""
    for child in module.modules():
        if child is not module:
            child.__dict__["_penstock_root"] = module


def _ancestors(paths: Iterable[str]) -> set[str]:
    """The paths and everything above them, the root included."""
    found = {""}
    for path in paths:
        parts = path.split(".") if path else []
        found.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return found


def _arenas(device: Device, layout: Layout, made: ExitStack) -> tuple[HostArena, AnyArena]:
    host = device.host_arena((layout.back or layout.front).nbytes + layout.expert_host_nbytes)
    made.callback(host.close)
    if layout.back is None:
        return host, host
    front = device.device_arena(layout.front.nbytes + layout.expert_device_nbytes)
    made.callback(front.close)
    return host, front


def _touched(arenas: Iterable[AnyArena], own_nbytes: int) -> int:
    """Bytes of a model's host memory that the system has provided; staging and buffers count from the start."""
    return own_nbytes + sum(arena.resident_nbytes() for arena in arenas if isinstance(arena, HostArena))


def _droppable(layout: Layout, backing: Backing) -> frozenset[int]:
    """Blocks that need not stay where the plan keeps them, if others turn out to be used more often.

    Not those of a built module, whose only copy is in the arena, nor pieces of tables, whose rows are looked up where
    they stay without a lease, nor experts, which are in no order.
    """
    if isinstance(backing, ModuleBacking):
        return frozenset()
    fixed = {0}.union(*layout.tables.values())
    passes = layout.front.slot_nbytes if layout.back is None else layout.back.slot_nbytes
    return frozenset(
        block.id
        for block in layout.blocks
        if block.id not in fixed and not layout.is_expert(block) and block.image.nbytes <= passes
    )


def _tiers(
    layout: Layout, host: HostArena, front_arena: AnyArena, droppable: frozenset[int], on_cpu: Set[int]
) -> tuple[Tier, Tier | None]:
    front = Tier(
        name="device" if layout.back else "host",
        permanent={b.id: front_arena.cut(b.front_nbytes) for b in layout.blocks if b.id in layout.front.resident},
        ring=[front_arena.cut(layout.front.slot_nbytes) for _ in range(layout.front.slots)],
        sizes={b.id: b.front_nbytes for b in layout.blocks},
        droppable=droppable,
    )
    if layout.back is None:
        return front, None
    back = Tier(
        name="host",
        permanent={b.id: host.cut(b.image.nbytes) for b in layout.blocks if b.id in layout.back.resident},
        ring=[host.cut(layout.back.slot_nbytes) for _ in range(layout.back.slots)],
        sizes={b.id: b.image.nbytes for b in layout.blocks},
        droppable=droppable - on_cpu,  # they are idle only for the device
    )
    return front, back


def _images(machinery: Machinery, backing: Backing) -> dict[int, Image]:
    """Host images by block. What goes to a scratch file gets its place there."""
    images = {block.id: block.image for block in machinery.layout.blocks}
    if isinstance(backing, ModuleBacking):
        for block in machinery.layout.blocks:
            if not _stays(machinery, block):
                images[block.id] = backing.place(block.image)
    return images


def _preload(machinery: Machinery, backing: ModuleBacking) -> None:
    """Move a built module's parameters to where they will live.

    What goes to disk is written first, while the originals are still there: if that fails, the module is as it was.
    Then each original is freed as soon as its last piece has been copied.
    """
    layout = machinery.layout
    for name in layout.tables:
        _write_table(machinery, name, backing.place_table(name))
    stays = [block for block in layout.blocks if _stays(machinery, block)]
    for block in layout.blocks:
        if block not in stays:
            _write_block(machinery, backing, block)
    left = Counter(portion.name for block in stays for portion in block.portions)
    for name in machinery.parameters:
        if not left[name] and backing.holds(name):
            _free(machinery, name)
    for block in stays:
        _keep_block(machinery, backing, block)
        for portion in block.portions:
            left[portion.name] -= 1
            if not left[portion.name]:
                _free(machinery, portion.name)


def _stays(machinery: Machinery, block: Draft) -> bool:
    """Whether the only copy of a built module's block is in an arena."""
    back = machinery.back
    on_device = block.id in machinery.front.permanent and not (machinery.trains and back is not None)
    return on_device or (back is not None and block.id in back.permanent)


def _free(machinery: Machinery, name: str) -> None:
    parameter = machinery.parameters[name]
    parameter.data = placeholder(parameter, machinery.device.torch_device)


def _write_block(machinery: Machinery, backing: ModuleBacking, block: Draft) -> None:
    (window,) = machinery.images[block.id].windows
    if machinery.layout.is_expert(block) and machinery.back is None:
        offset = machinery.host.nbytes - round_up(window.nbytes)  # where slots of experts will be, which come last
    else:
        offset = (machinery.back or machinery.front).free[0].offset
    _fill(machinery.host, offset, backing, block)
    view = machinery.host.view(offset, window.nbytes)
    machinery.engine.write(window.path, window.file_offset, view).wait()


def _keep_block(machinery: Machinery, backing: ModuleBacking, block: Draft) -> None:
    device, front, back = machinery.device, machinery.front, machinery.back
    if back is None:
        _fill(machinery.host, front.preload(block.id).offset, backing, block)
    elif block.id in back.permanent:
        _fill(machinery.host, back.preload(block.id).offset, backing, block)
    else:
        passing = back.free[0]
        _fill(machinery.host, passing.offset, backing, block)
        slot = front.preload(block.id)
        assert block.device_image is not None
        for start, offset, nbytes in block.device_image.parts(0, block.image.nbytes):
            device.copy(machinery.host, passing.offset + start, slot.arena, slot.offset + offset, nbytes)
        device.wait(device.copied())


def _fill(arena: HostArena, offset: int, backing: ModuleBacking, block: Draft) -> None:
    for portion in block.portions:
        value = backing.value(portion)
        place = block.image.places[portion.key]
        if place.nbytes:
            torch.frombuffer(arena.view(offset + place.offset, place.nbytes), dtype=torch.uint8).copy_(value)


def _write_table(machinery: Machinery, name: str, span: FileSpan) -> None:
    """Write a table to its scratch file through a small aligned buffer."""
    parameter = machinery.parameters[name]
    row = parameter.nbytes // parameter.shape[0]
    staging = HostArena(max(1 << 20, row + 4096), tier="staging")
    try:
        raw = torch.as_strided(parameter.detach().contiguous(), (parameter.numel(),), (1,)).cpu().view(torch.uint8)
        for start in range(0, parameter.nbytes, staging.nbytes):
            piece = raw[start : start + staging.nbytes]
            torch.frombuffer(staging.view(0, len(piece)), dtype=torch.uint8).copy_(piece)
            padded = -(-len(piece) // 4096) * 4096
            machinery.engine.write(span.path, span.offset + start, staging.view(0, padded)).wait()
    finally:
        staging.close()


def _bindings(machinery: Machinery, backing: Backing) -> dict[int, Binding]:
    bindings = {}
    for block in machinery.layout.blocks:
        if machinery.layout.is_expert(block):
            continue  # lent to products, and to no parameter
        places = (block.device_image or block.image).places
        tensors = []
        for portion in block.portions:
            parameter = machinery.parameters[portion.name]
            place = places[portion.key]
            stride = backing.stride(portion.name)
            empty = placeholder(parameter, machinery.device.torch_device)
            bound = Bound(name=portion.key, parameter=parameter, place=place, stride=stride, empty=empty)
            if block.id in machinery.units.on_cpu:
                bound.host_place = block.image.places[portion.key]
            tensors.append(bound)
        bindings[block.id] = Binding(block=block.id, tensors=tensors)
    return bindings


def _tables(machinery: Machinery, backing: Backing) -> dict[int, Table]:
    by_id = {block.id: block for block in machinery.layout.blocks}

    def rows_of(piece: Piece) -> torch.Tensor | None:
        for tier, arena, images in (
            (machinery.front, machinery.front_arena, "front"),
            (machinery.back, machinery.host, "host"),
        ):
            held = None if tier is None else tier.holding.get(piece.block)
            if held is not None and held.permanent and held.ready:
                draft = by_id[piece.block]
                image: Image | DeviceImage = draft.image
                if images == "front" and draft.device_image is not None:
                    image = draft.device_image
                (portion,) = draft.portions
                machinery.device.compute_waits(held.event)
                place = image.places[portion.key]
                flat = machinery.device.tensor(arena)[held.slot.offset + place.offset :][: place.nbytes]
                return flat.view(machinery.parameters[portion.name].dtype).view(place.shape)
        return None

    tables = {}
    experts = machinery.layout.experts
    for name in () if experts is None else (name for layer in experts.layers for name in layer.parts):
        parameter = machinery.parameters[name]
        tables[id(parameter)] = Table(  # whoever asks for the parameter itself has it gathered
            name=name,
            parameter=parameter,
            source=backing.source(name),
            dtype=backing.dtype(name),
            skew=backing.skew(Portion(name=name)),
            pieces=[],
            resident_rows=rows_of,
            engine=machinery.engine,
            of_experts=True,
        )
    for name, blocks in machinery.layout.tables.items():
        parameter = machinery.parameters[name]
        tables[id(parameter)] = Table(
            name=name,
            parameter=parameter,
            source=backing.source(name),
            dtype=backing.dtype(name),
            skew=backing.skew(Portion(name=name)),
            pieces=[
                Piece(block=b, start=rows[0], stop=rows[1])
                for b in blocks
                if (rows := by_id[b].portions[0].rows) is not None
            ],
            resident_rows=rows_of,
            engine=machinery.engine,
        )
    return tables
