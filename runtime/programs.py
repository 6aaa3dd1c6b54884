"""What a model computes, call by call, found by running it on tensors that have shapes and no bytes.

The model's own code runs, so that any architecture is told as it is: products with their weights and rows, attention
with its keys and values, and for everything else the bytes that it reads and writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..scheduler.operations import Operation
from ..scheduler.program import Enter, Event, Leave, Program
from ..scheduler.sizes import Workload
from .feeding import inputs_of, loss_of, takes, token_ids
from .rehearsal import TooLongError, grouped_product, mode_of, quietly

logger = logging.getLogger(__name__)

MOST_OPERATIONS: Final = 200_000
_aten: Final = torch.ops.aten
_PRODUCTS: Final[dict[Any, tuple[int, int]]] = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
    _aten.convolution.default: (0, 1),
    _aten._grouped_mm.default: (0, 1),
}
"""Where each product has its two factors."""


class _Listener(TorchDispatchMode):
    """Notes operations. Views are free: they start nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.recording = False
        self.learned: set[int] = set()
        """Places of products with weights that are trained."""
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._trained = {p.untyped_storage()._cdata for p in model.parameters() if p.requires_grad}
        self._left = MOST_OPERATIONS

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on shapes, and note what it would cost."""
        self._left -= 1
        if not self._left:
            raise TooLongError
        if func is _aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False
        run = grouped_product if func is _aten._grouped_mm.default else func
        result = run(*args, **(kwargs or {}))
        if self.recording:
            found = self._operation(func, args, result)
            if found is not None:
                self.events.append(found)
        return result

    def _operation(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Operation | None:
        places = _PRODUCTS.get(func)
        if places is not None:
            product = self._product(args[places[0]], args[places[1]], result)
            return _of_some_experts(product, args[1]) if func is _aten._grouped_mm.default else product
        if "scaled_dot_product" in getattr(func, "__name__", ""):
            return _attention(*args[:3])
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        if outputs and all(tensor.untyped_storage()._cdata in known for tensor in outputs) and not _writes(func):
            return None
        read = sum(self._read_nbytes(tensor, outputs) for tensor in inputs)
        written = sum(tensor.numel() * tensor.element_size() for tensor in outputs)
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in outputs if tensor.is_floating_point()]
        return Operation(kind="memory", nbytes=read + written, dtype=dtypes[0] if dtypes else "float32")

    def _read_nbytes(self, tensor: Tensor, outputs: Sequence[Tensor]) -> int:
        nbytes = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage()._cdata in self._weights:  # of a table only the rows that come out are read
            nbytes = min(nbytes, sum(out.numel() * out.element_size() for out in outputs))
        return nbytes

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> Operation:
        dtype = str(right.dtype).removeprefix("torch.")
        weights = [t for t in (left, right) if t.untyped_storage()._cdata in self._weights]
        if weights:
            weight = weights[0]
            if weight.untyped_storage()._cdata in self._trained:
                self.learned.add(len(self.events))
            nbytes = min(weight.untyped_storage().nbytes(), weight.numel() * weight.element_size())  # may be expanded
            width = weight.shape[0] if weight.dim() == 4 else weight.shape[-1 if weight is right else -2]
            stacked = weight.shape[0] if weight.dim() == 3 and nbytes == weight.numel() * weight.element_size() else 1
            return Operation(kind="linear", nbytes=nbytes, rows=result.numel() / width / stacked, dtype=dtype)
        # Of two activations the larger is what is read; the other one's rows use it.
        matrices, inner = left.numel() / (left.shape[-1] * left.shape[-2]), left.shape[-1]
        read = matrices * inner * max(left.shape[-2], right.shape[-1]) * right.element_size()
        return Operation(kind="attention", nbytes=read, rows=min(left.shape[-2], right.shape[-1]), dtype=dtype)


def _of_some_experts(product: Operation, weight: Tensor) -> Operation:
    """A grouped product: of as many experts as so many rows are of, if all are used alike."""
    if weight.dim() != 3 or product.kind != "linear":
        return product
    experts = weight.shape[0]
    rows = product.rows * experts
    used = max(1.0, experts * (1 - (1 - 1 / experts) ** rows))
    nbytes = product.nbytes * used / experts
    return Operation(kind=product.kind, nbytes=nbytes, rows=rows / used, dtype=product.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Operation:
    nbytes = (key.numel() + value.numel()) * key.element_size()
    rows = query.numel() / query.shape[-1] / max(key.numel() / key.shape[-1] / key.shape[-2], 1)
    return Operation(kind="attention", nbytes=nbytes, rows=rows, dtype=str(key.dtype).removeprefix("torch."))


def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


@contextmanager
def _listening(model: nn.Module) -> Iterator[_Listener]:
    listener = _Listener(model)
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, p=path: listener.events.append(Enter(p))))
        hooks.append(module.register_forward_hook(lambda *_, p=path: listener.events.append(Leave(p))))
    try:
        with quietly(), torch.no_grad(), mode_of(model), listener:
            yield listener
    finally:
        for hook in hooks:
            hook.remove()


def programs(model: PreTrainedModel, workload: Workload, *, prompt: int) -> tuple[Program, ...]:
    """The calls of an answer: the prompt, and a token in the middle of what follows. One call for a model that does not
    generate.

    Args:
        model: With fake weights (`rehearsal.make_fake`).
        workload: `context` is the length at the end of the answer.
        prompt: Tokens of it that are given.

    Raises:
        UnknownInputError: what the model reads is not known.
        TooLongError: the model loops over its tokens.
    """
    name = "past_key_values" if takes(model, "past_key_values") else "cache_params"
    for parameter in model.parameters():  # as those of a loaded model do: torch folds strided operands by it
        parameter.requires_grad_(parameter.is_floating_point())
    with _listening(model) as listener:
        if not (model.can_generate() and takes(model, name)) or model.config.is_encoder_decoder:
            return (_plain(model, listener, workload),)
        first = _turn(model, listener, "prefill", workload.batch, input_ids=token_ids(workload.batch, prompt))
        listener.recording = False
        middle = max((prompt + workload.context) // 2, prompt + 1)
        cache = _cache(model, name, workload.batch, middle)
        second = _turn(
            model, listener, "decode", workload.batch, input_ids=token_ids(workload.batch, 1), **{name: cache}
        )
    return first, second


def prompt_program(model: PreTrainedModel, tokens: int) -> Program:
    """The call with a prompt of so many tokens: the first of `programs`.

    Args:
        model: With fake weights (`rehearsal.make_fake`); it continues texts.
        tokens: Of the prompt.

    Raises:
        TooLongError: the model loops over its tokens.
    """
    for parameter in model.parameters():  # as in `programs`
        parameter.requires_grad_(parameter.is_floating_point())
    with _listening(model) as listener:
        return _turn(model, listener, "prefill", 1, input_ids=token_ids(1, tokens))


def training_program(model: PreTrainedModel, workload: Workload) -> Program:
    """The forward of a training step, the loss of all tokens with it.

    Args:
        model: With fake weights (`rehearsal.make_fake`); those are trained that want a gradient.
        workload: Sequences of a backward pass, and their tokens.

    Raises:
        UnknownInputError: what the model reads is not known.
        TooLongError: the model loops over its tokens.
    """
    training = model.training
    model.train(True)
    try:
        with _listening(model) as listener:
            listener.recording = True
            loss_of(model, workload)
            events, learned = tuple(listener.events), frozenset(listener.learned)
    finally:
        model.train(training)
    return Program(title="forward", tokens=workload.batch * workload.context, events=events, learned=learned)


def _cache(model: PreTrainedModel, name: str, batch: int, length: int) -> Any:
    return getattr(model(input_ids=token_ids(batch, length), use_cache=True, **_last_only(model)), name)


def _turn(model: PreTrainedModel, listener: _Listener, title: str, tokens: int, **inputs: Any) -> Program:
    """One turn of transformers' generate."""
    listener.events.clear()
    listener.recording = True
    output = model(**inputs, **_last_only(model), use_cache=True)
    output.logits[:, -1, :].to(torch.float32, copy=True).argmax(-1)
    return Program(title=title, tokens=tokens, events=tuple(listener.events))


def _last_only(model: PreTrainedModel) -> dict[str, int]:
    return {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}


def _plain(model: PreTrainedModel, listener: _Listener, workload: Workload) -> Program:
    listener.recording = True
    more = {"decoder_input_ids": token_ids(workload.batch, 1)} if model.config.is_encoder_decoder else {}
    model(**inputs_of(model, replace(workload)), **more)
    return Program(title="forward", tokens=workload.batch if more else 0, events=tuple(listener.events))
