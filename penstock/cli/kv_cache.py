"""The cache of a run whose keys and values are kept in tiers. Imported late, as all that needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig

from ..kvcache import TieredCache
from ..runtime.cachesize import cache_size
from ..runtime.kv.identity import rope_depends_on_length
from ..runtime.kv.tiers import KvStatistics
from ..sizes import format_size
from .kv_option import KvOption

CHUNK_TOKENS: Final = 2048
"""Of a prompt that are computed at once: what a long one needs besides its keys and values is that of a short one."""


def make_cache(model: Any, option: KvOption, disk: Path | None, device: str) -> Any:
    """A cache for one run of a model that was loaded for such a device, and shares its links."""
    there = model.penstock.device or device
    return TieredCache(model.config, max_memory=option.max_memory(), disk=disk, device=there)


def planned_context(folder: str, option: KvOption | None, context: int, *, dtype: str, trust_remote_code: bool) -> int:
    """How many tokens' keys and values the plan is to leave memory for, on the device where there is one: as many as
    the cache may hold there."""
    if option is None:
        return context
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.bfloat16
    named = getattr(torch, dtype, None)
    itemsize = (named if isinstance(named, torch.dtype) else own).itemsize
    token_nbytes = cache_size(config).token_elements * itemsize
    return max(1, min(context, (option.device or option.host) // max(token_nbytes, 1)))


def chunks(prompt_tokens: int, model: Any) -> dict[str, Any]:
    """Arguments of `generate`, so that a long prompt is computed in pieces."""
    if prompt_tokens <= CHUNK_TOKENS or model.config.is_encoder_decoder or rope_depends_on_length(model.config):
        return {}
    return {"prefill_chunk_size": CHUNK_TOKENS}


def render(figures: KvStatistics) -> str:
    """A line about what became of keys and values."""
    there = crossed = ""
    if figures.device_budget_nbytes:
        there = f"{format_size(figures.device_nbytes)} on the device (of {format_size(figures.device_budget_nbytes)}), "
        crossed = (
            f"; {format_size(figures.fetched_nbytes)} to the device, {format_size(figures.sent_nbytes)} back from it"
        )
    return (
        f"keys and values: {format_size(figures.kv_nbytes)} of {figures.tokens} tokens, {there}"
        f"{format_size(figures.host_nbytes)} in host memory (of {format_size(figures.host_budget_nbytes)}), "
        f"{format_size(figures.disk_nbytes)} on disk; {format_size(figures.read_nbytes)} read, "
        f"{format_size(figures.written_nbytes)} written{crossed}"
    )
