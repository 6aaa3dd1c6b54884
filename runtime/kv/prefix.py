"""A cache and the prefix store: what was computed is kept, and what is kept need not be computed.

A block of the store is a block of the cache in all layers: a page that says how it lies, then each layer's slot.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from ...memory.arena import PAGE, HostArena, round_up
from ...memory.errors import UsageError
from ...memory.prefix import KvIdentity, Place, PrefixHit, PrefixStore, PutReport
from .cache import TieredCache
from .layout import BlockLayout
from .tiers import KvTiers

AT_ONCE: Final = 32 * 2**20
"""About how much is on its way at once."""
ROOMS: Final = 3
"""That it is read into: one is copied from while two are read, so that the drive has more to do when one is full."""
_DTYPES: Final = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What came of a store."""

    tokens: int
    """That the cache has now."""
    read_nbytes: int


def load_prefix(cache: TieredCache, store: PrefixStore, identity: KvIdentity, tokens: Sequence[int]) -> Loaded:
    """Fill an empty cache with the longest beginning of a prompt that a store has. The last token is never part of it.

    Args:
        cache: For one sequence, which starts with these tokens.
        store: To look in.
        identity: Of the model, with the cache's block_tokens.
        tokens: Of the prompt.

    Raises:
        UsageError: the cache is not empty, has other blocks, or keeps layers that are in no tier.
    """
    tiers = cache.tiers
    _require_all_in_tiers(cache)
    _require_blocks(tiers, identity)
    if cache.get_seq_length():
        raise UsageError(f"the cache has {cache.get_seq_length()} tokens already: reset it before a prefix is loaded")
    hit = store.lookup(identity, tokens)
    read_nbytes = done = 0
    with closing(_arriving(store, hit)) as arriving:
        for places, blocks in arriving:
            with tiers.in_whole():
                _append(tiers, blocks)
            read_nbytes += sum(place.span.nbytes for place in places)
            done += len(places)
    return Loaded(tokens=done * identity.block_tokens, read_nbytes=read_nbytes)


def _arriving(store: PrefixStore, hit: PrefixHit) -> Generator[tuple[tuple[Place, ...], torch.Tensor], None, None]:
    """Blocks as they are read, some at a time: [blocks, bytes], good until the next ones are asked for.

    While some are copied into the cache, others are read, and the drive has the next ones to go on with. Ends before
    the first block that is bad.
    """
    if not hit.places:
        return
    unit = round_up(max(place.span.nbytes for place in hit.places))
    most = max(1, AT_ONCE // ROOMS // unit)
    waiting = deque(enumerate(hit.places[start : start + most] for start in range(0, len(hit.places), most)))
    arena = HostArena(unit * most * min(ROOMS, len(waiting)), tier="prefixes")
    under_way: deque[tuple[tuple[Place, ...], int, Future[int]]] = deque()
    with ThreadPoolExecutor(ROOMS - 1, thread_name_prefix="penstock-prefix") as readers:

        def ask() -> None:
            number, places = waiting.popleft()
            first = number % ROOMS * most
            views = [arena.view((first + at) * unit, unit) for at in range(len(places))]
            under_way.append((places, first, readers.submit(store.read, replace(hit, places=places), views)))

        while waiting and len(under_way) < ROOMS - 1:
            ask()
        whole = torch.frombuffer(arena.buffer, dtype=torch.uint8).view(-1, unit)
        while under_way:
            places, first, reading = under_way.popleft()
            good = reading.result()
            if good == len(places) and waiting:
                ask()
            if good:
                yield places[:good], whole[first : first + good]
            if good < len(places):
                return


def store_prefix(cache: TieredCache, store: PrefixStore, identity: KvIdentity, tokens: Sequence[int]) -> PutReport:
    """Store the whole blocks of a cache's only sequence that a store does not have yet.

    Args:
        cache: As in `load_prefix`.
        store: Opened for writing.
        identity: As in `load_prefix`.
        tokens: That the cache holds keys and values of; others after them are overlooked.

    Raises:
        UsageError: the cache has other blocks, more than one sequence, padding, or layers that are in no tier.
        DiskError: what the cache has on disk cannot be read.
    """
    tiers = cache.tiers
    _require_all_in_tiers(cache)
    _require_blocks(tiers, identity)
    if tiers.rows() != 1 or any(tiers.paddings or ()):
        raise UsageError(f"a prefix is of one sequence without padding; the cache has {tiers.rows()}")
    size = identity.block_tokens
    count = min(len(tokens), cache.get_seq_length()) // size
    known = len(store.lookup(identity, [*tokens[: count * size], 0]).places)
    header = _header(tiers.layouts())
    report = PutReport(stored_blocks=0, known_blocks=known, written_nbytes=0, reason="")
    each = PAGE + sum(layout.slot_nbytes for layout in tiers.layouts())
    for start in range(known, count, max(1, AT_ONCE // each)):
        stop = min(count, start + max(1, AT_ONCE // each))
        blocks = [header + tiers.block_bytes(index) for index in range(start, stop)]
        part = store.put(identity, tokens[: stop * size], blocks, first=start)
        report = replace(
            report,
            stored_blocks=report.stored_blocks + part.stored_blocks,
            known_blocks=report.known_blocks + part.known_blocks,
            written_nbytes=report.written_nbytes + part.written_nbytes,
            reason=part.reason,
        )
        if part.reason:
            break
    return report


def _append(tiers: KvTiers, blocks: torch.Tensor) -> None:
    """Add blocks of the store, [blocks, bytes], to all layers."""
    at = PAGE
    for layout in _layouts(blocks[0, :PAGE].numpy().tobytes(), tiers.block_tokens):
        tiers.append_blocks(layout, blocks[:, at : at + layout.slot_nbytes])
        at += layout.slot_nbytes


def _header(layouts: Sequence[BlockLayout]) -> bytes:
    unknown = {str(one.dtype) for one in layouts} - _DTYPES.keys()
    if unknown:
        raise UsageError(
            f"keys and values in {', '.join(sorted(unknown))} are not stored: use one of {sorted(_DTYPES)}"
        )
    said = [[one.heads, one.key_dim, one.value_dim, str(one.dtype)] for one in layouts]
    text = json.dumps(said).encode()
    if len(text) > PAGE:  # alike in nearly all models: then it is said once
        text = json.dumps([len(layouts), said[0]]).encode()
        if any(one != said[0] for one in said):
            raise UsageError(f"{len(layouts)} layers of different shapes are more than a prefix has room to describe")
    return text.ljust(PAGE, b" ")


def _layouts(header: bytes, block_tokens: int) -> list[BlockLayout]:
    said: Any = json.loads(header)
    if said and isinstance(said[0], int):
        said = [said[1]] * said[0]
    return [
        BlockLayout(
            layer=number,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dtype=_DTYPES[dtype],
            block_tokens=block_tokens,
        )
        for number, (heads, key_dim, value_dim, dtype) in enumerate(said)
    ]


def _require_all_in_tiers(cache: TieredCache) -> None:
    if not cache.all_in_tiers:
        raise UsageError(
            "this model has layers whose keys and values, or states, are in no tier: a prefix of the others would be "
            "of no use"
        )


def _require_blocks(tiers: KvTiers, identity: KvIdentity) -> None:
    if tiers.codec is not None:
        raise UsageError(
            f"the cache keeps its blocks as {tiers.codec}, and a prefix store has them as they were made: make the "
            "cache without a codec"
        )
    if tiers.block_tokens != identity.block_tokens:
        raise UsageError(
            f"the cache has blocks of {tiers.block_tokens} tokens and the identity says {identity.block_tokens}: make "
            "one as the other"
        )
