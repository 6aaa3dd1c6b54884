"""Modules at work in backward, seen from nodes of the autograd graph: nothing is wrapped, no gradient changes.

The backward of a module starts when the node that made its output is about to run, and ends when the nodes that made
its inputs are, or when the backward of a module beside it starts, or else with the whole backward pass. A graph that is
run again, as `retain_graph` allows, is recorded again.
"""

from __future__ import annotations

from typing import Any

import torch

from .calls import ModuleWatch
from .clocks import Clock
from .guard import harmless
from .recorder import Recorder
from .schema import NONE, Phase
from .spans import Spanned
from .storages import tensors_in


class _Span:
    """The backward of one call of one module."""

    __slots__ = ("begun", "depth", "inputs", "lane", "left", "row", "task")

    def __init__(self, row: int, depth: int, inputs: int) -> None:
        self.row, self.depth, self.inputs = row, depth, inputs
        self.left = inputs
        """Nodes of inputs that have not been reached in the pass under way."""
        self.task = NONE
        """The backward pass that it was seen in last."""
        self.begun: Any = None
        """None while it is not under way."""
        self.lane = 0


class BackwardWatch:
    """A listener of `ModuleWatch` that records spans of backward."""

    def __init__(self, recorder: Recorder, watch: ModuleWatch, clock: Clock) -> None:
        self._recorder = recorder
        self._watch = watch
        self._clock = clock
        self._passes: dict[int, list[_Span]] = {}
        """By number of a backward pass: the spans under way, outermost first. A pass runs in one thread per device."""
        self._closed = False

    def close(self) -> None:
        """Record no more. Hooks stay in graphs that outlive the recording, and do nothing."""
        self._closed = True

    def current(self) -> int:
        """The innermost module whose backward runs in the calling thread's pass; -1 for none."""
        spans = self._passes.get(torch._C._current_graph_task_id())
        return spans[-1].row if spans else NONE

    @harmless
    def root_begins(self, module: torch.nn.Module) -> None:
        """Forget passes that raised: torch calls nobody at their end. (In this thread no backward runs now.)"""
        lane = self._watch.lane()
        for task, spans in list(self._passes.items()):
            if all(span.lane == lane for span in spans):
                self._passes.pop(task, None)

    def root_ends(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Nothing more."""

    @harmless
    def module_returned(self, row: int, depth: int, inputs: Any, result: Any) -> None:
        """Put hooks on the nodes that made the output and the inputs."""
        before = {node for tensor in tensors_in(inputs) if (node := tensor.grad_fn) is not None}
        made = {node for tensor in tensors_in(result) if (node := tensor.grad_fn) is not None} - before
        if not made:
            return
        span = _Span(row, depth, len(before))
        for node in made:
            # One list per node, in the node: what returns later is around what returned before, and begins first.
            metadata: Any = node.metadata  # a dict, whatever its type says
            spans = metadata.get(self)
            if spans is None:
                spans = metadata[self] = []
                node.register_prehook(lambda _, spans=spans: self._begin(spans))
            spans.append(span)
        for node in before:
            node.register_prehook(lambda _, span=span: self._input_reached(span))

    @harmless
    def _begin(self, spans: list[_Span]) -> None:
        if self._closed or torch.compiler.is_compiling() or not self._recorder.alive:
            return
        task = torch._C._current_graph_task_id()
        for span in reversed(spans):
            if span.task != task:
                self._begin_span(span, task)

    def _begin_span(self, span: _Span, task: int) -> None:
        self._recorder.hooks += 1
        under_way = self._passes.get(task)
        if under_way is None:
            under_way = self._passes[task] = []
            # The end of this pass ends what nothing else does.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._pass_done(task))
        span.lane = lane = self._watch.lane()
        for other in reversed(under_way[:]):
            if other.lane == lane and other.depth >= span.depth:
                self._end(other)
        span.task, span.left = task, span.inputs
        span.begun = self._clock.begin()
        under_way.append(span)

    @harmless
    def _input_reached(self, span: _Span) -> None:
        if span.task != torch._C._current_graph_task_id():
            return
        span.left -= 1
        if not span.left:
            self._end(span)

    @harmless
    def _pass_done(self, task: int) -> None:
        for span in reversed(self._passes.pop(task, [])):
            self._end(span)

    def _end(self, span: _Span) -> None:
        begun, span.begun = span.begun, None
        if begun is None or self._closed:
            return
        under_way = self._passes.get(span.task, [])
        for inner in reversed(under_way[:]):  # what is inside cannot outlive it
            if inner is span:
                under_way.remove(span)
                break
            if inner.lane == span.lane and inner.depth > span.depth:
                self._end(inner)
        self._clock.end(begun, Spanned(self._recorder, span.row, Phase.BACKWARD, span.lane, span.depth))
