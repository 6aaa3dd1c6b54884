"""One layer of the cache, as transformers sees it.

In its first call a layer is empty, so what a model attends to is exactly what it brings, and nothing can go wrong: the
layer watches whether these very tensors reach our attention, once, with nothing that it does not know. If so, later
calls get back only what they brought, and our attention finds the rest. If not, they get all keys and values, put
together for the call: right, but it takes as much memory as one layer of a plain cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from ...memory.errors import PenstockError, UsageError
from .attention import Asked, attend
from .choosing import Choosing
from .sentences import SentenceEnds
from .stopwatch import CallStopwatch
from .tiers import KvTiers


class Way(Enum):
    """How a layer's keys and values get to the model's attention."""

    UNKNOWN = "not known yet"
    BLOCKS = "our attention finds them in blocks"
    WHOLE = "they are put together for each call"


class _Calls(threading.local):
    """The layer that was updated last in a thread: the next attention is its, or nobody's."""

    last: weakref.ref[TieredLayer] | None = None

    @property
    def layer(self) -> TieredLayer | None:
        """It; None where it is gone, or there is none."""
        return None if self.last is None else self.last()

    @layer.setter
    def layer(self, layer: TieredLayer | None) -> None:
        self.last = None if layer is None else weakref.ref(layer)


_calls = _Calls()


def updated_layer() -> TieredLayer | None:
    """The layer of a tiered cache that this thread updated last."""
    return _calls.layer


class TieredLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in blocks.

    Args:
        tiers: Of the cache.
        number: Of the layer among those in tiers.
        known: Whether models with this config are known to pass on what they get.
        learned: Called when that is found out.
        choosing: Policies of selection; None where all is attended to.
        stopwatch: Times calls; None where nobody wants to know.
    """

    is_croppable = True

    def __init__(
        self,
        tiers: KvTiers,
        number: int,
        *,
        known: bool,
        learned: Callable[[int, bool], None],
        choosing: Choosing | None = None,
        stopwatch: CallStopwatch | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.way = Way.BLOCKS if known else Way.UNKNOWN
        self._tiers = tiers
        self._number = number
        self.config: Any = None
        """Of the model's decoder, where that is known."""
        self._learned = learned
        self._choosing = choosing
        self._stopwatch = stopwatch
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        """New keys and values that `update` gave back and that are not in blocks yet."""
        self._shown: tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]] | None = None
        """What it gave back while the way is not known."""
        self._uses = 0
        """Of that, by our attention."""

    def hear_sentences(self, ends: SentenceEnds) -> None:
        """Have policies of selection be told where sentences end."""
        if self._choosing is not None:
            self._choosing.sentences = ends

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens [rows, kv_heads, tokens, dim]; gives back what the model is to attend to.

        Raises:
            UsageError: a gradient is wanted, or tokens of another shape; or a policy is to choose, and the model does
                not let it.
            PenstockError: the model did not attend to what it was given before, or a call was interrupted.
            DoesNotFitError: budgets have no room.
            DiskError: a drive failed.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UsageError(
                "a tiered cache keeps no graph of gradients: run the model under torch.no_grad() or "
                "torch.inference_mode(), as generate does, or with use_cache=False to train"
            )
        self._require_consumed(_calls.layer)
        _calls.layer = self
        self.learn()
        if self._choosing is not None and self.way is Way.WHOLE:
            raise UsageError(
                f"layer {self._number} of the model does more with its keys and values than to attend to them, so that "
                'it needs all of them, and a policy of selection cannot choose: make a cache with policy="exact"'
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._tiers.require_in_step(self._number, key_states.shape[2])
        if self._stopwatch is not None:
            self._stopwatch.passes(self._number, self._stored(), key_states)
        if self.way is Way.BLOCKS:
            self._pending = (key_states, value_states)
            return self._pending
        empty = self.get_seq_length() == 0
        with self._tiers.in_whole():
            self._tiers.append(self._number, key_states, value_states)
            if not empty:
                found = self._tiers.reader.whole(self._number)
                key_states, value_states = found[0].to(self.device), found[1].to(self.device)
        self._shown, self._uses = (weakref.ref(key_states), weakref.ref(value_states)), 0
        return key_states, value_states

    def claims(self, key: torch.Tensor, value: torch.Tensor, *, config: Any, strange: str) -> bool:
        """Whether attention to these tensors is ours to compute: they are what was given, and there is more.

        Args:
            key: As attention got it.
            value: Likewise.
            config: Of the module that attends; None where it has none.
            strange: What our attention does not know how to do about this call; empty where it knows all.

        Raises:
            PenstockError: they are not what was given, though they always were, or are used twice.
        """
        if config is not None and self.config is not None and config is not self.config:
            return False  # another model: a call of this one was interrupted
        if self.way is not Way.BLOCKS:
            same = self._shown is not None and key is self._shown[0]() and value is self._shown[1]()
            if same:
                self._uses += 2 if strange else 1
            return False
        pending, self._pending = self._pending, None
        if pending is None:
            return False  # attention to something else: of an encoder, or of another cache
        if key is not pending[0] or value is not pending[1] or strange:
            self._learned(self._number, False)
            raise PenstockError(
                f"layer {self._number} of the model does to its keys and values what it did not do in its first call"
                f"{': ' + strange if strange else ''}, and the result would be wrong. Make a new cache: it will put "
                "keys and values together for this model"
            )
        self._pending = pending
        return True

    def attend(
        self,
        query: torch.Tensor,
        *,
        scale: float,
        mask: torch.Tensor | None,
        cap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of what was just given to `update`: [rows, queries, heads, value dim].

        Raises:
            PenstockError: the mask is of other keys than there are.
            DiskError: a drive failed.
        """
        pending, self._pending = self._pending, None
        assert pending is not None, self._number
        keys, values = pending
        before = self._stored()
        if mask is not None and mask.shape[-1] != before + keys.shape[2]:
            self._learned(self._number, False)
            raise PenstockError(
                f"the model's mask is of {mask.shape[-1]} positions, and there are {before + keys.shape[2]}: it cut it "
                "to the keys that it was given. Make a new cache: it will put keys and values together for this model"
            )
        asked = Asked(
            query=query,
            keys=keys,
            values=values,
            scale=scale,
            mask=mask,
            cap=cap,
            sinks=sinks,
            paddings=self._tiers.paddings_of(self._number, keys.shape[0]),
            before=before,
            cold=self._tiers.reader.cold(self._number),
            widening=self._tiers.widening,
        )
        with self._tiers.in_whole():
            if self._choosing is None:
                out = attend(asked, self._tiers.reader.blocks(self._number, queries=asked.group * keys.shape[2]))
            else:
                out = self._choosing.attend(asked, self._tiers)
            self._tiers.append(self._number, keys, values)
        _calls.layer = None
        return out

    def whole(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """All keys and values, [rows, kv_heads, positions, dim] each, 0 where padding is; None before the first token.

        Raises:
            DiskError: a drive failed.
        """
        if not self._stored():
            return None, None
        keys, values = self._tiers.reader.whole(self._number)
        return keys.to(self.device), values.to(self.device)

    def get_seq_length(self) -> int:
        """Positions, padding counted."""
        return self._stored() + (0 if self._pending is None else self._pending[0].shape[2])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many tokens at the end, as a number that is not positive; a positive one is how many to keep."""
        length, wanted = self.get_seq_length(), int(tokens_to_remove)  # older transformers give a tensor
        keep = length + wanted if wanted <= 0 else min(wanted, length)
        self._require_consumed(self)
        if keep < length:
            self._tiers.crop(self._number, max(keep, 0))
            if self._choosing is not None:
                self._choosing.cropped(max(keep, 0), self._tiers)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on as a copy of row `beam_idx[i]`: blocks are shared."""
        self._select([int(row) for row in beam_idx.tolist()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._select([row for row in range(self._rows()) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        chosen = torch.arange(self._rows())[indices.cpu()]
        self._select(chosen.tolist())

    def reset(self) -> None:
        """Forget all tokens; what was learned of the model stays."""
        self._pending = self._shown = None
        if _calls.layer is self:
            _calls.layer = None
        self.is_initialized = False
        self._tiers.reset(self._number)
        if self._choosing is not None:
            self._choosing.reset()

    def require_apart(self, sources: Sequence[int]) -> None:
        """See that no row is to become two where a policy follows each by itself.

        Raises:
            UsageError: one is.
        """
        if self._choosing is not None:
            self._choosing.require_apart(sources)

    def offload(self) -> None:
        """Nothing: blocks are where they belong."""

    def prefetch(self) -> None:
        """Nothing, likewise."""

    def learn(self) -> None:
        """See what the last call showed, where it was the first."""
        if self.way is not Way.UNKNOWN or self._shown is None:
            return
        passes = self._uses == 1
        self.way = Way.BLOCKS if passes else Way.WHOLE
        self._shown = None
        self._learned(self._number, passes)

    def _stored(self) -> int:
        store = self._tiers.store(self._number)
        return 0 if store is None else store.tokens

    def _rows(self) -> int:
        store = self._tiers.store(self._number)
        return 0 if store is None else store.rows

    def _select(self, rows: Sequence[int]) -> None:
        self._require_consumed(self)
        self.require_apart(rows)
        with self._tiers.in_whole():  # layers before this one have been reordered already
            self._tiers.reorder(self._number, rows)
            if self._choosing is not None:
                self._choosing.reordered(rows)

    def _require_consumed(self, layer: TieredLayer | None) -> None:
        if layer is None or layer._pending is None:
            return
        layer._pending = None
        raise PenstockError(
            f"the attention of layer {layer._number} was not computed from what the cache gave, or a call was "
            "interrupted: the cache has lost tokens. Reset it, and begin again"
        )
