"""`penstock.TieredCache`: a cache of transformers whose keys and values lie in host memory and on disk."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from ...memory.errors import UsageError
from ...scheduler.kv.choice import PolicyChoice
from ...scheduler.kv.chosen import ChosenFigures
from ...scheduler.kv.policies import POLICIES
from ...scheduler.kv.policies.policy import Policy
from ...scheduler.kv.shape import TOKENS
from ..devices.base import Device
from .byconfig import known_configs, measured_prefills
from .choosing import Choosing
from .figures import KvStatistics, PrefixFigures
from .interface import masks_for, switch
from .layer import TieredLayer, Way
from .memory import KvBudget
from .probe import probe
from .sentences import SentenceEnds, listen
from .stopwatch import CallStopwatch
from .tiers import KvTiers

logger = logging.getLogger(__name__)

EXACT: Final = PolicyChoice()
"""Attention to all."""


class TieredCache(DynamicCache):
    """Keys and values of a decoder in blocks.

    Layers with a sliding window, and states of linear attention, are as `DynamicCache` has them.

    Args:
        config: Of the model: the object that it has.
        budget: Bytes of each tier.
        folder: For files; None for the default one.
        block_tokens: Of a block.
        device: Whose memory the budget names; None where it names none.
        owned: Whether it is closed with the cache.
        choice: A policy of selection; all but `exact` are lossy.
        codec: Of full blocks, "int8" or "int4", which are lossy; None to keep them as they are.

    Raises:
        UsageError: no layer of the model can be kept in tiers, or a policy is to choose and its attention cannot be
            replaced; or the policy reads from every key, and the budget names a disk, or a device.
    """

    def __init__(
        self,
        config: Any,
        budget: KvBudget,
        *,
        folder: str | None = None,
        block_tokens: int = TOKENS,
        device: Device | None = None,
        owned: bool = False,
        choice: PolicyChoice = EXACT,
        codec: str | None = None,
    ) -> None:
        super().__init__(config=config)
        own = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
        plain = [index for index, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not plain:
            raise UsageError(
                f"no layer of {config.model_type} keeps keys and values that grow with its context: nothing is there "
                "to put in tiers; use transformers' own cache"
            )
        self._switched = switch(own)
        if choice.lossy and not self._switched:
            raise UsageError(
                f"policy {choice} chooses inside of our attention, and the one that the model was loaded with cannot "
                'be replaced: load it with attn_implementation="sdpa", or use policy="exact"'
            )
        if budget.disk and POLICIES[choice.name].reads_all_keys:
            raise UsageError(
                f"policy {choice} reads from every key in each step, and the budget has {budget.disk} bytes of disk, "
                'where keys would be read whole each time: give "disk": 0 and enough host memory for all keys and '
                "values, or use a policy that chooses by less (quest, landmark, vq)"
            )
        if budget.device and POLICIES[choice.name].reads_all_keys:
            raise UsageError(
                f"policy {choice} reads from every key in each step, and the budget has {budget.device} bytes on the "
                "device, from where keys would cross to the host each time: leave device= out, or use a policy that "
                "chooses by less (quest, landmark, h2o)"
            )
        self.choice = choice
        """The policy of selection."""
        dense = choice.dense_layers if choice.lossy else len(plain)
        self.tiers = KvTiers(
            budget,
            layers=len(plain),
            folder=folder,
            block_tokens=block_tokens,
            device=device,
            owned=owned,
            dense_layers=dense,
            codec=codec,
        )
        self._figures = ChosenFigures(str(choice)) if choice.lossy else None
        self._known = known_configs().of(own) if self._switched else {}
        self._told = False
        self.prefills = measured_prefills().of(own)
        """What calls of the model took."""
        self.prefix = PrefixFigures()
        """What came of stores."""
        self.sentences: SentenceEnds | None = None
        """Where sentences end, for a policy that asks for them; None where nobody tells."""
        stopwatch = CallStopwatch(len(plain), self.prefills)
        learned = weakref.WeakMethod(self._learn)
        leaders: dict[int, list[Policy]] = {}
        self._tiered = [
            TieredLayer(
                self.tiers,
                number,
                known=self._known.get(number, False),
                learned=_call(learned),
                stopwatch=stopwatch,
                choosing=None
                if self._figures is None or number < dense
                else Choosing(choice, number, self._figures, leaders),
            )
            for number in range(len(plain))
        ]
        for index, layer in zip(plain, self._tiered, strict=True):
            self.layers[index] = layer
            layer.config = own
        self._finalizer = weakref.finalize(self, self.tiers.close)

    def __deepcopy__(self, memo: object) -> TieredCache:
        raise UsageError(
            "a cache in tiers is not copied: use batch_repeat_interleave for more sequences with the same beginning, "
            "which shares its blocks, or crop it to begin again from there"
        )

    def __iter__(self) -> Iterator[Any]:
        """Keys and values of each layer, put together, as `DynamicCache` gives them."""
        plain = super().__iter__()  # type: ignore[no-untyped-call]
        for own, layer in zip(plain, self.layers, strict=True):
            yield (*layer.whole(), *own[2:]) if isinstance(layer, TieredLayer) else own

    @property
    def all_in_tiers(self) -> bool:
        """Whether no layer keeps anything elsewhere."""
        return len(self._tiered) == len(self.layers)

    @property
    def attends_in_blocks(self) -> bool:
        """Whether every layer in tiers is known to be attended to in blocks, so that none needs a mask."""
        return all(layer.way is Way.BLOCKS for layer in self._tiered)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a layer's keys with so many queries more."""
        if layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], TieredLayer):
            masks_for(self)
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset

    def hear_padding(self, mask: torch.Tensor | None, rows: int, length: int) -> bool:
        """Hear of a mask [rows, length]; whether it hides just the padding at the beginning of rows.

        Raises:
            UsageError: it shows what was padding before, of which nothing was kept.
        """
        if mask is None:
            mask = torch.ones(rows, length, dtype=torch.bool)
        if mask.dim() != 2 or mask.shape[1] != length:
            return False
        shown = mask.bool()
        leading = (shown.cumsum(dim=1) == 0).sum(dim=1)
        before = self.tiers.paddings
        if before is not None and len(before) == rows and self.get_seq_length():
            stored = min(length, self.get_seq_length())
            if any(start < min(padding, stored) for start, padding in zip(leading.tolist(), before, strict=True)):
                raise UsageError(
                    f"the mask shows positions that were padding when they came ({list(before)} of each row), of which "
                    "the cache keeps nothing: pass the attention_mask of the whole sequence, earlier calls included"
                )
        if not bool((shown.sum(dim=1) == length - leading).all()):
            return False
        return self.tiers.pad(leading.tolist())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i goes on as a copy of row `beam_idx[i]`.

        Raises:
            UsageError: rows are to become two, and a policy follows each by itself; nothing has changed then.
        """
        self._require_apart([int(row) for row in beam_idx.tolist()])
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Raises:
            UsageError: see `reorder_cache`.
        """
        self._require_apart([0] * repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows.

        Raises:
            UsageError: see `reorder_cache`.
        """
        store = self.tiers.store(0)
        self._require_apart(torch.arange(0 if store is None else store.rows)[indices.cpu()].tolist())
        super().batch_select_indices(indices)

    def look_at(self, model: Any) -> None:
        """Find out how a model attends before it is called: a cache that is filled first cannot see it in time.

        Args:
            model: Whose config the cache was given. It is not called.
        """
        unknown = [number for number, layer in enumerate(self._tiered) if layer.way is Way.UNKNOWN]
        if not unknown or not self._switched:
            return
        found = probe(model)
        for number in unknown:
            if number in found:
                self._tiered[number].way = Way.BLOCKS if found[number] else Way.WHOLE
                self._learn(number, found[number])

    def hear_sentences(self, model: Any, tokens: Collection[int]) -> None:
        """Have a policy that chooses sentences ("sentencekv") know where they end: else a block's length ends them.

        Args:
            model: Which is called with this cache, and with token ids.
            tokens: Ids that end a sentence.
        """
        self.sentences = SentenceEnds(tokens)
        for layer in self._tiered:
            layer.hear_sentences(self.sentences)
        listen(model, self, self.sentences)

    def statistics(self) -> KvStatistics:
        """A frozen record of what is where, and of what was read and written."""
        figures = replace(self.tiers.statistics(), prefix=self.prefix if self.prefix.hit_tokens else None)
        return figures if self._figures is None else replace(figures, chosen=self._figures.statistics())

    def close(self) -> None:
        """Stop reads and writes, remove the files, give all memory back. More than once does no harm."""
        self._finalizer()

    def _require_apart(self, sources: Sequence[int]) -> None:
        """Ask all layers before the first one changes."""
        for layer in self._tiered:
            layer.require_apart(sources)

    def _learn(self, number: int, passes: bool) -> None:
        self._known[number] = passes
        if not passes and not self._told:
            self._told = True
            logger.warning(
                "keys and values of layer %d (and perhaps of others) are put together for each call: %s. Results are "
                "right, and memory for one layer of the whole context is needed besides.",
                number,
                "this model does more with them than to attend to them"
                if self._switched
                else "the attention that the model was loaded with cannot be replaced; load it with "
                'attn_implementation="sdpa"',
            )


class TieredEncoderDecoderCache(EncoderDecoderCache):
    """The same for an encoder–decoder: its own keys and values in tiers, those of the encoder's output in memory."""

    def __init__(self, config: Any, budget: KvBudget, **settings: Any) -> None:
        own = TieredCache(config, budget, **settings)
        super().__init__(own, DynamicCache(config=config.get_text_config(decoder=True)))
        self._own = own

    def statistics(self) -> KvStatistics:
        """See `TieredCache`."""
        return self._own.statistics()

    def close(self) -> None:
        """See `TieredCache`."""
        self._own.close()


def _call(method: weakref.WeakMethod[Any]) -> Any:
    """A method of what may be gone: layers must not keep their cache alive."""

    def call(number: int, passes: bool) -> None:
        alive = method()
        if alive is not None:
            alive(number, passes)

    return call
