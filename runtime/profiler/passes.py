"""What flows through a backward pass: gradients that one node has made and another one has not used up yet.

A pass that is looked at has a hook on each node for as long as it runs. The hook is called after the node, with what it
made, and changes nothing. What a node made lay in memory since about when the node before it was done.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from .backward import BackwardWatch
from .flights import Flights
from .guard import harmless
from .recorder import Recorder
from .schema import Category

_autograd: Final[Any] = torch.autograd  # torch leaves some of it untyped
MOST_NODES: Final = 20_000
"""Of a larger graph only so many, those nearest to the loss, are looked at."""


@dataclass(kw_only=True, slots=True)
class _Pass:
    """One that is under way."""

    last: int
    """When a node of it was done last, or it began."""


class PassWatch:
    """Sees the backward passes that begin while it is entered, wherever `backward()` or `grad()` is called.

    Args:
        backward: Tells which module's backward runs.
    """

    def __init__(self, recorder: Recorder, flights: Flights, backward: BackwardWatch) -> None:
        self._recorder = recorder
        self._flights = flights
        self._backward = backward
        self._rows: dict[str, int] = {}
        """Of nodes that are of no module, as those of a loss: by name."""

    def __enter__(self) -> PassWatch:
        self._run = _autograd._engine_run_backward
        _autograd._engine_run_backward = self._mine = self._watched
        return self

    def __exit__(self, *failure: object) -> None:
        if _autograd._engine_run_backward is self._mine:
            _autograd._engine_run_backward = self._run

    def _watched(self, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        handles = self._hook(outputs) if self._flights.looking and self._recorder.alive else None
        try:
            return self._run(outputs, *args, **kwargs)
        finally:
            for handle in handles or ():
                handle.remove()

    @harmless
    def _hook(self, outputs: Sequence[Any]) -> list[Any]:
        """Put a hook on every node; their handles."""
        if torch.compiler.is_compiling() or _compiles_backward():
            return []
        start = self._recorder.clock()
        under_way = _Pass(last=start)
        handles = [
            node.register_hook(functools.partial(self._done, under_way, node.name())) for node in _nodes(outputs)
        ]
        under_way.last = self._recorder.clock()
        self._flights.spent_ns += 2 * (under_way.last - start)  # taking the hooks off again takes as long
        return handles

    @harmless
    def _done(self, under_way: _Pass, name: str, made: Sequence[torch.Tensor | None], given: object) -> None:
        if not self._flights.looking or not self._recorder.alive:
            return
        row = self._backward.current()
        if row < 0:
            known = self._rows.get(name)
            row = self._rows[name] = self._recorder.module(path=f"({name})", kind=name) if known is None else known
        self._recorder.hooks += 1
        self._flights.see(made, Category.GRADIENT, row, under_way.last)
        under_way.last = self._recorder.clock()


def _nodes(outputs: Sequence[Any]) -> Iterator[Any]:
    """The nodes behind these tensors (or edges of the graph) that make gradients for others, nearest first."""
    reached = [node for output in outputs if (node := getattr(output, "grad_fn", getattr(output, "node", None)))]
    seen = set(reached)
    for node in reached:  # it grows meanwhile
        following = [after for after, _ in node.next_functions if after is not None]
        if following:
            yield node
        for after in following:
            if after not in seen and len(reached) < MOST_NODES:
                seen.add(after)
                reached.append(after)


def _compiles_backward() -> bool:
    """Whether torch is told to compile backward passes: it would compile our hooks with them."""
    compiled: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(compiled, "compiled_autograd_enabled", False))
