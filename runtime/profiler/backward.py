"""Modules at work in backward, seen from nodes of the autograd graph: nothing is wrapped, no gradient changes.

The backward of a module starts when the node that made its output is about to run, and ends when the nodes that made
its inputs are, or else with the whole backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from .calls import Clock, ModuleWatch, tensors_in
from .recorder import Recorder
from .schema import Compute, Phase


class _Span:
    """The backward of one call of one module."""

    __slots__ = ("begun", "depth", "ended", "row")

    def __init__(self, row: int, depth: int) -> None:
        self.row, self.depth = row, depth
        self.begun: Any = None
        self.ended = False


class BackwardWatch:
    """A listener of `ModuleWatch` that records spans of backward."""

    def __init__(self, recorder: Recorder, watch: ModuleWatch, clock: Clock) -> None:
        self._recorder = recorder
        self._watch = watch
        self._clock = clock
        self._under_way: list[_Span] = []
        self._queued = False
        self._closed = False

    def close(self) -> None:
        """Record no more. Hooks stay in graphs that outlive the recording, and do nothing."""
        self._closed = True

    def root_begins(self, module: torch.nn.Module) -> None:
        """Nothing yet."""

    def root_ends(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Nothing more."""

    def module_returned(self, row: int, depth: int, args: tuple[Any, ...], result: Any) -> None:
        """Put hooks on the nodes that made the output and the inputs."""
        if not torch.is_grad_enabled():
            return
        made = {node for tensor in tensors_in(result) if (node := tensor.grad_fn) is not None}
        before = {node for tensor in tensors_in(args) if (node := tensor.grad_fn) is not None}
        if not made or made & before:
            return
        span = _Span(row, depth)
        for node in made:
            node.register_prehook(lambda _, span=span: self._begin(span))
        left = [len(before)]
        for node in before:
            node.register_prehook(lambda _, span=span, left=left: self._input_done(span, left))

    def _begin(self, span: _Span) -> None:
        if span.begun is not None or self._closed or not self._recorder.alive:
            return
        self._recorder.hooks += 1
        span.begun = self._clock.begin()
        self._under_way.append(span)
        if not self._queued:  # the end of this backward pass ends what no input ends
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._pass_done)

    def _input_done(self, span: _Span, left: list[int]) -> None:
        left[0] -= 1
        if not left[0]:
            self._end(span)

    def _pass_done(self) -> None:
        self._queued = False
        for span in list(reversed(self._under_way)):
            self._end(span)

    def _end(self, span: _Span) -> None:
        if span.begun is None or span.ended or self._closed:
            return
        span.ended = True
        self._under_way.remove(span)
        lane = self._watch.lane()

        def done(launched: int, start: int, end: int) -> None:
            self._recorder.add(
                Compute(
                    module=span.row,
                    phase=Phase.BACKWARD,
                    start=start,
                    end=end,
                    lane=lane,
                    launched=launched,
                    depth=span.depth,
                )
            )

        self._clock.end(span.begun, done)
