"""Torch calls that use parameters which are not there: they are given the real bytes, or rows of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..scheduler.lease import Lease
from .intercept import is_linear, rows_wanted
from .operands import copy_in_place_of, folded, swap, unfolded
from .tables import Table
from .views import aliases

if TYPE_CHECKING:
    from .session import Session


class StrayUses:
    """Serves such calls of one model.

    Args:
        session: Runs it, and lends its blocks.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._homes: dict[int, int | Table] = {id(table.parameter): table for table in session.tables.values()}
        """By id of each parameter: its block, or the table that serves it."""
        for binding in session.bindings.values():
            for bound in binding.tensors:
                self._homes.setdefault(id(bound.parameter), binding.block)  # pieces of a table stay the table's

    def call(
        self, missing: list[nn.Parameter], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a torch call that uses parameters which are not there (called by the interception)."""
        for parameter in missing:
            home = self._homes.get(id(parameter))
            if isinstance(home, Table):
                return self._call_table(home, func, args, kwargs)
        session = self._session
        leases: list[Lease] = []
        try:
            for block in dict.fromkeys(h for p in missing if isinstance(h := self._homes.get(id(p)), int)):
                leases.append(session.lend(block))
                session.bring_up_to_date(block)
            result = func(*args, **kwargs)
            # a view was taken: it must stay valid until the module that took it returns
            if aliases(result, session.base):
                if session.keep(leases):
                    leases = []
                else:
                    copies = {id(p): copy_in_place_of(p) for p in missing}
                    result = func(*(swap(v, copies) for v in args), **{k: swap(v, copies) for k, v in kwargs.items()})
            return result
        finally:
            session.release(leases)

    def _call_table(self, table: Table, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph = table.of_experts and torch.is_grad_enabled()
        rows = rows_wanted(func, args, kwargs)
        if rows is not None and not (graph and table.parameter.requires_grad):  # what is looked up has no history
            return table.lookup(rows, wrap=func is torch.Tensor.__getitem__)
        if is_linear(func):
            x = args[0] if args else kwargs["input"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight is table.parameter and not isinstance(bias, self._session.absent_class):
                product = self._product(table, x, bias)
                if product is not None:
                    return product
        whole = self._session.saved.gathered(table) if graph else table.whole()
        swapped = [swap(value, {id(table.parameter): whole}) for value in args]
        named = {name: swap(value, {id(table.parameter): whole}) for name, value in kwargs.items()}
        return func(*swapped, **named)  # another table may be among the arguments: torch finds it

    def _product(self, table: Table, whole_x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """A product with a table, piece by piece; None where that would not give the bits of the whole."""
        session = self._session
        on_cpu, x = session.on_cpu, whole_x
        if session.pretrained or table.parameter.requires_grad:
            x = folded(x, bias)
        inside = bias if x is whole_x else None
        served = on_cpu is not None and on_cpu.serves(table, x)
        together = session.in_sweep and bool(table.pieces)  # a sweep is equal to rounding
        if not (served or together or table.splits(x, biased=inside is not None)):
            return None
        elsewhere = None if on_cpu is None else on_cpu.product(x, inside)
        return unfolded(table.product(x, inside, self._lend_piece, elsewhere), whole_x, bias)

    def _lend_piece(self, block: int) -> tuple[torch.Tensor, Callable[[], None]]:
        session = self._session
        lease = session.acquire(block)
        try:
            session.device.compute_waits(lease.residence.event)
            binding = session.bindings[block]
            view = binding.views(session.arena, lease.residence.slot)[0].detach()
            view.requires_grad_(binding.tensors[0].parameter.requires_grad)
        except BaseException:
            session.give_back(lease, None)
            raise
        return view, lambda: session.give_back(lease, session.device.computed())
