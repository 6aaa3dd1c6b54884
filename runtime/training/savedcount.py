"""What a forward saves for backward, counted: the model's own forward and loss run once on tensors without bytes.

Whatever autograd saves comes through hooks, as in a step: storages count once, parameters and buffers not at all. So it
holds for any layer, and takes some tenths of a second, of a hundred layers two. A forward that asks for values cannot
run so; then what layers save is estimated from their widths, and said to be.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ...scheduler.sizes import Workload
from ...scheduler.tape import Tape
from ..feeding import UnknownInputError, loss_of
from ..recompute import segments_of
from ..rehearsal import TooLongError, quietly, rehearsing
from .products import Products
from .run import random_state, set_random_state
from .saves import ForwardSaves, LayerCount

logger = logging.getLogger(__name__)

_OF_HIDDEN, _OF_WIDE = 14, 4
"""Elements that a layer saves per token, by its widths, where it cannot be counted: norms in fp32 and as they go on,
queries, keys, values and what attention makes of them; and gate, its activation, up and the product."""


class NotCountedError(Exception):
    """A forward cannot run on tensors without bytes; the message says why, as the end of a sentence."""


def forward_saves(
    model: nn.Module, *, context: int | None, batch: int | None, packed: bool = False, on_cpu: bool = True
) -> ForwardSaves | None:
    """What the forward of a training step of a model of transformers' saves. Takes no memory to speak of.

    Args:
        model: To be trained, on any device, the meta device too. It is left as it is.
        context: Tokens per sequence.
        batch: Sequences of a backward pass; 1 where it is not said.
        packed: Whether these hold several documents, which positions keep apart.
        on_cpu: Whether the CPU computes.

    Returns:
        None where nothing is known: neither what the model is to be fed, nor its widths.
    """
    if not isinstance(model, PreTrainedModel) or (context is None and model.main_input_name == "input_ids"):
        return None
    workload = Workload(train="adamw", batch=batch or 1, context=max(context or 0, 2), packed=packed)
    try:
        return count_saved(_copied(model), lambda fake: loss_of(fake, workload), on_cpu=on_cpu)
    except NotCountedError as error:
        logger.info("what a forward saves cannot be counted: %s", error)
        return _estimated(model, tokens=(context or 0) * (batch or 1), why=str(error))


def count_saved(model: nn.Module, step: Callable[[Any], Tensor], *, on_cpu: bool) -> ForwardSaves:
    """Count what a forward and its loss save.

    Args:
        model: On fake tensors.
        step: Runs it, on inputs that it makes, and gives the loss.
        on_cpu: Whether the CPU computes.

    Raises:
        NotCountedError: it cannot run on fake tensors.
    """
    name, tape, random = type(model).__name__, Tape(), random_state()
    count = _Count(model, tape)
    training = model.training
    model.train()
    with quietly():
        try:
            with rehearsing(model, tape, on_cpu=on_cpu), count.watching(), count.products:
                loss = step(model)
                del loss
        except TooLongError as error:
            raise NotCountedError(f"the forward of {name} loops over its tokens") from error
        except UnknownInputError as error:
            raise NotCountedError(str(error)) from error
        except Exception as error:  # a model's code may do anything that a tensor without values cannot
            logger.debug("counting failed", exc_info=True)
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise NotCountedError(f"the forward of {name} cannot run on tensors without bytes ({text})") from error
        finally:
            model.train(training)
            set_random_state(random)  # whatever a forward may draw in Python
    return count.found()


@dataclass(kw_only=True, slots=True)
class _Call:
    """A layer at work."""

    path: str
    begun: int
    """Where the tape was."""
    given: frozenset[int]
    """Storages of its arguments."""
    saved_nbytes: int = 0
    peak_nbytes: int = 0


@dataclass(slots=True)
class _Count:
    """Hooks that count.

    Args:
        model: On fake tensors.
        tape: That its operations are written on.
    """

    model: nn.Module
    tape: Tape
    _calls: list[_Call] = field(default_factory=list)
    _open: list[_Call] = field(default_factory=list)
    _seen: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    """By address; held, so that no other storage gets it."""
    _every: int = 0
    products: Products = field(init=False)

    def __post_init__(self) -> None:
        self.products = Products(self.model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What autograd saves meanwhile counts."""
        for own in (*self.model.parameters(), *self.model.buffers()):
            storage = own.untyped_storage()
            self._seen[storage._cdata] = storage
        with ExitStack() as hooks:
            for path in segments_of(self.model):
                layer = self.model.get_submodule(path)
                hooks.callback(layer.register_forward_pre_hook(self._enter(path), with_kwargs=True).remove)
                hooks.callback(layer.register_forward_hook(self._leave, always_call=True).remove)
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
            yield

    def _enter(self, path: str) -> Callable[..., None]:
        def entered(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = frozenset(each.untyped_storage()._cdata for each in _strided((args, kwargs)))
            self._open.append(_Call(path=path, begun=self.tape.position, given=given))
            self.products.enter()

        return entered

    def _leave(self, *_: object) -> None:
        self.products.leave()
        call = self._open.pop()
        call.peak_nbytes = self.tape.peak_since(call.begun)
        self._calls.append(call)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage
                self._every += storage.nbytes()
                if self._open and storage._cdata not in self._open[-1].given:
                    self._open[-1].saved_nbytes += storage.nbytes()
        return tensor

    def found(self) -> ForwardSaves:
        """What was counted."""
        layers = tuple(
            LayerCount(path=call.path, saved_nbytes=call.saved_nbytes, peak_nbytes=call.peak_nbytes)
            for call in self._calls
        )
        return ForwardSaves(
            layers=layers,
            layers_nbytes=sum(layer.saved_nbytes for layer in layers),
            every_nbytes=self._every,
            products=tuple(self.products.found),
        )


def _copied(model: nn.Module) -> Any:
    try:
        return without_bytes(model)
    except Exception as error:  # what a module holds beside tensors may be anything
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise NotCountedError(f"{type(model).__name__} cannot be copied ({text})") from error


def without_bytes(model: nn.Module) -> Any:
    """A copy on tensors that have shapes only."""
    mode = FakeTensorMode()
    made: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        with mode:
            empty: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        trained = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty
    return copy.deepcopy(model, made)


def _strided(value: object) -> Iterable[Tensor]:
    """Tensors among arguments, also in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strided(each)
    elif isinstance(value, dict):
        yield from _strided(tuple(value.values()))


def _estimated(model: PreTrainedModel, *, tokens: int, why: str) -> ForwardSaves | None:
    """What pre-norm layers with gated feed-forwards save; None where widths or tokens are not known."""
    config = model.config.get_text_config()
    hidden, count = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not tokens or not hidden or not count:
        return None
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    wide *= getattr(config, "num_experts_per_tok", None) or 1
    each = tokens * (_OF_HIDDEN * hidden + _OF_WIDE * wide) * next(model.parameters()).itemsize
    layers = tuple(LayerCount(path=f"layer {index}", saved_nbytes=each, peak_nbytes=each) for index in range(count))
    return ForwardSaves(layers=layers, layers_nbytes=count * each, every_nbytes=count * each, why_estimated=why)
