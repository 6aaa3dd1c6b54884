"""One row of one layer, of which some keys and values are read, and no others.

What lies in memory is gathered token by token, a device's where it lies: only what policies look at themselves crosses
to the host. Of what only the disk has, blocks are read that somebody wants, as a whole, and tokens gathered from those.
What is read is counted where it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ...scheduler.kv.policies.policy import BoolArray, FloatArray, IntArray
from .placement import Numbers, Piece, Places
from .store import LayerStore

Reader = Callable[[dict[int, int]], Iterator[tuple[Piece, torch.Tensor]]]
"""Reads slots on disk, given with their blocks."""


class StoredRow:
    """Keys and values of one sequence in one layer, padding left out. It is good for one call of the model.

    Args:
        store: Of the layer; None where nothing is stored yet.
        row: Of the batch.
        end: What follows the whole blocks and is at hand: keys and values [kv_heads, tokens, dim], where blocks grow.
        read: Reads slots on disk.
    """

    def __init__(
        self, store: LayerStore | None, row: int, end: tuple[torch.Tensor, torch.Tensor], read: Reader
    ) -> None:
        self._store = store
        self._end = end
        self._read = read
        none: IntArray = np.zeros(0, np.int64)
        self._places = Places(blocks=none, tiers=none, slots=none) if store is None else store.placement().places(row)
        self._numbers = Numbers.of(device=False) if store is None else store.numbers
        self._size = 1 if store is None else store.layout.block_tokens
        self._whole = len(self._places.blocks) * self._size
        self._held: dict[int, torch.Tensor] = {}
        """Keys of blocks that were read from disk in order to choose, by slot: [kv_heads, tokens, dim]."""
        self.gathered_nbytes = 0
        """From memory, the device's and the host's."""

    @property
    def tokens(self) -> int:
        """How many there are, new ones included."""
        return self._whole + self._end[0].shape[1]

    def rows(self, head: int, tokens: IntArray) -> FloatArray:
        """Whole keys [tokens, dim]. See `Keys`: blocks that are on disk are read once in a call, and held."""
        self._hold(tokens)
        found = self._keys(head, tokens, None)
        self.gathered_nbytes += found.nbytes
        return _array(found)

    def channels(self, head: int, channels: IntArray, start: int, stop: int) -> FloatArray:
        """Some elements of keys [tokens, channels]. They lie apart from each other: there is no copy by channel."""
        tokens: IntArray = np.arange(start, stop)
        self._hold(tokens)
        found = self._keys(head, tokens, torch.from_numpy(channels))
        self.gathered_nbytes += found.nbytes
        return _array(found)

    def pieces(self, start: int, stop: int, most: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Keys of all heads in order, at most so many tokens at a time: the first one's number, [kv_heads, n, dim]."""
        heads = self._end[0].shape[0]
        for first in range(start, stop, most):
            ids: IntArray = np.arange(first, min(first + most, stop))
            yield first, self.gather((ids,) * heads, values=False)[0]

    def split(self, ids: Sequence[IntArray]) -> tuple[list[IntArray], list[IntArray]]:
        """Tokens of each head, apart by who can read them: those in host memory or on disk, and the device's."""
        if self._numbers.device is None:
            return list(ids), [one[:0] for one in ids]
        there = [self._on_device(one) for one in ids]
        host = [one[~mine] for one, mine in zip(ids, there, strict=True)]
        return host, [one[mine] for one, mine in zip(ids, there, strict=True)]

    def gather(self, ids: Sequence[IntArray], *, values: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some tokens of each head, in host memory: [kv_heads, the most of any head, dim], 0 beyond
        a head's own.

        Args:
            ids: Of each head, ascending.
            values: Whether those are wanted as well; else they are empty.

        Raises:
            DiskError: blocks could not be read.
        """
        most = max(len(one) for one in ids)
        keys, end_values = self._end[0], self._end[1]
        found = torch.zeros(len(ids), most, keys.shape[2], dtype=keys.dtype)
        found_values = torch.zeros(len(ids), most if values else 0, end_values.shape[2], dtype=end_values.dtype)
        rooms = ((found, 0), (found_values, 1)) if values else ((found, 0),)
        from_disk: list[IntArray] = []
        there = [self._on_device(tokens) for tokens in ids]
        for head, tokens in enumerate(ids):
            whole = int(np.searchsorted(tokens, self._whole))
            blocks = tokens[:whole] // self._size
            here = np.flatnonzero(self._places.tiers[blocks] == self._numbers.host)
            from_disk.append(np.flatnonzero(self._places.tiers[blocks] == self._numbers.disk))
            ends = np.flatnonzero(~there[head][whole:]) + whole
            at = torch.from_numpy(tokens[ends] - self._whole)
            for room, part in rooms:
                if len(ends):
                    room[head, torch.from_numpy(ends)] = self._end[part][head, at]
                if len(here):
                    room[head, torch.from_numpy(here)] = self._in_host(part, head, tokens[here])
                self.gathered_nbytes += len(ends) * room.shape[2] * room.itemsize
                self.gathered_nbytes += self._taken_nbytes(blocks[here], part)
        if any(mine.any() for mine in there):
            sent = self.gather_there([one[mine] for one, mine in zip(ids, there, strict=True)], values=values)
            for (room, _), some in zip(rooms, sent, strict=False):
                arrived = self._to_host(some)
                for head, mine in enumerate(there):
                    at = torch.from_numpy(np.flatnonzero(mine))
                    room[head, at] = arrived[head, : len(at)]
        self._mark(ids)
        self._from_disk(ids, from_disk, [room for room, _ in rooms])
        return found, found_values

    def gather_there(self, ids: Sequence[IntArray], *, values: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of tokens that are all on the device, and there: in one go over all heads, which waits for nothing.

        Args:
            ids: Of each head, ascending: as `split` gives them.
            values: Whether those are wanted as well; else they are empty.
        """
        store = self._store
        assert store is not None
        most = max(len(one) for one in ids)
        slots, inside, kinds = (np.zeros((len(ids), most), np.int64) for _ in range(3))
        for head, tokens in enumerate(ids):
            count, whole = len(tokens), int(np.searchsorted(tokens, self._whole))
            blocks = tokens[:whole] // self._size
            slots[head, :whole] = self._places.slots[blocks]
            inside[head, :whole] = tokens[:whole] % self._size
            inside[head, whole:count] = tokens[whole:] - self._whole
            kinds[head, :whole], kinds[head, whole:count] = _IN_BLOCK, _IN_END
        at = torch.from_numpy(np.stack([slots, inside, kinds])).to(store.rooms.home)
        parts = (0, 1) if values else (0,)
        found = [self._there(part, at, _IN_END in kinds) for part in parts]
        taken = int((kinds != 0).sum())
        self.gathered_nbytes += sum(taken * part.shape[2] * part.itemsize for part in found)
        self._mark(ids)
        return found[0], found[1] if values else found[0].new_zeros(len(ids), 0, self._end[1].shape[2])

    def _there(self, part: int, at: torch.Tensor, ends: bool) -> torch.Tensor:
        """Keys (0) or values (1) on the device, [kv_heads, tokens, dim].

        Args:
            part: Which.
            at: Slot, place in it and kind of each, [3, kv_heads, tokens].
            ends: Whether any is behind the whole blocks.
        """
        assert self._store is not None
        slots, inside, kinds = at
        heads = torch.arange(at.shape[1], device=at.device)[:, None]
        room = self._store.rooms.device_room(part)
        in_block = (kinds == _IN_BLOCK)[..., None]
        # what is beyond a head's own may be the bytes of nobody, NaN among them: they are replaced, not multiplied
        place = torch.where(in_block[..., 0], inside, 0)
        found = torch.where(in_block, room[slots, heads, place], 0)
        if ends:
            in_end = (kinds == _IN_END)[..., None]
            found = torch.where(in_end, self._end[part][heads, torch.where(in_end[..., 0], inside, 0)], found)
        return found

    def _on_device(self, tokens: IntArray) -> BoolArray:
        """Which of these tokens lie in the device's memory; blocks grow there, where there is one."""
        there: BoolArray = np.full(len(tokens), self._numbers.device is not None)
        inner = tokens < self._whole
        there[inner] = self._places.tiers[tokens[inner] // self._size] == _tier(self._numbers.device)
        return there

    def _to_host(self, some: torch.Tensor) -> torch.Tensor:
        """What was gathered on the device, for policies, which look at it on the host."""
        assert self._store is not None
        self._store.sent(some.nbytes)
        return some.cpu()

    def _mark(self, ids: Sequence[IntArray]) -> None:
        """Blocks of these tokens are used: they leave a tier last."""
        if self._store is not None:
            whole_ids = np.unique(np.concatenate([one[one < self._whole] // self._size for one in ids]))
            self._store.used(self._places.blocks[whole_ids].tolist())

    def _from_disk(self, ids: Sequence[IntArray], places: Sequence[IntArray], rooms: Sequence[torch.Tensor]) -> None:
        """Read blocks that any head wants, and put its tokens, which are at `places` of `ids`, to where they belong."""
        wanted = np.unique(np.concatenate([one[at] // self._size for one, at in zip(ids, places, strict=True)]))
        if not len(wanted):
            return
        assert self._store is not None
        slots = self._places.slots[wanted].tolist()
        for piece, raw in self._read(dict(zip(slots, self._places.blocks[wanted].tolist(), strict=True))):
            layout = self._store.layout
            for head, (tokens, at) in enumerate(zip(ids, places, strict=True)):
                slot = self._places.slots[tokens[at] // self._size] - piece.first
                mine = (slot >= 0) & (slot < len(piece.blocks))
                if mine.any():
                    where, inside = torch.from_numpy(slot[mine]), torch.from_numpy(tokens[at[mine]] % self._size)
                    for part, room in enumerate(rooms):
                        found = layout.take(raw, where, head, inside, values=part == 1)
                        room[head, torch.from_numpy(at[mine])] = found

    def _in_host(self, part: int, head: int, tokens: IntArray, channels: torch.Tensor | None = None) -> torch.Tensor:
        """Keys (0) or values (1) of tokens in whole blocks in host memory."""
        store = self._store
        assert store is not None
        slots = torch.from_numpy(self._places.slots[tokens // self._size])
        inside = torch.from_numpy(tokens % self._size)
        if channels is None or store.coded:
            found = store.layout.take(store.rooms.slots.view(-1), slots, head, inside, values=part == 1)
            return found if channels is None else found[:, channels]
        return store.rooms.parts(0, len(store.rooms.slots))[part][slots[:, None], head, inside[:, None], channels]

    def _taken_nbytes(self, blocks: IntArray, part: int) -> int:
        """What tokens in these blocks take, one for each, where they lie in host memory."""
        if self._store is None:
            return 0
        return self._store.layout.taken_nbytes(len(blocks), len(np.unique(blocks)), values=part == 1)

    def _hold(self, tokens: IntArray) -> None:
        """Read the blocks of these tokens that only the disk has and that are not held yet."""
        blocks = np.unique(tokens[tokens < self._whole] // self._size)
        blocks = blocks[self._places.tiers[blocks] == self._numbers.disk]
        slots, numbers = self._places.slots[blocks].tolist(), self._places.blocks[blocks].tolist()
        wanted = {slot: block for slot, block in zip(slots, numbers, strict=True) if slot not in self._held}
        if wanted:
            assert self._store is not None
            for piece, raw in self._read(wanted):
                view = self._store.layout.keys(raw)
                for number in range(len(piece.blocks)):
                    self._held[piece.first + number] = view[number].clone()

    def _keys(self, head: int, tokens: IntArray, channels: torch.Tensor | None) -> torch.Tensor:
        """Keys of one head, whose blocks on disk are held."""
        width = self._end[0].shape[2] if channels is None else len(channels)
        found = torch.empty(len(tokens), width, dtype=self._end[0].dtype)
        some = slice(None) if channels is None else channels
        there = self._on_device(tokens)
        if there.any():
            none: IntArray = tokens[:0]
            heads = self._end[0].shape[0]
            ids = [tokens[there] if number == head else none for number in range(heads)]
            sent = self._to_host(self.gather_there(ids, values=False)[0][head])
            self.gathered_nbytes -= sent.nbytes  # who asked counts what it gets
            found[torch.from_numpy(np.flatnonzero(there))] = sent[:, some]
        inner = np.flatnonzero(~there & (tokens < self._whole))
        outer = np.flatnonzero(~there & (tokens >= self._whole))
        if len(outer):
            at = torch.from_numpy(tokens[outer] - self._whole)
            found[torch.from_numpy(outer)] = self._end[0][head, at][:, some]
        blocks = tokens[inner] // self._size
        here = inner[self._places.tiers[blocks] == self._numbers.host]
        if len(here):
            found[torch.from_numpy(here)] = self._in_host(0, head, tokens[here], channels)
        held = inner[self._places.tiers[blocks] == self._numbers.disk]
        slots = self._places.slots[tokens[held] // self._size]
        for slot in np.unique(slots).tolist():
            mine = held[slots == slot]
            inside = torch.from_numpy(tokens[mine] % self._size)
            found[torch.from_numpy(mine)] = self._held[slot][head, inside][:, some]
        return found


_IN_BLOCK, _IN_END = 1, 2
"""Where a token lies that is gathered on a device: in a whole block, or behind all of them."""


def _tier(number: int | None) -> int:
    """A tier's number, and one that no tier has where there is none."""
    return -1 if number is None else number


def _array(tensor: torch.Tensor) -> FloatArray:
    """For policies, which know numpy only."""
    array: FloatArray = tensor.float().numpy()
    return array
