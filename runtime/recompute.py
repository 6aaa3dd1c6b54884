"""Activations of a part of the model: not kept, but made again when backward comes to it (Chen et al., 2016).

torch's own checkpointing keeps what the second forward saves, views of weights among it, which a streamed model
replaces in the meantime. So this one packs through the session's saved tensors: what a segment saves is a number while
forward runs; when backward asks for the first of them, the segment runs once more, and what it saves this time is what
counts. The graph is the one of the first forward, so gradients have the bits of a run that kept everything.

Where a plan has some of it held (`activations/`), that is not made again, and neither are the operations whose results
it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..memory.errors import PenstockError
from .activations.replay import DivergedError, Replay, Rerun, rerun
from .changedbuffers import ChangedBuffers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .activations.keeper import SegmentCall
    from .activations.operations import OperationLog
    from .session import Session


logger = logging.getLogger(__name__)


class RecomputeError(PenstockError):
    """A segment did something else when it ran again."""


class _EnoughError(Exception):
    """Everything has been made again; what would follow is not needed."""


class Pending:
    """A tensor of a segment that will be made again."""

    __slots__ = ("index", "segment")

    def __init__(self, segment: Segment, index: int) -> None:
        self.segment = segment
        self.index = index


class Segment:
    """One forward of one part of a model.

    Args:
        session: Of the model.
        module: The part.
        key: Its number, as a root call.
        forward: Its forward, as it was called.
        buffers: Of the part, which forwards may change.
    """

    def __init__(
        self,
        session: Session,
        module: nn.Module,
        key: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Any,
        buffers: ChangedBuffers,
    ) -> None:
        self._session = session
        self._buffers, self._before = buffers, buffers.before()
        self._module = module
        self._key = key
        self._forward = forward
        self._args, self._kwargs = args, kwargs
        self._around = _Surroundings()
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._wanted: set[int] = set()
        """Numbers of those that have to be made again."""
        self._last = -1
        """The last of these."""
        self._found: dict[int, Any] = {}
        self._sources: set[int] = set()
        """Operations that made what has to be made again."""
        self._until = 0
        """Operations before the last of them."""
        self._rerun: Rerun | None = None
        """What of it is carried out again; None for all of it."""
        self._next = 0
        self._generation = session.saved.generation
        self._versions = [(each, each._version) for each in _tensors((args, kwargs))]

    def hold(self, tensor: torch.Tensor, held: Any, log: OperationLog | None) -> Any:
        """Called for what the first forward saves.

        Args:
            tensor: What it saves.
            held: What that is packed as, if it need not be made again.
            log: Of the operations so far.
        """
        self._shapes.append((tensor.shape, tensor.dtype))
        if held is not None:
            return held
        self._last = len(self._shapes) - 1
        self._wanted.add(self._last)
        if log is not None and tensor.layout is torch.strided:
            self._sources.add(log.source(tensor))
            self._until = log.count
        return Pending(self, self._last)

    def first_is_over(self, call: SegmentCall | None) -> None:
        """The first forward has returned."""
        self._before = self._buffers.changed(self._before)
        if call is not None and call.log is not None and call.skips and self._wanted:
            found = rerun(call.log, call.skippable(), self._sources, until=self._until)
            self._rerun = found if found.held or found.left_out else None

    def keep(self, tensor: torch.Tensor, packed: Any) -> None:
        """Called for what the second forward saves, packed as it would be without a segment."""
        index = self._next
        if index >= len(self._shapes) or self._shapes[index] != (tensor.shape, tensor.dtype):
            first = self._shapes[index] if index < len(self._shapes) else "nothing"
            raise RecomputeError(
                f"{type(self._module).__name__} saved {first} as number {index} and {tuple(tensor.shape)} of "
                f"{tensor.dtype} when it ran again for backward: it does not do the same twice. Keep its activations: "
                'activations="keep"'
            )
        self._next += 1
        if index in self._wanted:
            self._found[index] = packed
        if index == self._last:
            raise _EnoughError

    def take(self, index: int) -> Any:
        """What was saved under this number; the segment runs again if it has to."""
        if index not in self._found:
            self._run_again()
        return self._found.pop(index)

    def _run_again(self) -> None:
        session = self._session
        session.saved.check(self._generation)
        if any(each._version != version for each, version in self._versions):
            raise RecomputeError(
                f"{type(self._module).__name__} was given a tensor that has been changed in place since, so it cannot "
                'run again for backward: keep its activations, activations="keep"'
            )
        if self._rerun is not None and self._rerun.changed:
            self._rerun = None
        try:
            self._carry_out(self._rerun)
        except DivergedError:
            logger.info("%s does not do the same twice, so all of it runs again", type(self._module).__name__)
            self._rerun = None
            self._carry_out(None)

    def _carry_out(self, part: Rerun | None) -> None:
        """Run again, until all has been saved that is wanted.

        Args:
            part: What is carried out; None for all of it.
        """
        self._next = 0
        self._found.clear()
        session = self._session
        with ExitStack() as around:
            around.enter_context(torch.enable_grad())
            around.enter_context(self._around.restored())
            around.enter_context(self._buffers.as_before(self._before))
            around.enter_context(session.call(self._key))
            around.enter_context(session.saved.again(self))
            if part is not None:
                around.enter_context(session.saved.watched(Replay(part, session.saved.held)))
            try:
                self._forward(*self._args, **self._kwargs)
            except _EnoughError:
                return
        raise RecomputeError(
            f"{type(self._module).__name__} saved {len(self._shapes)} tensors and {self._next} when it ran again for "
            'backward: it does not do the same twice. Keep its activations: activations="keep"'
        )


class _Surroundings:
    """What a forward depends on beside its arguments and buffers: random numbers, autocast."""

    def __init__(self) -> None:
        self._random = torch.get_rng_state()
        on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._random_cuda = torch.cuda.get_rng_state() if on_cuda else None
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")
        ]
        self._cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As it was then; afterwards as it is now."""
        random = torch.get_rng_state()
        random_cuda = torch.cuda.get_rng_state() if self._random_cuda is not None else None
        with ExitStack() as around:
            for kind, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    around.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._cached))
            try:
                torch.set_rng_state(self._random)
                if self._random_cuda is not None:
                    torch.cuda.set_rng_state(self._random_cuda)
                yield
            finally:
                torch.set_rng_state(random)
                if random_cuda is not None:
                    torch.cuda.set_rng_state(random_cuda)


def recompute(session: Session, module: nn.Module) -> list[str]:
    """Have the parts of a model that come in lists make their activations again. Returns their names."""
    keys = {path: key for key, (path, _) in enumerate(module.named_modules())}
    found = segments_of(module)
    for path in found:
        _wrap(session, module.get_submodule(path), keys[path], path)
    return found


def mark_segments(session: Session, module: nn.Module) -> list[str]:
    """Let the keeper of saved tensors know when these parts run; nothing is made again. Returns their names."""
    keys = {path: key for key, (path, _) in enumerate(module.named_modules())}
    found = segments_of(module)
    for path in found:
        _mark(session, module.get_submodule(path), keys[path], path)
    return found


def segments_of(module: nn.Module) -> list[str]:
    """The names of these parts."""
    found: list[str] = []
    for path, child in module.named_modules():
        if any(path.startswith(f"{name}.") for name in found):
            continue
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for name, part in child.named_children():
                if _worth_it(part):
                    found.append(f"{path}.{name}" if path else name)
    return found


def _worth_it(part: nn.Module) -> bool:
    """Whether it does more than one operation, whose input would have to be kept all the same."""
    has_forward = type(part).forward is not nn.Module.forward
    return has_forward and any(True for _ in part.children()) and any(True for _ in part.parameters())


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Those among arguments, also in lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        if not value.is_inference():
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _is_cache(value: object) -> bool:
    """Whether it holds keys and values, and gets more with each forward."""
    return hasattr(value, "get_seq_length") or hasattr(value, "is_updated")


def _wrap(session: Session, module: nn.Module, key: int, path: str) -> None:
    inner = module.forward
    buffers = ChangedBuffers(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not session.running_here() or session.saved.in_segment:
            return inner(*args, **kwargs)
        if any(_is_cache(value) for value in (*args, *kwargs.values())):
            logger.info("%s is given a cache, which a second forward would find changed: kept", type(module).__name__)
            return inner(*args, **kwargs)
        segment = Segment(session, module, key, inner, args, kwargs, buffers)
        keeper = session.saved.keeper
        known = nullcontext() if keeper is None else keeper.segment(key, path, list(_tensors((args, kwargs))))
        with known as call, session.saved.within(segment, call):
            result = inner(*args, **kwargs)
        segment.first_is_over(call)
        return result

    module.__dict__["forward"] = forward


def _mark(session: Session, module: nn.Module, key: int, path: str) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        keeper = session.saved.keeper
        inside = keeper is None or keeper.call is not None
        if inside or not torch.is_grad_enabled() or not session.running_here():
            return inner(*args, **kwargs)
        assert keeper is not None
        given = list(_tensors((args, kwargs)))
        with keeper.segment(key, path, given) as call, session.saved.noticed(call.log):
            return inner(*args, **kwargs)

    module.__dict__["forward"] = forward
