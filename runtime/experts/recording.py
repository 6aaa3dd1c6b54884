"""Recording a routing trace while a model runs, wherever its weights are."""

from __future__ import annotations

import os
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...memory.errors import UsageError
from ...scheduler.experts.trace import IntArray, Step, TraceHeader
from ...scheduler.experts.tracefile import TraceWriter
from .layers import find_expert_layers, shape_of
from .routers import RouterTap, candidates
from .steps import StepOf, step_of


class RoutingRecorder:
    """Writes which experts each token chooses, from when it is made until `close`. A context manager.

    One call of the model is a step. A call in which not all layers of experts run, one that fails say, is left out.
    Forwards must come one after another.

    Args:
        model: A transformers model, loaded by whomever.
        path: The file to make.
        source: Where the trace is from, for people.

    Raises:
        UsageError: the model has no experts that are known, or there is something at `path`.
        DiskError: the file cannot be made.
    """

    def __init__(self, model: nn.Module, path: str | os.PathLike[str], *, source: str) -> None:
        sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
        found = find_expert_layers(model, sizes, any_implementation=True)
        if found is None:
            raise UsageError(
                f"a {type(model).__name__} has no experts whose routing could be recorded: use a model whose layers of "
                "experts are alike, and are computed through transformers' interface of experts"
            )
        self._found = found
        self._routing = found.routing
        self._tap = RouterTap(model, found.layers, found.routing.experts)
        scored = self._tap.complete
        self._width = min(2 * self._routing.top_k, self._routing.experts) if scored else self._routing.top_k
        header = TraceHeader(
            routing=found.routing,
            width=self._width,
            source=source,
            scored=True,
            guessed=scored,
            expert=shape_of(model, found.layers[0]),
            paths=tuple(layer.path for layer in found.layers),
        )
        self._hooks: list[RemovableHandle] = []
        try:
            self._writer = TraceWriter(path, header)
        except BaseException:
            self._tap.close()
            raise
        self._first_request = self._requests = 0
        self._step: StepOf | None = None
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._guesses: dict[int, torch.Tensor] = {}
        self.steps = self.tokens = self.left_out = 0
        """Written so far; and calls that were not, because not all layers of experts ran."""
        self._watch(model)

    def _watch(self, model: nn.Module) -> None:
        self._hooks.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._end))
        for number, layer in enumerate(self._found.layers):
            module = model.get_submodule(layer.path)
            self._hooks.append(module.register_forward_pre_hook(partial(self._routed, number), with_kwargs=True))

    def sequences(self, count: int) -> None:
        """The next calls are of so many sequences that were not seen before."""
        self._first_request, self._requests = self._requests, self._requests + count

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._step is not None:
            self.left_out += 1  # it failed
        self._step = step_of(self.steps, args, kwargs)
        self._layers.clear()
        self._guesses.clear()

    def _routed(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, weights = (*args, *kwargs.values())[:3]
        logits = self._tap.take(layer, len(hidden))
        if logits is not None and self._tap.complete:
            self._layers[layer] = candidates(chosen, logits, self._width)
        elif not self._tap.complete:
            self._layers[layer] = chosen, weights.detach().float()
        if self._tap.complete and layer + 1 < self._routing.layers:
            ahead = self._tap.ask(layer + 1, hidden)
            if ahead is not None:
                self._guesses[layer + 1] = ahead.topk(self._routing.top_k, dim=-1).indices

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        step, self._step = self._step, None
        if step is None or not self._layers:
            return
        lengths = {len(ids) for ids, _ in self._layers.values()}
        if len(self._layers) < self._routing.layers or len(lengths) > 1:
            self.left_out += 1
            return
        (tokens,) = lengths
        if not tokens:
            return
        self._writer.add(
            Step(
                phase=step.phase(tokens, self._routing),
                requests=self._requests_of(step, tokens),
                experts=np.stack([self._layers[n][0].cpu().numpy() for n in range(self._routing.layers)]).astype("u2"),
                scores=np.stack([self._layers[n][1].cpu().numpy() for n in range(self._routing.layers)]).astype("f2"),
                guesses=self._ahead(tokens) if self._tap.complete else None,
            )
        )
        self.steps += 1
        self.tokens += tokens

    def _requests_of(self, step: StepOf, tokens: int) -> Any:
        """[T] Tokens of a call follow each other sequence by sequence."""
        count = step.sequences or 1
        if not self._requests:
            self.sequences(count)
        return (self._first_request + np.arange(tokens) // max(tokens // count, 1)).astype(np.uint32)

    def _ahead(self, tokens: int) -> Any:
        """[L, T, K] What was guessed; the number of experts where nothing was."""
        routing = self._routing
        found: IntArray = np.full((routing.layers, tokens, routing.top_k), routing.experts, np.int64)
        for layer, guessed in self._guesses.items():
            found[layer] = guessed.cpu().numpy()
        return found.astype(np.uint16)

    def close(self) -> None:
        """Write what waits, and watch no more.

        Raises:
            DiskError: it cannot be written.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._tap.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
