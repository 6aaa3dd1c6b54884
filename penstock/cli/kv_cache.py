"""The cache of a run whose keys and values are kept in tiers. Imported late, as all that needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig

from ..caches import link_cache
from ..kvcache import TieredCache
from ..memory.errors import UsageError
from ..runtime.cachesize import cache_size
from ..runtime.devices.cpu import CpuDevice
from ..runtime.dtypes import parse_dtype
from ..runtime.headroom import kv_nbytes
from ..runtime.kv.coded import CodedLayout
from ..runtime.kv.figures import KvStatistics
from ..runtime.kv.identity import rope_depends_on_length
from ..runtime.kv.prefillcosts import calibrated_prefill
from ..runtime.kv.prefixchoice import PrefixCosts
from ..runtime.links import folder_read_time
from ..runtime.tiers import reserve
from ..scheduler.kv.chosen import ChosenStatistics
from ..scheduler.kv.policies.sentences import Sentences
from ..scheduler.kv.shape import TOKENS
from ..sizes import format_size
from .kv_option import KvOption
from .text import sentence_ends

OWNER: Final = "keys and values (--kv)"
"""Who holds their memory before they are there."""
CHUNK_TOKENS: Final = 2048
"""Of a prompt that are computed at once: what a long one needs besides its keys and values is that of a short one."""


def make_cache(model: Any, option: KvOption, disk: Path | None, device: str, tokenizer: Any | None) -> Any:
    """A cache for one run of a model that was loaded for such a device, and shares its links.

    Raises:
        UsageError: its policy asks where sentences end, and there is no tokenizer to tell; or see `TieredCache`.
    """
    sentences = option.choice.name == Sentences.name
    if sentences and tokenizer is None:
        raise UsageError(
            f"--kv-policy {option.choice}: it chooses sentences, and without a tokenizer nobody knows where they end; "
            "take one that chooses among blocks or tokens (quest, landmark, snapkv), or add the checkpoint's tokenizer"
        )
    there = model.penstock.device or device
    budget = option.max_memory()
    cache = TieredCache(
        model.config, max_memory=budget, disk=disk, device=there, policy=option.choice, codec=option.codec
    )
    if option.choice.lossy and isinstance(cache, TieredCache):  # an encoder–decoder's is of another kind
        cache.look_at(model)  # a first call would be the model's own, and policies would not hear of the prompt's end
        if sentences:
            cache.hear_sentences(model, sentence_ends(tokenizer))
    return cache


def prefix_costs(model: Any, folder: Path) -> PrefixCosts:
    """What a calibration of this machine says of computing a prompt, and of reading from a folder instead."""
    device = model.penstock.device
    return PrefixCosts(
        prefill=calibrated_prefill(model),
        reading=None if device is None else folder_read_time(folder, link_cache(), device),
        chunk_tokens=chunk_tokens(model.config),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class KvRoom:
    """What keys and values in tiers take beside the plan, known before anything is loaded.

    Args:
        config: Of the model.
        dtype: Of its keys and values.
        option: Budgets.
    """

    config: Any
    dtype: torch.dtype
    option: KvOption

    def planned_context(self, context: int) -> int:
        """How many tokens' keys, values and activations the plan is to leave memory for, where the model is computed:
        as many as the cache may hold on the device, where it is to hold any there, and else as many as are computed
        at once."""
        if not self.option.device:
            return min(context, chunk_tokens(self.config) or context)
        token_nbytes = max(1, cache_size(self.config).token_elements * self.dtype.itemsize)
        return max(1, -(-self.option.device // token_nbytes))  # the cache takes it as a whole, at any length

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Meanwhile host memory for keys and values is nobody else's: what is loaded plans without it.

        Raises:
            DoesNotFitError: the host has not got so much.
        """
        held = reserve(OWNER, CpuDevice(), host_nbytes=self.option.host, device_nbytes=0)
        try:
            yield
        finally:
            for reservation in held:
                reservation.release()


def read_config(folder: str, dtype: str, *, trust_remote_code: bool) -> tuple[Any, torch.dtype]:
    """The config of a checkpoint, and the dtype that its model will have."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    return config, parse_dtype(dtype) or own


def whole_context(config: Any, dtype: torch.dtype, context: int, codec: str | None = None) -> int:
    """Host memory for all keys and values of a context: blocks are whole, and one more of each layer grows."""
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", 1)
    nbytes = kv_nbytes(config, dtype, context=context + 3 * TOKENS, batch=1)
    if codec is not None:
        nbytes = int(nbytes * _share_of(text, dtype, codec))
    return nbytes + nbytes // 8 + layers * 2**16


def _share_of(text: Any, dtype: torch.dtype, codec: str) -> float:
    """What is left of keys and values that are coded, pages counted whole; 1 where heads are not told."""
    heads = getattr(text, "num_attention_heads", None)
    dim = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    if not heads or not dim:
        return 1.0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    layout = CodedLayout(
        layer=0, heads=kv_heads, key_dim=dim, value_dim=dim, dtype=dtype, block_tokens=TOKENS, codec=codec
    )
    return min(1.0, layout.slot_nbytes / (layout.token_nbytes * TOKENS))


def chunk_tokens(config: Any) -> int | None:
    """How many tokens of a prompt are computed at once; None for all of them."""
    return None if config.is_encoder_decoder or rope_depends_on_length(config) else CHUNK_TOKENS


def chunks(prompt_tokens: int, model: Any) -> dict[str, Any]:
    """Arguments of `generate`, so that a long prompt is computed in pieces."""
    size = chunk_tokens(model.config)
    return {} if size is None or prompt_tokens <= size else {"prefill_chunk_size": size}


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
