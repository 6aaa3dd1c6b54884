"""Carries out `penstock chat`. Imported late: torch and transformers take seconds."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, Final

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from ..api import close, explain, load
from ..caches import cache_folder
from ..memory.errors import PenstockError, UsageError
from ..memory.prefix import KvIdentity, PrefixStore, is_prefix_store
from ..runtime.kv.identity import identity_of
from ..runtime.kv.prefix import load_prefix, store_prefix
from ..runtime.kv.prefixchoice import PrefixCosts
from ..runtime.pretrained import locate
from ..scheduler.kv.shape import TOKENS
from .chat import ChatRequest
from .generation import check_continues
from .kv_cache import KvRoom, chunks, make_cache, prefix_costs, read_config, render_lossy, whole_context
from .kv_option import KvOption
from .output import Output
from .text import Relay, find_tokenizer, writer_for

NEW_CAPACITY: Final = 4 * 2**30
"""Of a prefix store that is made here."""


class ReplyStop(StoppingCriteria):
    """Ends a reply after Ctrl-C, between two tokens, so that nothing is left half done."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Whether rows are finished: [rows]."""
        return torch.full((input_ids.shape[0],), self.asked, dtype=torch.bool, device=input_ids.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C meanwhile. A second one, before the reply has ended, interrupts."""
        self.asked = False

        def came(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, came)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Conversation:
    """What was said, and what was computed of it.

    Args:
        model: Loaded.
        tokenizer: With a chat template.
        cache: Of keys and values; empty.
        request: What was asked for.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: Any, request: ChatRequest) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._cache = cache
        self._request = request
        self._stop = ReplyStop()
        self.messages: list[dict[str, str]] = []
        if request.system is not None:
            self.messages.append({"role": "system", "content": request.system})
        self.tokens: list[int] = []
        """That the cache has keys and values of."""

    def begin(self, tokens: list[int], loader: Callable[[list[int]], int]) -> None:
        """Have the cache hold as much of a prompt's beginning as it can: what it has of it, or what a store has."""
        same = next((at for at, (a, b) in enumerate(zip(self.tokens, tokens, strict=False)) if a != b), None)
        kept = min(len(self.tokens) if same is None else same, len(tokens) - 1)
        if kept < len(self.tokens) and not getattr(self._cache, "all_in_tiers", False):
            kept = 0  # layers with a window have forgotten what came before it, and states cannot go back
        if kept and kept < len(self.tokens):
            self._cache.crop(kept - len(self.tokens))
        self.tokens = tokens[:kept]
        if not kept:
            self._cache.reset()
            self.tokens = tokens[: loader(tokens)]
            sentences = getattr(self._cache, "sentences", None)
            if sentences is not None:  # of what a store had: the model is not called with it
                sentences.hear(torch.tensor([self.tokens]), 0)

    def reply(self, message: str, loader: Callable[[list[int]], int]) -> None:
        """Answer a message, to stdout as it comes.

        Raises:
            UsageError: the conversation is longer than its context.
        """
        said = [*self.messages, {"role": "user", "content": message}]
        tokens = self._encode(said)
        room = self._request.context - len(tokens)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(tokens)} tokens now, and --context is {self._request.context}: begin a new "
                "one, or raise --context"
            )
        self.begin(tokens, loader)
        relay = Relay(writer_for(self._tokenizer), lambda: None)
        input_ids = torch.tensor([tokens], device=self._model.device)
        with self._stop.listening():
            self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=min(self._request.max_new_tokens, room),
                num_beams=1,
                num_return_sequences=1,
                past_key_values=self._cache,
                streamer=relay,
                stopping_criteria=StoppingCriteriaList([self._stop]),
                **chunks(len(tokens) - len(self.tokens), self._model),
                **self._request.sampling.options(),
            )
        self.tokens = [*tokens, *relay.ids][: self._cache.get_seq_length()]
        text = self._tokenizer.decode(relay.ids, skip_special_tokens=True)
        self.messages = [*said, {"role": "assistant", "content": text}]

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])


class Prefixes:
    """A prefix store, as a conversation uses it: whatever fails in it costs computing, and never a reply.

    Args:
        store: Opened for writing.
        identity: Of the model.
        output: Where it is told what came of it.
        costs: What computing and reading take; None to read whatever is there.
    """

    def __init__(self, store: PrefixStore, identity: KvIdentity, output: Output, costs: PrefixCosts | None) -> None:
        self._store = store
        self._identity = identity
        self._output = output
        self._costs = costs

    def load(self, cache: Any, tokens: list[int]) -> int:
        """Fill an empty cache; returns the number of tokens that it has then."""
        try:
            loaded = load_prefix(
                cache, self._store, self._identity, tokens, costs=self._costs, always_read=self._costs is None
            )
        except PenstockError as error:
            self._tell(error)
            cache.reset()
            return 0
        if loaded.tokens:
            self._output.notes.print(f"{loaded.tokens} tokens were read, and are not computed again", markup=False)
        if loaded.recomputed_tokens:
            self._output.notes.print(
                f"{loaded.recomputed_tokens} tokens that are stored are computed again, which takes less time than to "
                "read them",
                markup=False,
            )
        return loaded.tokens

    def keep(self, cache: Any, tokens: list[int]) -> None:
        """Store what the cache has."""
        try:
            report = store_prefix(cache, self._store, self._identity, tokens)
        except PenstockError as error:
            self._tell(error)
            return
        if report.reason:
            self._tell(report.reason)

    def _tell(self, reason: object) -> None:
        self._output.notes.print(f"the prefix store is of no use now: {reason}", markup=False)


def carry_out(request: ChatRequest, output: Output) -> None:
    """Load, then answer line by line."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it advises on arguments of its own
    with output.busy("loading"):
        folder = locate(request.checkpoint, trust_remote_code=request.trust_remote_code)
        tokenizer = find_tokenizer(folder, trust_remote_code=request.trust_remote_code)
        if tokenizer is None or not tokenizer.chat_template:
            raise UsageError(
                f"{request.checkpoint} has no {'tokenizer' if tokenizer is None else 'chat template'}: chat needs a "
                "checkpoint that was tuned for it; `penstock run` continues texts"
            )
        config, dtype = read_config(folder, request.dtype, trust_remote_code=request.trust_remote_code)
        request = _within_positions(request, config, output)
        kv = request.kv or KvOption(
            host=whole_context(config, dtype, request.context, request.codec),
            disk=0,
            choice=request.policy,
            codec=request.codec,
        )
        room = KvRoom(config=config, dtype=dtype, option=kv)
        with room.kept():
            model = load(
                folder,
                max_memory=request.max_memory,
                device=request.device,
                dtype=request.dtype,
                disk=request.disk,
                context=room.planned_context(request.context),
                batch=1,
                trust_remote_code=request.trust_remote_code,
            )
    with ExitStack() as stack:
        stack.callback(close, model)
        check_continues(model, [], 1)
        output.notes.print(explain(model))
        cache = make_cache(model, kv, request.disk, request.device, tokenizer)
        stack.callback(cache.close)
        if request.sampling.seed is not None:
            torch.manual_seed(request.sampling.seed)
        prefixes = _prefixes(request, folder, model, cache, output, stack)
        if prefixes is not None:
            cache.look_at(model)
        _talk(Conversation(model, tokenizer, cache, request), cache, prefixes, output)
        for line in render_lossy(cache.statistics()):
            output.notes.print(line, markup=False)


def _within_positions(request: ChatRequest, config: Any, output: Output) -> ChatRequest:
    """The same with a context that the model has positions for."""
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(longest, int) or request.context <= longest:
        return request
    output.notes.print(f"the model has {longest} positions: the conversation ends there", markup=False)
    return replace(request, context=longest)


def _talk(conversation: Conversation, cache: Any, prefixes: Prefixes | None, output: Output) -> None:
    while (message := _next_message(output)) is not None:
        if message:
            conversation.reply(message, lambda tokens: 0 if prefixes is None else prefixes.load(cache, tokens))
            if prefixes is not None:
                prefixes.keep(cache, conversation.tokens)


def _next_message(output: Output) -> str | None:
    """A line of stdin; None at its end, or at Ctrl-C."""
    if sys.stdin.isatty():
        output.notes.print("> ", end="")
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        output.notes.print()
        return None
    return line.strip() if line else None


def _prefixes(
    request: ChatRequest, folder: str, model: Any, cache: Any, output: Output, stack: ExitStack
) -> Prefixes | None:
    """The prefix store; None where it is not wanted, or cannot be had, which is said."""
    if not request.use_store:
        return None
    try:
        if not getattr(cache, "all_in_tiers", False):
            raise UsageError("this model keeps more than keys and values of blocks")
        if request.codec is not None:
            raise UsageError(f"a prefix store has keys and values as they were made, and not as {request.codec}")
        store = _open_store(request)
        stack.callback(store.close)
        salt = request.policy.salt  # what a lossy policy computes is nobody else's
        identity = identity_of(folder, model.config, model.dtype, block_tokens=TOKENS, salt=salt)
        costs = None if request.always_read else prefix_costs(model, store.folder)
        return Prefixes(store, identity, output, costs)
    except PenstockError as error:
        if request.store is not None:
            raise
        output.notes.print(f"conversations are not kept: {error}", markup=False)
        return None


def _open_store(request: ChatRequest) -> PrefixStore:
    where = request.store or cache_folder() / "prefixes"
    capacity = request.capacity_nbytes
    if capacity is None and not is_prefix_store(where):
        capacity = NEW_CAPACITY
    return PrefixStore(where, capacity)
