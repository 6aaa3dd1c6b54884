"""Carrying a layout out: arenas, tiers, executor and bindings for one module."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from ..memory.arena import AnyArena, HostArena, debug_enabled
from ..memory.disk import DiskEngine
from ..memory.image import DeviceImage, Image
from ..memory.ledger import Reservation
from ..memory.requests import CHUNK, THREADS
from ..memory.trim import return_free_memory
from ..scheduler.core import Core
from ..scheduler.cost import CostModel
from ..scheduler.executor import Executor
from ..scheduler.order import AccessOrders
from ..scheduler.plan import Plan
from ..scheduler.timeline import Timeline
from .backing import Backing, ModuleBacking, Portion
from .binding import Binding, Bound, placeholder
from .devices.base import Device
from .experts.runner import ExpertRunner
from .guess import guess_of
from .layout import Changing, Layout
from .mover import BlockMover
from .oncpu import OnCpu
from .partition import callable_module
from .places import Places, droppable
from .preloading import Preload
from .resting import RestingThreads
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
            self._make_memory(module, backing, made)
            self._make_executor(module, made)
            self._make_session(backing)
            made.pop_all()

    def _make_memory(self, module: nn.Module, backing: Backing, made: ExitStack) -> None:
        """Arenas, and what reads and writes them; what is in memory already moves into them."""
        device, layout = self.device, self.layout
        self.units = find_units(module, layout, device.torch_device)
        drops = frozenset[int]() if self.trains else droppable(layout, backing)
        self.places = places = Places(device, layout, on_cpu=self.units.on_cpu.keys(), droppable=drops, made=made)
        self.host, self.front_arena = places.host, places.front_arena
        self.front, self.back = places.front, places.back
        self._counted: set[AnyArena] = {self.host, self.front_arena}
        self.share.touched = partial(_touched, self._counted, layout.own_host_nbytes - layout.granted_nbytes)
        self.engine = DiskEngine(throttle=device.disk_throttle, staging_nbytes=layout.staging_nbytes)
        made.callback(self.engine.close)  # before the arenas: it joins the threads that use them
        self.parameters = dict(module.named_parameters())
        self.images = {block.id: block.image for block in layout.blocks}
        if isinstance(backing, ModuleBacking):
            preload = Preload(
                device=device,
                layout=layout,
                places=places,
                backing=backing,
                parameters=self.parameters,
                engine=self.engine,
                trains=self.trains,
            )
            self.images = preload.images()
            preload.run(self.images)
        return_free_memory()  # of the originals, or of what building the model took

    def _make_executor(self, module: nn.Module, made: ExitStack) -> None:
        """What brings blocks."""
        layout, on_cpu = self.layout, self.units.on_cpu
        self.mover = BlockMover(
            device=self.device,
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

    def _make_session(self, backing: Backing) -> None:
        """What lends their bytes while the module runs."""
        device, layout = self.device, self.layout
        self.bindings = _bindings(self, backing)
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
        if self.units.on_cpu:
            self.session.on_cpu = OnCpu(self.session, self.units, self.host)

    def start(self, module: nn.Module) -> None:
        """Start prefetching, lend the small tensors for good, and wrap the forwards."""
        _keep_root(module)
        if self.device.torch_device.type == "cpu" and RestingThreads.wanted():
            self.on_close(RestingThreads().close)
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


def _touched(arenas: Iterable[AnyArena], own_nbytes: int) -> int:
    """Bytes of a model's host memory that the system has provided; staging and buffers count from the start."""
    return own_nbytes + sum(arena.resident_nbytes() for arena in arenas if isinstance(arena, HostArena))


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
    layout, parameters = machinery.layout, machinery.parameters
    rows_of = _resident_rows(machinery)
    drafts = {block.id: block for block in layout.blocks}
    experts = () if layout.experts is None else layout.experts.layers
    # of what is served by rows the pieces; of experts none: whoever asks for the parameter itself has it gathered
    pieces: dict[str, list[Piece]] = {name: [] for layer in experts for name in layer.parts}
    of_experts = frozenset(pieces)
    for name, blocks in layout.tables.items():
        spans = [(b, drafts[b].portions[0].rows) for b in blocks]
        pieces[name] = [Piece(block=b, start=rows[0], stop=rows[1]) for b, rows in spans if rows is not None]
    return {
        id(parameters[name]): Table(
            name=name,
            parameter=parameters[name],
            source=backing.source(name),
            dtype=backing.dtype(name),
            skew=backing.skew(Portion(name=name)),
            pieces=each,
            resident_rows=rows_of,
            engine=machinery.engine,
            of_experts=name in of_experts,
        )
        for name, each in pieces.items()
    }


def _resident_rows(machinery: Machinery) -> Callable[[Piece], torch.Tensor | None]:
    """What gives the rows of a piece, if they are in memory for good."""
    drafts = {block.id: block for block in machinery.layout.blocks}
    device, parameters, places = machinery.device, machinery.parameters, machinery.places

    def rows_of(piece: Piece) -> torch.Tensor | None:
        draft = drafts[piece.block]
        (portion,) = draft.portions
        for arena, held in places.staying(piece.block):
            image: Image | DeviceImage = draft.image
            if arena is places.front_arena and draft.device_image is not None:
                image = draft.device_image
            device.compute_waits(held.event)
            place = image.places[portion.key]
            flat = device.tensor(arena)[held.slot.offset + place.offset :][: place.nbytes]
            return flat.view(parameters[portion.name].dtype).view(place.shape)
        return None

    return rows_of
