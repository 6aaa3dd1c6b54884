"""A cache and the prefix store: what was computed is kept, and what is kept need not be computed.

A block of the store is a block of the cache in all layers: a page that says how it lies, then each layer's slot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from ...memory.arena import PAGE
from ...memory.errors import UsageError
from ...memory.prefix import KvIdentity, PrefixStore, PutReport
from ...scheduler.kv.reuse import Reuse
from .arriving import AT_ONCE, Arriving
from .cache import TieredCache
from .figures import PrefixFigures
from .layout import BlockLayout
from .prefixchoice import PrefixChoice, PrefixCosts
from .tiers import KvTiers

_DTYPES: Final = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What came of a store."""

    tokens: int
    """That the cache has now."""
    read_nbytes: int
    hit_tokens: int
    """That the store had."""
    recomputed_tokens: int
    """Of them, those that were left to be computed, which is expected to be faster. Others that are not there were
    bad."""
    choice: Reuse | None
    """What was expected; None where nothing could be, and all was read."""


def load_prefix(
    cache: TieredCache,
    store: PrefixStore,
    identity: KvIdentity,
    tokens: Sequence[int],
    *,
    costs: PrefixCosts | None = None,
    always_read: bool = False,
) -> Loaded:
    """Fill an empty cache with a beginning of a prompt that a store has. The last token is never part of it.

    As much of it is read as makes the prompt be there soonest, if the rest is computed. What is not known is no reason
    to compute: then all is read. Where a drive turns out slower than it was thought to be, reading ends early.

    Args:
        cache: For one sequence, which starts with these tokens.
        store: To look in.
        identity: Of the model, with the cache's block_tokens.
        tokens: Of the prompt.
        costs: What a calibration says of computing and reading.
        always_read: Read all that is there, whatever it takes.

    Raises:
        UsageError: the cache is not empty, has other blocks, or keeps layers that are in no tier.
    """
    tiers = cache.tiers
    _require_all_in_tiers(cache)
    _require_blocks(tiers, identity)
    if cache.get_seq_length():
        raise UsageError(f"the cache has {cache.get_seq_length()} tokens already: reset it before a prefix is loaded")
    hit = store.lookup(identity, tokens)
    choosing = None if always_read else PrefixChoice(cache, store, costs or PrefixCosts(), hit, len(tokens))
    choice = None if choosing is None else choosing.first()
    wanted = len(hit.places) if choice is None else choice.read_blocks
    arriving = Arriving(store, replace(hit, places=hit.places[:wanted]))
    read_nbytes = done = 0
    began_s, ended = time.perf_counter(), False
    with closing(arriving.parts()) as parts:
        for places, blocks in parts:
            with tiers.in_whole():
                _append(tiers, blocks)
            read_nbytes += sum(place.span.nbytes for place in places)
            done += len(places)
            arrived = read_nbytes + arriving.under_way_nbytes  # the drive may be almost there with those
            if choosing is not None and not choosing.goes_on(done, wanted, arrived, time.perf_counter() - began_s):
                ended = True
                break
    size = identity.block_tokens
    left = len(hit.places) - (done if ended else wanted)
    loaded = Loaded(
        tokens=done * size,
        read_nbytes=read_nbytes,
        hit_tokens=hit.tokens,
        recomputed_tokens=left * size,
        choice=choice,
    )
    cache.prefix = _told(cache.prefix, loaded)
    return loaded


def _told(before: PrefixFigures, loaded: Loaded) -> PrefixFigures:
    """A cache's figures with one more hit."""
    choice = loaded.choice
    return PrefixFigures(
        hit_tokens=before.hit_tokens + loaded.hit_tokens,
        read_tokens=before.read_tokens + loaded.tokens,
        recomputed_tokens=before.recomputed_tokens + loaded.recomputed_tokens,
        read_nbytes=before.read_nbytes + loaded.read_nbytes,
        read_all_s=None if choice is None else choice.read_all_s,
        compute_all_s=None if choice is None else choice.compute_all_s,
    )


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
        blocks = [header + tiers.reader.block_bytes(index) for index in range(start, stop)]
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
