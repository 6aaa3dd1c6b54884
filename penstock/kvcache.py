"""`penstock.TieredCache`: keys and values in tiers, for `past_key_values=`."""

from __future__ import annotations

import os
from typing import Any

from .arguments import MaxMemory
from .budget import parse_budget
from .memory.errors import UsageError
from .runtime.kv.cache import EXACT, TieredEncoderDecoderCache
from .runtime.kv.cache import TieredCache as _TieredCache
from .runtime.kv.memory import KvBudget
from .scheduler.kv.choice import PolicyChoice, choice_for
from .scheduler.kv.shape import TOKENS


class TieredCache(_TieredCache):
    """Keys and values of a context that exceeds memory: in host memory as far as it is allowed, the rest on disk.

        cache = penstock.TieredCache(model.config, max_memory={"host": "2GiB", "disk": "20GiB"})
        model.generate(**inputs, past_key_values=cache)

    For any decoder, streamed or resident, and for encoder–decoders. Attention is computed where keys and values lie,
    and what is on disk is read ahead; results equal those of transformers' own cache to rounding. Layers with a sliding
    window, and states, stay in memory as transformers has them. The model's config is switched to an attention that
    passes on to the former one all calls that are not of such a cache.

    Args:
        config: `model.config`, the object itself.
        max_memory: Of all keys and values in tiers: "host=2GiB,disk=20GiB", or a dict. What is left out is half of what
            is free. The host's bound holds for blocks and for reads together.
        block_tokens: Of a block. What is on disk is read in runs of blocks.
        disk: A folder to put a private one (mode 0700) in; None for the user's cache.
        policy: A policy of selection: "exact" attends to all. All others are lossy: a token attends to what the policy
            chooses, and only that is read; prompts attend to all, but for "sale". "quest", "quest:4096",
            "quest:4096,recent=128", or a `PolicyChoice`. Nothing is deleted. What policies keep about keys is in host
            memory, beside `max_memory`. `statistics().chosen` says what was read, and how much of the attention was
            kept.
        budget: Tokens that a policy attends to per key-value head, where `policy` does not say so.
        codec: "int8" or "int4": lossy. Full blocks are kept in so many bits in every tier, keys with a range for each
            channel of a block, values with one for each token; the last block of a sequence is as it was made, beside
            `max_memory`.

    Raises:
        UsageError: a tier or a size without meaning, a codec or a policy that is not known, a budget that holds
            nothing, or a model whose layers keep nothing that grows.
        DoesNotFitError: raised with the first tokens, where memory has no room for a block of each sequence.
    """

    def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        """A cache of the kind that the model takes."""
        if config.is_encoder_decoder:
            return TieredEncoderDecoderCache(config, **_settings(*args, **kwargs))
        return super().__new__(cls)

    def __init__(
        self,
        config: Any,
        *,
        max_memory: MaxMemory = "auto",
        block_tokens: int = TOKENS,
        disk: str | os.PathLike[str] | None = None,
        policy: str | PolicyChoice = EXACT,
        budget: int | None = None,
        codec: str | None = None,
    ) -> None:
        settings = _settings(
            max_memory=max_memory, block_tokens=block_tokens, disk=disk, policy=policy, budget=budget, codec=codec
        )
        super().__init__(config, **settings)


def _settings(
    *,
    max_memory: MaxMemory = "auto",
    block_tokens: int = TOKENS,
    disk: str | os.PathLike[str] | None = None,
    policy: str | PolicyChoice = EXACT,
    budget: int | None = None,
    codec: str | None = None,
) -> dict[str, Any]:
    allowed = parse_budget(max_memory)
    if allowed.device is not None:
        raise UsageError(
            "keys and values are kept in host memory and on disk; attention to them is the CPU's. Leave device= out"
        )
    folder = None if disk is None else os.fspath(disk)
    return {
        "budget": KvBudget.of(allowed.host, allowed.disk, folder),
        "folder": folder,
        "block_tokens": block_tokens,
        "codec": codec,
        "choice": choice_for(policy, budget, block_tokens),
    }
