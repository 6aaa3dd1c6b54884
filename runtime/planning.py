"""From a module and budgets to a draft: blocks, which of them stay where, and the rings the others pass through.

Several block sizes are tried, and `placer.py` places each; the draft that moves the fewest bytes per sweep wins, a
little in favour of fewer blocks. Everything here is arithmetic on sizes: nothing is read and nothing is allocated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from torch import nn

from ..memory.errors import UsageError
from ..memory.layout import ITEMSIZE
from ..scheduler.plan import Plan
from ..scheduler.weighing import Placed, weigh
from .backing import Backing
from .cutting import Cut, Cutter
from .experts.layers import find_expert_layers
from .experts.placed import ExpertCutter
from .layout import Budgets, Changing, Layout
from .overhead import Overhead
from .partition import embedding_only, limits, streamable, table_candidates
from .placer import Placer, all_stays
from .placing import TokenWork
from .replanning import check_experts, check_fits, check_rings, check_same, check_tables, residencies
from .shortfall import Shortfall
from .sweeptime import DEPTH, sweep_s

SHALLOWER: Final = (1, 2, 4)
"""Parts of DEPTH that are tried: where little is streamed, blocks that stay are worth more than a deep ring."""


class Planner:
    """Tries cuts of one module under given budgets."""

    def __init__(
        self,
        module: nn.Module,
        backing: Backing,
        budgets: Budgets,
        *,
        buffers_nbytes: int,
        keep_skew: bool,
        work: TokenWork | None = None,
        changing: Changing | None = None,
        beside_nbytes: int = 0,
        experts: bool = False,
    ) -> None:
        """Make one.

        Args:
            work: Says what a token costs; without it bytes are what counts.
            changing: It is to be trained, and that takes so much. No product is served by rows then: its gradient
                would have no place to go.
            beside_nbytes: Host memory to leave where the CPU computes blocks: for their keys and values.
            experts: Whether experts may be blocks of their own.
        """
        self.module = module
        self._changing = changing
        self.work = work
        self.budgets = budgets
        self.parameters = {name: p for name, p in streamable(module).items() if backing.holds(name)}
        self.sizes = {
            name: parameter.numel() * ITEMSIZE[backing.dtype(name)] for name, parameter in self.parameters.items()
        }
        found = find_expert_layers(module, self.sizes) if experts else None
        separate = budgets.device is not None
        self._experts = None
        if found is not None:
            self._experts = ExpertCutter(found, backing, separate=separate, keep_skew=keep_skew)
        self._cutter = Cutter(
            module,
            backing,
            self.parameters,
            self.sizes,
            separate=separate,
            keep_skew=keep_skew,
            experts=self._experts,
        )
        self._shortfall = Shortfall()
        self._overhead = Overhead(buffers_nbytes=buffers_nbytes, changing=changing)
        self._placer = Placer(
            budgets=budgets,
            overhead=self._overhead,
            shortfall=self._shortfall,
            work=work,
            beside_nbytes=beside_nbytes,
            preloaded=backing.preloaded,
        )

    def best(self) -> Layout:
        """The layout that moves the fewest bytes.

        Raises:
            DoesNotFitError: no layout fits.
        """
        return self._with_the_rest(*self._weighed(self._best()))

    def _weighed(self, plain: Layout) -> tuple[Layout, Overhead]:
        """The same blocks, with room for activations before weights and gradients where a step is shorter for it. Where
        all weights stay they still do for a room that is free beside them; for more, some stream."""
        weighing = None if self._changing is None else self._changing.weighing
        if weighing is None or self._changing is None or self._changing.frozen or self.budgets.device is not None:
            return plain, self._overhead
        free = max(0, self.budgets.host - plain.host_nbytes)
        made = self._cut(plain.limit_nbytes, set())
        found = {0: plain}

        def place(room: int) -> Placed | None:
            if plain.resident and room <= free:
                return Placed(streamed_nbytes=0.0, free_nbytes=free - room)
            if room not in found:
                placer = replace(self._placer, overhead=replace(self._overhead, before_nbytes=room))
                best = self._shortest(placer, made, SHALLOWER)
                if best is None:
                    return None
                found[room] = best
            left = max(0, self.budgets.host - found[room].host_nbytes)
            return Placed(streamed_nbytes=found[room].disk_nbytes, free_nbytes=left)

        before = weigh(weighing, place)
        room = before.nbytes if before is not None and before.nbytes in found else 0
        return replace(found[room], before=before), replace(self._overhead, before_nbytes=room)

    def _with_the_rest(self, layout: Layout, overhead: Overhead) -> Layout:
        """Give to gradients, activations and states what weights have left: a byte of weights that stays saves more."""
        if self._changing is None:
            return layout
        saved = self._changing.saved_nbytes
        saved = (sum(self.sizes.values()) if saved is None else saved) + self._changing.buffers_nbytes
        wanted = max(0, self._changing.more_nbytes + saved - overhead.before_nbytes)
        more = max(0, min(wanted, self.budgets.host - layout.host_nbytes))
        return replace(
            layout,
            own_host_nbytes=layout.own_host_nbytes + more,
            training_nbytes=overhead.training_nbytes(stays=all_stays(layout.front, layout.back)) + more,
            granted_nbytes=more + overhead.before_nbytes,
            all_granted=more == wanted,
            saved_nbytes=saved,
        )

    def _best(self) -> Layout:
        total = sum(self.sizes.values())
        fixed = None if self._changing is None else self._changing.limit_nbytes
        whole = self._try(max(total // 8, 1) if fixed is None else fixed, set())
        if whole is not None and whole.resident:
            return whole
        found = self._with_experts(max(total // 8, 1))
        if not found:
            tried = limits(self.module, self.sizes) if fixed is None else ()
            found = [layout for limit in tried if (layout := self._try_limit(limit)) is not None]
            if whole is not None:
                found.append(whole)
        if not found:
            raise self._shortfall.error(self.budgets)
        by_time = any(layout.token_s is not None for layout in found)  # which no weighing of bytes can be compared with
        return min(
            found,
            key=lambda layout: (not layout.resident, by_time and layout.token_s is None, sweep_s(layout, self.budgets)),
        )

    def _with_experts(self, limit: int) -> list[Layout]:
        """Layouts in which experts are blocks of their own: none where that cannot be, or does not fit."""
        if self._experts is None:
            return []
        rest = {name: nbytes for name, nbytes in self.sizes.items() if name not in self._experts.names}
        tried = [self._try_limit(each, experts=True) for each in limits(self.module, rest)]
        return [layout for layout in (*tried, self._try(limit, set(), experts=True)) if layout is not None]

    def _try_limit(self, limit: int, *, experts: bool = False) -> Layout | None:
        lookups = embedding_only(self.module)
        tables = {
            name
            for name in self._table_candidates(lookups)
            if name in self.sizes
            and (self.sizes[name] > limit or (name in lookups and self.sizes[name] > 2**20))
            and len(self.parameters[name].shape) == 2
            and self.parameters[name].shape[0] > 1
        }
        return self._try(limit, tables, experts=experts)

    def _table_candidates(self, lookups: set[str]) -> set[str]:
        """None where weights are trained. Where they are frozen, what is looked up: no gradient goes through it."""
        if self._changing is None:
            return table_candidates(self.module)
        return lookups if self._changing.frozen else set()

    def _try(self, limit: int, tables: set[str], *, experts: bool = False) -> Layout | None:
        if self._changing is not None:
            limit = min(limit, self._changing.block_nbytes)
        made = self._cut(limit, tables, experts=experts)
        parts = SHALLOWER if self.work is None else SHALLOWER[:1]  # placing tries shallower rings itself
        return self._shortest(self._placer, made, parts)

    def _shortest(self, placer: Placer, made: Cut, parts: tuple[int, ...]) -> Layout | None:
        """The layout of a cut with the shortest sweep, among rings of these parts of DEPTH; None where none fits."""
        placed = [placer.place(made, DEPTH // part) for part in parts]
        return min(
            (layout for layout in placed if layout is not None),
            key=lambda layout: sweep_s(layout, self.budgets),
            default=None,
        )

    def as_planned(self, plan: Plan) -> Layout:
        """The layout that a plan describes, perhaps one that was edited.

        Raises:
            UsageError: it is a plan for another model, or one that cannot be carried out.
            DoesNotFitError: it takes more than the budgets.
        """
        lookups = embedding_only(self.module)
        rows = {
            name: self.sizes[name] // max(self.parameters[name].shape[0], 1)
            for name in plan.tables
            if name in self.sizes and name not in lookups and self.parameters[name].dim() == 2
        }
        check_tables(plan, self.parameters, rows)
        made = self._cut(plan.limit_nbytes, set(plan.tables), experts=self._asks_for_experts(plan))
        check_same(plan, made.blocks)
        check_experts(plan, made.experts)
        small = made.blocks[0]
        front, back = residencies(plan, made.blocks, separate=self.budgets.device is not None)
        if small.id not in front.resident:
            raise UsageError("the plan has block 0 streamed: it holds the small tensors, which always stay")
        front, back = check_rings(made.others, front, back, min_slots=made.min_slots)
        layout = self._placer.layout(made, front, back)
        if made.experts is not None:
            stays = back is not None and made.blocks[-1].id in back.resident
            given = replace(
                made.experts,
                capacity=plan.expert_slots,
                passing=plan.expert_passing,
                host_capacity=made.experts.routing.total if stays else plan.expert_host_slots,
                host_has_all=stays,
            )
            layout = replace(layout, experts=given)
        check_fits(layout, self.budgets)
        return replace(layout, on_cpu={b.id: b.cpu_rows_below for b in plan.blocks if b.cpu_rows_below})

    def _asks_for_experts(self, plan: Plan) -> bool:
        """Whether a plan has experts as blocks of their own.

        Raises:
            UsageError: it has, and this model or this device has not, or none of them could pass through.
        """
        if plan.expert_blocks and not plan.expert_passing:
            raise UsageError("the plan has expert_passing of 0: at least one expert must be able to pass through")
        if plan.expert_passing and self._experts is None:
            raise UsageError(
                "the plan has experts as blocks of their own, which this model has not, or not on this device: make a "
                "plan for this model and device"
            )
        return plan.expert_passing > 0

    def _cut(self, limit: int, tables: set[str], *, experts: bool = False) -> Cut:
        made = self._cutter.cut(limit, tables, experts=experts)
        if not tables and not experts:
            own = self._overhead.host_nbytes(made.staging_nbytes, stays=True)
            if self.budgets.device is not None:
                own = self._overhead.device_nbytes
            self._shortfall.resident(sum(block.front_nbytes for block in made.blocks) + own)
        return made
