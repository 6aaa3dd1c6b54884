"""The cache of a run whose keys and values are kept in tiers. Imported late, as all that needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig

from ..caches import link_cache
from ..kvcache import TieredCache
from ..runtime.cachesize import cache_size
from ..runtime.kv.figures import KvStatistics
from ..runtime.kv.identity import rope_depends_on_length
from ..runtime.kv.prefillcosts import calibrated_prefill
from ..runtime.kv.prefixchoice import PrefixCosts
from ..runtime.links import folder_read_time
from ..scheduler.kv.chosen import ChosenStatistics
from ..sizes import format_size
from .kv_option import KvOption

CHUNK_TOKENS: Final = 2048
"""Of a prompt that are computed at once: what a long one needs besides its keys and values is that of a short one."""


def make_cache(model: Any, option: KvOption, disk: Path | None, device: str) -> Any:
    """A cache for one run of a model that was loaded for such a device, and shares its links."""
    there = model.penstock.device or device
    budget = option.max_memory()
    cache = TieredCache(
        model.config, max_memory=budget, disk=disk, device=there, policy=option.choice, codec=option.codec
    )
    if option.choice.lossy and isinstance(cache, TieredCache):  # an encoder–decoder's is of another kind
        cache.look_at(model)  # a first call would be the model's own, and policies would not hear of the prompt's end
    return cache


def prefix_costs(model: Any, folder: Path) -> PrefixCosts:
    """What a calibration of this machine says of computing a prompt, and of reading from a folder instead."""
    device = model.penstock.device
    return PrefixCosts(
        prefill=calibrated_prefill(model),
        reading=None if device is None else folder_read_time(folder, link_cache(), device),
        chunk_tokens=CHUNK_TOKENS if chunks(CHUNK_TOKENS + 1, model) else None,
    )


def planned_context(folder: str, option: KvOption | None, context: int, *, dtype: str, trust_remote_code: bool) -> int:
    """How many tokens' keys and values the plan is to leave memory for: as many as the cache may hold on the device,
    where it is to hold any there, and else in host memory."""
    if option is None:
        return context
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.bfloat16
    named = getattr(torch, dtype, None)
    itemsize = (named if isinstance(named, torch.dtype) else own).itemsize
    token_nbytes = cache_size(config).token_elements * itemsize
    token_nbytes = max(token_nbytes, 1)
    if option.device:  # which the cache takes as a whole, however short the prompt is
        return max(1, -(-option.device // token_nbytes))
    return max(1, min(context, option.host // token_nbytes))


def chunks(prompt_tokens: int, model: Any) -> dict[str, Any]:
    """Arguments of `generate`, so that a long prompt is computed in pieces."""
    if prompt_tokens <= CHUNK_TOKENS or model.config.is_encoder_decoder or rope_depends_on_length(model.config):
        return {}
    return {"prefill_chunk_size": CHUNK_TOKENS}


def render(figures: KvStatistics) -> str:
    """What became of keys and values: a line, and others about what was lossy."""
    there = crossed = ""
    if figures.device_budget_nbytes:
        there = f"{format_size(figures.device_nbytes)} on the device (of {format_size(figures.device_budget_nbytes)}), "
        crossed = (
            f"; {format_size(figures.fetched_nbytes)} to the device, {format_size(figures.sent_nbytes)} back from it"
        )
    line = (
        f"keys and values: {format_size(figures.kv_nbytes)} of {figures.tokens} tokens, {there}"
        f"{format_size(figures.host_nbytes)} in host memory (of {format_size(figures.host_budget_nbytes)}), "
        f"{format_size(figures.disk_nbytes)} on disk; {format_size(figures.read_nbytes)} read, "
        f"{format_size(figures.written_nbytes)} written{crossed}"
    )
    return "\n".join([line, *render_lossy(figures)])


def render_lossy(figures: KvStatistics) -> list[str]:
    """Lines about a codec and a policy of selection, where there are any."""
    lines = []
    if figures.codec is not None:
        lines.append(
            f"LOSSY codec {figures.codec}: keys and values of {format_size(figures.kv_nbytes)} take "
            f"{format_size(figures.host_nbytes + figures.disk_nbytes)} in tiers"
        )
    if figures.chosen is not None:
        lines.append(render_chosen(figures.chosen))
    return lines


def render_chosen(chosen: ChosenStatistics) -> str:
    """A line about what a policy of selection read, and what it kept."""
    if not chosen.steps:
        return f"LOSSY policy {chosen.policy} had nothing to choose, and all was attended to"
    read = chosen.gathered_nbytes + chosen.read_nbytes
    kept = "how much of the attention was kept was not measured"
    if chosen.recall is not None and chosen.least_recall is not None:
        kept = (
            f"{chosen.recall:.1%} of the attention was kept, {chosen.least_recall:.1%} by the worst head, in "
            f"{chosen.compared_steps} of {chosen.steps} steps of layers, which were compared with attention to all"
        )
    return (
        f"LOSSY policy {chosen.policy} read {format_size(read)} of {format_size(chosen.whole_nbytes)} where it chose "
        f"({format_size(chosen.read_nbytes)} from disk, in whole blocks), and looked at "
        f"{format_size(chosen.scored_nbytes)} to choose; {kept}"
    )
