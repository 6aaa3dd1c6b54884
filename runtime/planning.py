"""From a module and budgets to a draft: blocks, which of them stay where, and the rings the others pass through.

Several block sizes are tried; the draft that moves the fewest bytes per sweep wins, a little in favour of fewer blocks.
Everything here is arithmetic on sizes: nothing is read and nothing is allocated.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..memory.disk import DiskEngine
from ..memory.errors import DoesNotFitError, UsageError
from ..memory.layout import ITEMSIZE
from ..scheduler.plan import Plan
from ..scheduler.residency import Residency, Sized, choose_residency, smallest_budget
from ..scheduler.sharing import spread
from ..scheduler.weighing import Placed, weigh
from .backing import Backing
from .cutting import Cut, Cutter
from .experts.layers import find_expert_layers
from .experts.placed import ExpertCutter, PlacedExperts
from .layout import Budgets, Changing, Draft, Layout
from .partition import embedding_only, limits, streamable, table_candidates
from .placing import TokenWork, cpu_pays, place_on_tiers
from .replanning import check_experts, check_fits, check_rings, check_same, check_tables, residencies

DEPTH = 96 * 2**20
"""Bytes of ring, besides the block in use, that keep a drive busy: 8 requests of 4 MiB under way, the rest ready."""
BLOCK_OVERHEAD_S = 1e-4
SHALLOWER = (1, 2, 4)
"""Parts of DEPTH that are tried: where little is streamed, blocks that stay are worth more than a deep ring."""
SHALLOW_COST = 0.15
"""What a sweep loses, at most, to a ring too short to keep the link busy; an estimate that only ranks drafts."""


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
        self._beside_nbytes = beside_nbytes
        self.module = module
        self._changing = changing
        self._own_device = 0 if changing is None else changing.own_device_nbytes
        self._before = 0
        """Host memory that activations have before weights, where not all of these stay."""
        self.work = work
        self.backing = backing
        self.budgets = budgets
        self.buffers_nbytes = buffers_nbytes
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
        self._needs: dict[str, list[int]] = {"device": [], "host": []}
        """By tier: the smallest budgets of cuts that did not fit."""
        self._all_nbytes = sys.maxsize
        """The smallest budget under which some cut is resident as a whole."""

    def best(self) -> Layout:
        """The layout that moves the fewest bytes.

        Raises:
            DoesNotFitError: no layout fits.
        """
        return self._with_the_rest(self._weighed(self._best()))

    def _weighed(self, plain: Layout) -> Layout:
        """The same blocks, with room for activations before weights and gradients where a step is shorter for it. Where
        all weights stay they still do for a room that is free beside them; for more, some stream."""
        weighing = None if self._changing is None else self._changing.weighing
        if weighing is None or self.budgets.device is not None:
            return plain
        free = max(0, self.budgets.host - plain.host_nbytes)
        made = self._cut(plain.limit_nbytes, set())
        found = {0: plain}

        def place(room: int) -> Placed | None:
            if plain.resident and room <= free:
                return Placed(streamed_nbytes=0.0, free_nbytes=free - room)
            if room not in found:
                self._before = room
                placed = [self._place(made, DEPTH // part) for part in SHALLOWER]
                fits = [layout for layout in placed if layout is not None]
                if not fits:
                    return None
                found[room] = min(fits, key=self._seconds)
            left = max(0, self.budgets.host - found[room].host_nbytes)
            return Placed(streamed_nbytes=found[room].disk_nbytes, free_nbytes=left)

        before = weigh(weighing, place)
        self._before = before.nbytes if before is not None and before.nbytes in found else 0
        return replace(found[self._before], before=before)

    def _with_the_rest(self, layout: Layout) -> Layout:
        """Give to gradients, activations and states what weights have left: a byte of weights that stays saves more."""
        if self._changing is None:
            return layout
        saved = self._changing.saved_nbytes
        saved = (sum(self.sizes.values()) if saved is None else saved) + self._changing.buffers_nbytes
        wanted = max(0, self._changing.more_nbytes + saved - self._before)
        more = max(0, min(wanted, self.budgets.host - layout.host_nbytes))
        return replace(
            layout,
            own_host_nbytes=layout.own_host_nbytes + more,
            training_nbytes=self._training_nbytes(stays=_all_stays(layout.front, layout.back)) + more,
            granted_nbytes=more + self._before,
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
            raise self._does_not_fit()
        by_time = any(layout.token_s is not None for layout in found)  # which no weighing of bytes can be compared with
        return min(
            found,
            key=lambda layout: (not layout.resident, by_time and layout.token_s is None, self._seconds(layout)),
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
        placed = [self._place(made, DEPTH // part) for part in parts]
        return min((layout for layout in placed if layout is not None), key=self._seconds, default=None)

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
        layout = self._layout(made, front, back)
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
            own = self._own_device if self.budgets.device is not None else self._own(made.staging_nbytes, stays=True)
            self._all_nbytes = min(self._all_nbytes, sum(block.front_nbytes for block in made.blocks) + own)
        return made

    def _place(self, made: Cut, depth: int) -> Layout | None:
        if made.experts is not None:
            place = self._place_experts if self.budgets.device is None else self._place_experts_apart
            return place(made, made.experts, depth)
        found = self._on_tiers(made, depth)
        if found is None:
            return None
        front, back, token_s = found
        return replace(self._layout(made, front, back), token_s=token_s)

    def _on_tiers(
        self, made: Cut, depth: int, *, device_kept: int = 0, host_kept: int = 0, passing_nbytes: int = 0
    ) -> tuple[Residency, Residency | None, float | None] | None:
        """Where all blocks but those of experts go, and what a token takes, if that is what they are placed by.

        Args:
            made: The blocks.
            depth: Bytes that keep a link busy.
            device_kept: Bytes of a device apart that are experts'.
            host_kept: Bytes of the host's, above it.
            passing_nbytes: The largest of what passes through the host beside these blocks.
        """
        blocks, small = made.others, made.others[0]
        placed = self._placed(made, depth, device_kept, host_kept, passing_nbytes)
        if placed is not None:
            return placed
        own, worth = self._own(made.staging_nbytes), made.worth
        if self.budgets.device is None:
            without = self._own(made.staging_nbytes, stays=True)
            if sum(block.front_nbytes for block in blocks) + without + self._before <= self.budgets.host:
                own = without
        front_own, front_budget = own, self.budgets.host
        if self.budgets.device is not None:
            front_own, front_budget = self._own_device + device_kept, self.budgets.device
        found = self._front(blocks[1:], small, front_budget - front_own, made.min_slots, front_own, worth, depth)
        if found is None:
            return None
        if self.budgets.device is None:
            return found, None, None
        passing = [block for block in blocks if block.id in found.resident]
        streamed = [block for block in blocks if block.id not in found.resident]
        transit = max(passing_nbytes, *(block.image.nbytes for block in passing), 0)
        own += host_kept
        room = self.budgets.host - own
        changes = self._changing is not None and self._changing.weights_change
        if changes and sum(block.image.nbytes for block in blocks) <= room:
            streamed, passing, transit = blocks, [], 0  # all have homes in host memory, and nothing passes through
        kept = self._back(streamed, room, transit, own, worth, depth)
        if kept is not None and changes:
            kept = _with_homes(kept, passing, room)
        return None if kept is None else (found, kept, None)

    def _place_experts(self, made: Cut, experts: PlacedExperts, depth: int) -> Layout | None:
        """What every token uses first: a byte of it that stays saves a byte per token, one of an expert's less. Experts
        have what is left, and some slots to pass through in any case."""
        small, own = made.others[0], self._own(made.staging_nbytes)
        room = self.budgets.host - own
        for passing in experts.choices(room, DEPTH):
            kept = passing * experts.each_nbytes
            found = self._front(made.others[1:], small, room - kept, made.min_slots, own + kept, made.worth, depth)
            if found is not None:
                given = experts.given(room=room - found.nbytes, passing=passing)
                return replace(self._layout(made, found, None), experts=given)
        return None

    def _place_experts_apart(self, made: Cut, experts: PlacedExperts, depth: int) -> Layout | None:
        """The same with a device apart, which computes: its memory has what every token uses first, then experts. Host
        memory has all experts, if it can, as blocks that stay; else as many as it has room for, and a ring through
        which the others pass."""
        assert self.budgets.device is not None
        own = self._own(made.staging_nbytes)
        blocks = made.blocks[experts.first :]
        largest = max(experts.host_slot_nbytes)
        for passing in experts.choices(self.budgets.device - self._own_device, DEPTH):
            kept = passing * experts.each_nbytes
            found = self._on_tiers(made, depth, device_kept=kept, passing_nbytes=largest)
            if found is None:
                continue
            front, back, token_s = found
            assert back is not None, "a device apart has the host below it"
            room = self.budgets.device - self._own_device - front.nbytes
            left = self.budgets.host - own - back.nbytes
            if token_s is not None and self.work is not None and cpu_pays(made.others[1:], self.work):
                left = max(left - self._beside_nbytes - made.others[0].image.data_nbytes, 0)  # see `_placed`
            given = experts.given(room=room, passing=passing, host_room=left)
            nbytes = sum(block.image.nbytes for block in blocks)
            if nbytes <= left and not self.backing.preloaded:  # those of a built module go to scratch files
                given = replace(given, host_capacity=experts.routing.total, host_has_all=True)
                everything = back.resident | {block.id for block in blocks}
                back = replace(back, resident=everything, resident_nbytes=back.resident_nbytes + nbytes)
            else:
                back, left = _deeper(back, largest, left, wanted=len(experts.host_slot_nbytes) * passing)
                given = experts.given(room=room, passing=passing, host_room=left)
            return replace(self._layout(made, front, back), token_s=token_s, experts=given)
        return None

    def _layout(self, made: Cut, front: Residency, back: Residency | None) -> Layout:
        for block in made.others:
            assert block.id in front.resident or block.front_nbytes <= front.slot_nbytes, f"{block.name} fits no slot"
            passes = back is not None and block.id not in back.resident
            assert not passes or (back is not None and block.image.nbytes <= back.slot_nbytes), (
                f"{block.name} fits none"
            )
        return Layout(
            blocks=tuple(made.blocks),
            leases=made.leases,
            expected=made.expected,
            uses={block: count for block, count in made.counts.items() if count > 1},
            seldom=made.seldom,
            tables=made.pieces,
            front=front,
            back=back,
            spare_slots=max(0, front.slots - made.min_slots),
            staging_nbytes=max(made.staging_nbytes, 4096),
            own_host_nbytes=self._own(made.staging_nbytes, stays=_all_stays(front, back)),
            own_device_nbytes=self._own_device,
            limit_nbytes=made.limit_nbytes,
        )

    def _placed(
        self, made: Cut, depth: int, device_kept: int, host_kept: int, passing_nbytes: int
    ) -> tuple[Residency, Residency, float] | None:
        """Both tiers at once, by what a token costs; None where that is not known, or all fits the device. Arguments as
        of `_on_tiers`."""
        device, small, blocks = self.budgets.device, made.others[0], made.others[1:]
        if self.work is None or device is None:
            return None
        room = device - device_kept - small.front_nbytes
        if sum(block.front_nbytes for block in blocks) <= room:
            return None
        host = self.budgets.host - host_kept - self._own(made.staging_nbytes)
        if cpu_pays(blocks, self.work):  # which needs copies of the small tensors, too
            host -= self._beside_nbytes + small.image.data_nbytes
        found = place_on_tiers(
            blocks,
            work=self.work,
            device_nbytes=room,
            host_nbytes=host,
            worth=made.worth,
            min_slots=made.min_slots,
            depth_nbytes=depth,
            disk_rate=self.budgets.disk_rate,
            passing_nbytes=max(small.image.nbytes, passing_nbytes),
        )
        if found is None:
            return None
        front, back, token_s = found
        kept, nbytes = front.resident | {small.id}, front.resident_nbytes + small.front_nbytes
        return replace(front, resident=kept, resident_nbytes=nbytes), back, token_s

    def _training_nbytes(self, *, stays: bool) -> int:
        """What training takes of host memory at least."""
        changing = self._changing
        if changing is None:
            return 0
        return changing.own_nbytes + (-changing.moving_nbytes if stays else self._before)

    def _own(self, staging: int, *, stays: bool = False) -> int:
        """Host memory besides the arena; `stays`: where all weights are in it."""
        return (
            self._training_nbytes(stays=stays)
            + self.buffers_nbytes
            + (DiskEngine.own_nbytes(staging) if staging else 0)
        )

    def _front(
        self,
        blocks: list[Draft],
        small: Draft,
        budget: int,
        min_slots: int,
        own: int,
        worth: Mapping[int, float],
        depth: int,
    ) -> Residency | None:
        on_device = self.budgets.device is not None
        sized = [
            Sized(
                id=block.id,
                nbytes=block.front_nbytes,
                cost_nbytes=worth.get(block.id, 1.0)
                * (block.image.data_nbytes if on_device else block.image.read_nbytes),
                uses=worth.get(block.id, 1.0),
            )
            for block in blocks
        ]
        room = budget - small.front_nbytes
        found = choose_residency(sized, room, min_slots=min_slots, depth_nbytes=min(depth, max(0, room) // 8))
        if found is None:
            needed = smallest_budget(sized, min_slots=min_slots) + small.front_nbytes
            self._needs["device" if on_device else "host"].append(needed + own)
            return None
        return Residency(
            resident=found.resident | {small.id},
            slot_nbytes=found.slot_nbytes,
            slots=found.slots,
            resident_nbytes=found.resident_nbytes + small.front_nbytes,
            streamed_nbytes=found.streamed_nbytes,
        )

    def _back(
        self, blocks: list[Draft], budget: int, transit: int, own: int, worth: Mapping[int, float], depth: int
    ) -> Residency | None:
        sized = [
            Sized(id=b.id, nbytes=b.image.nbytes, cost_nbytes=times * b.image.read_nbytes, uses=times)
            for b in blocks
            for times in (worth.get(b.id, 1.0),)
        ]
        depth = min(depth, max(0, budget) // 4)
        found = choose_residency(sized, budget, min_slots=2, depth_nbytes=depth, transit_nbytes=transit)
        if found is None:
            self._needs["host"].append(smallest_budget(sized, min_slots=2, transit_nbytes=transit) + own)
        return found

    def _seconds(self, layout: Layout) -> float:
        if layout.token_s is not None:
            return layout.token_s
        streamed = sum(layout.per_token(block) for block in layout.streamed())
        disk = sum(layout.reads_per_token(b) * b.image.read_nbytes for b in layout.on_disk()) / self.budgets.disk_rate
        copied = sum(layout.per_token(b) * b.image.data_nbytes for b in layout.streamed()) if layout.back else 0
        link = copied / self.budgets.link_rate
        front, back = layout.front, layout.back
        device, host = self.budgets.device, self.budgets.host
        if back is None or device is None:
            moved = disk * (1 + _shallowness(front, host // 8))
        else:
            moved = max(disk * (1 + _shallowness(back, host // 4)), link * (1 + _shallowness(front, device // 8)))
        return moved + streamed * BLOCK_OVERHEAD_S

    def _does_not_fit(self) -> DoesNotFitError:
        # a cut that got as far as the host tier fits the device
        tier = "host" if self._needs["host"] else "device"
        needed = min(self._needs[tier])
        budget = self.budgets.host if tier == "host" else self.budgets.device or 0
        return DoesNotFitError(
            f"the model needs at least {needed} bytes ({needed / 2**20:.1f} MiB) of {tier} memory to run, even "
            f"streamed; the budget is {budget} bytes ({budget / 2**20:.1f} MiB). Raise it: "
            f"max_memory={{{tier!r}: {needed}}} (--max-memory {tier}={-(-needed // 2**20)}MiB)",
            tier=tier,
            needed_nbytes=needed,
            available_nbytes=budget,
            resident_nbytes=self._all_nbytes,
        )


def _all_stays(front: Residency, back: Residency | None) -> bool:
    """Whether all weights stay in host memory, which is what computes."""
    return back is None and not front.slots


def _with_homes(back: Residency, on_device: list[Draft], budget: int) -> Residency:
    """The host's tier with homes for blocks that stay on the device, as far as there is room.

    Where weights change, that is where new ones come to; else they are written to disk and read again, each step. What
    passes through the host is worth more, and has been placed before.
    """
    left = budget - back.nbytes
    homes = []
    for place in spread(len(on_device)):
        if on_device[place].image.nbytes <= left:
            homes.append(on_device[place])
            left -= on_device[place].image.nbytes
    return replace(
        back,
        resident=back.resident | {block.id for block in homes},
        resident_nbytes=back.resident_nbytes + sum(block.image.nbytes for block in homes),
    )


def _deeper(back: Residency, slot_nbytes: int, room: int, *, wanted: int) -> tuple[Residency, int]:
    """A host's ring that experts pass through, with more slots for them if there is room, and what is left of it then:
    half of it is left to what stays."""
    slot = max(back.slot_nbytes, slot_nbytes)
    more = max(0, min(wanted + 1 - back.slots, room // 2 // slot))
    deeper = replace(back, slot_nbytes=slot, slots=back.slots + more)
    return deeper, room - (deeper.nbytes - back.nbytes)


def _shallowness(ring: Residency, affordable: int) -> float:
    """The part of its time that a link loses to a ring that is shorter than it would have to be to keep it busy."""
    wanted = min(DEPTH, affordable)
    ahead = (ring.slots - 1) * ring.slot_nbytes  # one is in use
    return SHALLOW_COST * max(0.0, 1 - ahead / wanted) if ring.slots and wanted > 0 else 0.0
