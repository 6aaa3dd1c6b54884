"""Homes for the blocks of one cut, on one tier or two, and the rings that the others pass through.

Everything here is arithmetic on sizes: nothing is read and nothing is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..scheduler.residency import Residency, Sized, choose_residency, smallest_budget
from ..scheduler.sharing import spread
from .cutting import Cut
from .experts.placed import PlacedExperts
from .layout import Budgets, Draft, Layout
from .overhead import Overhead
from .placing import TokenWork, cpu_pays, place_on_tiers
from .shortfall import Shortfall
from .sweeptime import DEPTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Placer:
    """Places cuts of one module under given budgets."""

    budgets: Budgets
    overhead: Overhead
    """What is not for blocks."""
    shortfall: Shortfall
    """Is told of cuts that do not fit."""
    work: TokenWork | None
    """Says what a token costs; without it bytes are what counts."""
    beside_nbytes: int
    """Host memory to leave where the CPU computes blocks: for their keys and values."""
    preloaded: bool
    """Whether the module has been built: what of its experts does not stay goes to scratch files."""

    def place(self, made: Cut, depth: int) -> Layout | None:
        """The layout of a cut; None where it does not fit.

        Args:
            made: The blocks.
            depth: Bytes of ring that keep a link busy.
        """
        if made.experts is not None:
            place = self._place_experts if self.budgets.device is None else self._place_experts_apart
            return place(made, made.experts, depth)
        found = self._on_tiers(made, depth)
        if found is None:
            return None
        front, back, token_s = found
        return replace(self.layout(made, front, back), token_s=token_s)

    def _on_tiers(
        self, made: Cut, depth: int, *, device_kept: int = 0, passing_nbytes: int = 0
    ) -> tuple[Residency, Residency | None, float | None] | None:
        """Where all blocks but those of experts go, and what a token takes, if that is what they are placed by.

        Args:
            made: The blocks.
            depth: Bytes that keep a link busy.
            device_kept: Bytes of a device apart that are experts'.
            passing_nbytes: The largest of what passes through the host beside these blocks.
        """
        placed = self._by_time(made, depth, device_kept, passing_nbytes)
        if placed is not None:
            return placed
        if self.budgets.device is None:
            found = self._front(made, self._own_of_one_tier(made), depth)
            return None if found is None else (found, None, None)
        found = self._front(made, self.overhead.device_nbytes + device_kept, depth)
        kept = None if found is None else self._below(made, found, depth, passing_nbytes)
        return None if found is None or kept is None else (found, kept, None)

    def _by_time(
        self, made: Cut, depth: int, device_kept: int, passing_nbytes: int
    ) -> tuple[Residency, Residency, float] | None:
        """Both tiers at once, by what a token costs; None where that is not known, or all fits the device. Arguments as
        of `_on_tiers`."""
        device, small, blocks = self.budgets.device, made.others[0], made.others[1:]
        if self.work is None or device is None:
            return None
        room = device - device_kept - small.front_nbytes
        if sum(block.front_nbytes for block in blocks) <= room:
            return None
        host = self.budgets.host - self.overhead.host_nbytes(made.staging_nbytes)
        if cpu_pays(blocks, self.work):  # which needs copies of the small tensors, too
            host -= self.beside_nbytes + small.image.data_nbytes
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

    def _own_of_one_tier(self, made: Cut) -> int:
        """What is not for blocks where the host computes: less, if all of them stay."""
        all_nbytes = sum(block.front_nbytes for block in made.others)
        without = self.overhead.host_nbytes(made.staging_nbytes, stays=True)
        if all_nbytes + without + self.overhead.before_nbytes <= self.budgets.host:
            return without
        return self.overhead.host_nbytes(made.staging_nbytes)

    def _front(self, made: Cut, own: int, depth: int) -> Residency | None:
        """What stays on the tier that computes, of whose budget `own` bytes are for something else."""
        device, small, worth = self.budgets.device, made.others[0], made.worth
        sized = [
            Sized(
                id=block.id,
                nbytes=block.front_nbytes,
                cost_nbytes=worth.get(block.id, 1.0)
                * (block.image.read_nbytes if device is None else block.image.data_nbytes),
                uses=worth.get(block.id, 1.0),
            )
            for block in made.others[1:]
        ]
        room = (self.budgets.host if device is None else device) - own - small.front_nbytes
        found = choose_residency(sized, room, min_slots=made.min_slots, depth_nbytes=min(depth, max(0, room) // 8))
        if found is None:
            needed = smallest_budget(sized, min_slots=made.min_slots) + small.front_nbytes
            self.shortfall.add("host" if device is None else "device", needed + own)
            return None
        return replace(
            found,
            resident=found.resident | {small.id},
            resident_nbytes=found.resident_nbytes + small.front_nbytes,
        )

    def _below(self, made: Cut, front: Residency, depth: int, passing_nbytes: int) -> Residency | None:
        """What stays in host memory, below a device apart that has `front`. Other arguments as of `_on_tiers`."""
        own, blocks = self.overhead.host_nbytes(made.staging_nbytes), made.others
        passing = [block for block in blocks if block.id in front.resident]
        streamed = [block for block in blocks if block.id not in front.resident]
        transit = max(passing_nbytes, *(block.image.nbytes for block in passing), 0)
        room = self.budgets.host - own
        changes = self.overhead.changing is not None and self.overhead.changing.weights_change
        if changes and sum(block.image.nbytes for block in blocks) <= room:
            streamed, passing, transit = blocks, [], 0  # all have homes in host memory, and nothing passes through
        worth = made.worth
        sized = [
            Sized(id=b.id, nbytes=b.image.nbytes, cost_nbytes=times * b.image.read_nbytes, uses=times)
            for b in streamed
            for times in (worth.get(b.id, 1.0),)
        ]
        depth = min(depth, max(0, room) // 4)
        found = choose_residency(sized, room, min_slots=2, depth_nbytes=depth, transit_nbytes=transit)
        if found is None:
            self.shortfall.add("host", smallest_budget(sized, min_slots=2, transit_nbytes=transit) + own)
            return None
        return _with_homes(found, passing, room) if changes else found

    def _place_experts(self, made: Cut, experts: PlacedExperts, depth: int) -> Layout | None:
        """What every token uses first: a byte of it that stays saves a byte per token, one of an expert's less. Experts
        have what is left, and some slots to pass through in any case."""
        own = self.overhead.host_nbytes(made.staging_nbytes)
        room = self.budgets.host - own
        for passing in experts.choices(room, DEPTH):
            kept = passing * experts.each_nbytes
            found = self._front(made, own + kept, depth)
            if found is not None:
                given = experts.given(room=room - found.nbytes, passing=passing)
                return replace(self.layout(made, found, None), experts=given)
        return None

    def _place_experts_apart(self, made: Cut, experts: PlacedExperts, depth: int) -> Layout | None:
        """The same with a device apart, which computes: its memory has what every token uses first, then experts. Host
        memory has all experts, if it can, as blocks that stay; else as many as it has room for, and a ring through
        which the others pass."""
        assert self.budgets.device is not None
        own = self.overhead.host_nbytes(made.staging_nbytes)
        blocks = made.blocks[experts.first :]
        largest = max(experts.host_slot_nbytes)
        for passing in experts.choices(self.budgets.device - self.overhead.device_nbytes, DEPTH):
            kept = passing * experts.each_nbytes
            found = self._on_tiers(made, depth, device_kept=kept, passing_nbytes=largest)
            if found is None:
                continue
            front, back, token_s = found
            assert back is not None, "a device apart has the host below it"
            room = self.budgets.device - self.overhead.device_nbytes - front.nbytes
            left = self.budgets.host - own - back.nbytes
            if token_s is not None and self.work is not None and cpu_pays(made.others[1:], self.work):
                left = max(left - self.beside_nbytes - made.others[0].image.data_nbytes, 0)  # see `_by_time`
            given = experts.given(room=room, passing=passing, host_room=left)
            nbytes = sum(block.image.nbytes for block in blocks)
            if nbytes <= left and not self.preloaded:  # those of a built module go to scratch files
                given = replace(given, host_capacity=experts.routing.total, host_has_all=True)
                everything = back.resident | {block.id for block in blocks}
                back = replace(back, resident=everything, resident_nbytes=back.resident_nbytes + nbytes)
            else:
                back, left = _deeper(back, largest, left, wanted=len(experts.host_slot_nbytes) * passing)
                given = experts.given(room=room, passing=passing, host_room=left)
            return replace(self.layout(made, front, back), token_s=token_s, experts=given)
        return None

    def layout(self, made: Cut, front: Residency, back: Residency | None) -> Layout:
        """The layout of a cut whose homes are known."""
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
            own_host_nbytes=self.overhead.host_nbytes(made.staging_nbytes, stays=all_stays(front, back)),
            own_device_nbytes=self.overhead.device_nbytes,
            limit_nbytes=made.limit_nbytes,
        )


def all_stays(front: Residency, back: Residency | None) -> bool:
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
