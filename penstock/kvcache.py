"""`penstock.TieredCache`: keys and values in tiers, for `past_key_values=`."""

from __future__ import annotations

import os
from typing import Any

import torch

from .arguments import MaxMemory
from .budget import parse_budget
from .devices import open_device
from .memory.errors import UsageError
from .runtime.devices.base import Device
from .runtime.kv.cache import EXACT, TieredEncoderDecoderCache
from .runtime.kv.cache import TieredCache as _TieredCache
from .runtime.kv.memory import KvBudget
from .scheduler.kv.choice import PolicyChoice, choice_for
from .scheduler.kv.shape import TOKENS


class TieredCache(_TieredCache):
    """Keys and values of a context that exceeds memory: on the device and in host memory as far as it is allowed, the
    rest on disk.

        cache = penstock.TieredCache(model.config, max_memory={"host": "2GiB", "disk": "20GiB"})
        model.generate(**inputs, past_key_values=cache)

    For any decoder, streamed or resident, and for encoder–decoders. Attention is computed where keys and values lie,
    and what is on disk is read ahead. Where a device has a part of them, what is in host memory is shared between the
    CPU and the link to the device, so that both end together. Results equal those of transformers' own cache to
    rounding. Layers with a sliding window, and states, stay in memory as transformers has them. The model's config is
    switched to an attention that passes on to the former one all calls that are not of such a cache.

    Args:
        config: `model.config`, the object itself.
        max_memory: Of all keys and values in tiers: "device=1GiB,host=2GiB,disk=20GiB", or a dict. What is left out of
            host and disk is half of what is free; a device has none unless it is named. Bounds hold for blocks and for
            what is on its way together.
        block_tokens: Of a block. What is on disk is read in runs of blocks.
        disk: A folder to put a private one (mode 0700) in; None for the user's cache.
        device: Of `device=` in the budget: what the model runs on, as `penstock.load` has it. For a model that penstock
            runs, `model.penstock.device` is the one whose links they share.
        policy: A policy of selection: "exact" attends to all. All others are lossy: a token attends to what the policy
            chooses, and only that is read; prompts attend to all, but for "sale". "quest", "quest:4096",
            "quest:4096,recent=128", or a `PolicyChoice`. Nothing is deleted. What policies keep about keys is in host
            memory, beside `max_memory`. `statistics().chosen` says what was read, and how much of the attention was
            kept. "sentencekv" chooses sentences, whose ends `hear_sentences` tells.
        budget: Tokens that a policy attends to per key-value head, where `policy` does not say so.
        codec: "int8" or "int4": lossy. Full blocks are kept in so many bits in every tier, keys with a range for each
            channel of a block, values with one for each token; the last block of a sequence is as it was made, beside
            `max_memory`.

    Raises:
        UsageError: a device without memory of its own in the budget, or a device beside a codec; a tier or a size
            without meaning, a codec or a policy that is not known, a budget that holds nothing, a policy that reads
            from every key ("sparq", "oracle") and a disk or a device in `max_memory`, or a model whose layers keep
            nothing that grows.
        DoesNotFitError: raised with the first tokens, where memory has no room for a block of each sequence.
    """

    def __new__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        """A cache of the kind that the model takes."""
        if config.is_encoder_decoder:
            settings = _settings(*args, **kwargs)
            try:
                return TieredEncoderDecoderCache(config, **settings)
            except BaseException:
                _close_owned(settings)
                raise
        return super().__new__(cls)

    def __init__(
        self,
        config: Any,
        *,
        max_memory: MaxMemory = "auto",
        block_tokens: int = TOKENS,
        disk: str | os.PathLike[str] | None = None,
        device: str | torch.device | Device = "auto",
        policy: str | PolicyChoice = EXACT,
        budget: int | None = None,
        codec: str | None = None,
    ) -> None:
        settings = _settings(
            max_memory=max_memory,
            block_tokens=block_tokens,
            disk=disk,
            device=device,
            policy=policy,
            budget=budget,
            codec=codec,
        )
        try:
            super().__init__(config, **settings)
        except BaseException:
            _close_owned(settings)
            raise


def _settings(
    *,
    max_memory: MaxMemory = "auto",
    block_tokens: int = TOKENS,
    disk: str | os.PathLike[str] | None = None,
    device: str | torch.device | Device = "auto",
    policy: str | PolicyChoice = EXACT,
    budget: int | None = None,
    codec: str | None = None,
) -> dict[str, Any]:
    allowed = parse_budget(max_memory)
    folder = None if disk is None else os.fspath(disk)
    settings: dict[str, Any] = {
        "budget": KvBudget.of(allowed.host, allowed.disk, folder, device=allowed.device or 0),
        "folder": folder,
        "block_tokens": block_tokens,
        "codec": codec,
        "choice": choice_for(policy, budget, block_tokens),
    }
    if not allowed.device:
        return settings
    if codec is not None:
        raise UsageError(
            f"device={allowed.device} in the budget of keys and values: blocks are coded in host memory and on disk. "
            "Leave it out, or the codec"
        )
    owned = isinstance(device, str | torch.device)
    opened: Device = open_device(device) if isinstance(device, str | torch.device) else device
    problem: str | None = None
    if not opened.separate:
        problem = f"{opened.name} has no memory of its own. Leave it out, or name the model's device (device=…)"
    elif allowed.host is None:
        problem = (
            "say how much host memory they may take as well (host=2GiB, for example), all of which is registered with "
            "the device at once"
        )
    if problem is not None:
        if owned:
            opened.close()
        raise UsageError(f"device={allowed.device} in the budget of keys and values: {problem}")
    return settings | {"device": opened, "owned": owned}


def _close_owned(settings: dict[str, Any]) -> None:
    """The device that was opened for a cache that did not come to be."""
    if settings.get("owned"):
        settings["device"].close()
