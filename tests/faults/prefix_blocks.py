"""Prompts whose blocks follow from their tokens, so that whoever reads one knows what must be in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from penstock.memory.arena import PAGE, HostArena, round_up
from penstock.memory.prefix import KvIdentity, PrefixHit, PrefixStore, PutReport
from penstock.memory.prefix.folder import OVERHEAD_NBYTES
from penstock.memory.prefix.segment import HEADER_NBYTES

TOKENS = 4
NBYTES = 5000
SEGMENT_NBYTES = HEADER_NBYTES + round_up(NBYTES)
"""Of a segment with one block; each further one takes two pages."""
BLOCK_NBYTES = round_up(NBYTES)
IDENTITY = KvIdentity(weights="w", dtype="BF16", rope="default 10000", layout="8x2x64", block_tokens=TOKENS)


def capacity(blocks: int, segments: int) -> int:
    return OVERHEAD_NBYTES + segments * HEADER_NBYTES + blocks * BLOCK_NBYTES


def payload(identity: KvIdentity, tokens: Sequence[int], number: int, nbytes: int = NBYTES) -> bytes:
    """Of block `number` of a prompt: of all that it depends on, and nothing else."""
    return random.Random(f"{identity} {list(tokens[: (number + 1) * identity.block_tokens])}").randbytes(nbytes)


def put(
    store: PrefixStore, tokens: Sequence[int], identity: KvIdentity = IDENTITY, first: int = 0, nbytes: int = NBYTES
) -> PutReport:
    blocks = range(first, len(tokens) // identity.block_tokens)
    return store.put(identity, tokens, [payload(identity, tokens, at, nbytes) for at in blocks], first=first)


def read(store: PrefixStore, hit: PrefixHit, nbytes: int = NBYTES) -> list[bytes]:
    """What is read of a hit, up to the first block that is bad."""
    if not hit.places:
        return []
    unit = round_up(nbytes)
    arena = HostArena(len(hit.places) * unit)
    try:
        views = [arena.view(at * unit, unit) for at in range(len(hit.places))]
        good = store.read(hit, views)
        return [bytes(view[:nbytes]) for view in views[:good]]
    finally:
        arena.close()


def get(store: PrefixStore, tokens: Sequence[int], identity: KvIdentity = IDENTITY, nbytes: int = NBYTES) -> int:
    """How many blocks of a prompt the store has; all that it gives must be right."""
    hit = store.lookup(identity, tokens)
    assert hit.tokens < len(tokens) or not tokens
    blocks = read(store, hit, nbytes)
    for number, found in enumerate(blocks):
        assert found == payload(identity, tokens, number, nbytes), number
    return len(blocks)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def used(folder: Path) -> int:
    """What all segments and files on their way take."""
    return sum(path.stat().st_size for path in folder.iterdir())


def prompt(blocks: int, seed: int = 0, *, more: int = 1) -> list[int]:
    """So many blocks, and some tokens more."""
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(blocks * TOKENS + more)]


assert PAGE == 4096
