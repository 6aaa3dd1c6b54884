"""Attention of one layer by policies of selection: one for each row, which read what they choose and nothing else.

Prompts (calls with several tokens) attend to all, unless the policy is one for prompts; then policies hear what the
last queries attended to, if they want to. A call with one token attends to what was chosen. Nothing is deleted.

What was chosen is attended to by the processor in whose memory it is, and merged by the logs of its sums: where a
device has a part of the keys and values, none of them crosses to be attended to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from ...kernels.attention_chosen import attend_chosen
from ...kernels.attention_merge import EMPTY, Merging
from ...kernels.attention_partial import bias_of
from ...memory.errors import UsageError
from ...scheduler.kv.choice import PolicyChoice
from ...scheduler.kv.chosen import ChosenFigures
from ...scheduler.kv.policies import policy
from ...scheduler.kv.policies.policy import FloatArray, Heads, IntArray, Policy, Query, Seen
from ...scheduler.kv.policies.windowkv import LAYERS, WindowKv
from .attention import Asked, finish, merged
from .sentences import SentenceEnds
from .stored import StoredRow
from .tiers import KvTiers

VOTERS: Final = 32
"""Last queries of a prompt, whose attention policies hear of (SnapKV's window)."""
QUERIES: Final = 64
"""Of a prompt, for which a policy for prompts chooses at once."""
PIECE_TOKENS: Final = 1024
"""Of stored keys that are looked at once, outside of attention."""

_CPU: Final = torch.device("cpu")

_Chosen = tuple[int, int, list[IntArray]]
"""First query and the one after the last, and the tokens that they attend to, of each head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Own:
    """One row in one call."""

    row: int
    padding: int
    """Positions before its first token, as far as there are."""
    skip: int
    """New positions that are padding."""
    stored: StoredRow
    policy: Policy
    tokens: int
    """With the new ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """Attention of some queries of a row to what was chosen, in host memory, and what each key got."""

    merging: Merging
    """[kv_heads, group · queries, value dim]."""
    parts: list[tuple[Sequence[IntArray], torch.Tensor, torch.Tensor]]
    """Tokens of each head, their part's ℓ, and the attention that they got of it."""

    @classmethod
    def of(cls, asked: Asked, heads: int, queries: int) -> _Found:
        """Nothing yet."""
        return cls(merging=Merging.of((heads, asked.group * queries, asked.values.shape[3]), _CPU), parts=[])

    def add(self, asked: Asked, own: _Own, chosen: _Chosen, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Attend to what was gathered, wherever it is."""
        start, stop, ids = chosen
        bias = _bias(asked, own, ids, start, stop)
        out, lse, weights = attend_chosen(
            _rows_of(asked, own.row, start, stop, keys.device),
            keys,
            values,
            scale=asked.scale,
            bias=None if bias is None else bias.to(keys.device),
            cap=asked.cap,
        )
        self.parts.append((ids, lse.to(_CPU), weights))
        self.merging.add(out.to(_CPU), self.parts[-1][1])

    def mass(self, ids: Sequence[IntArray]) -> tuple[FloatArray, ...]:
        """What each of the tokens of a head got, of all its queries together."""
        found = tuple(np.zeros(len(one), np.float32) for one in ids)
        for some, lse, weights in self.parts:
            shares = (lse - self.merging.lse).exp().nan_to_num(0.0)  # a query that sees nothing has no share of it
            got = (weights.to(_CPU) * shares[..., None]).sum(dim=1).numpy()
            for head, (tokens, of_head) in enumerate(zip(some, found, strict=True)):
                of_head[np.searchsorted(ids[head], tokens)] = got[head, : len(tokens)]
        return found


class Choosing:
    """The policies of one layer.

    Args:
        choice: Which policy, with how much.
        number: Of the layer, among those in tiers.
        figures: Of the cache.
        leaders: Policies of layers before this one that others may follow, by layer; shared by all layers of a cache.
    """

    def __init__(
        self, choice: PolicyChoice, number: int, figures: ChosenFigures, leaders: dict[int, list[Policy]]
    ) -> None:
        self._choice = choice
        self._number = number
        self._figures = figures
        self._leaders = leaders
        self._policies: list[Policy] = []
        self._known: list[int] = []
        """Tokens that each policy has seen."""
        self.sentences: SentenceEnds | None = None
        """Where sentences end; None where nobody tells."""
        self._calls = 0

    def attend(self, asked: Asked, tiers: KvTiers) -> torch.Tensor:
        """See `attention.attend`.

        Raises:
            UsageError: the budget does not hold what is always kept.
            DiskError: what is wanted cannot be read.
        """
        rows = self._rows(asked, tiers)
        late = [self._tell(own, asked.query.shape[2] - own.skip) for own in rows]
        prompt = asked.query.shape[2] > 1 or any(late)
        if not prompt or self._policies[0].for_prompts:
            return self._attend_chosen(asked, tiers, rows)
        merging = merged(asked, tiers.reader.blocks(self._number, queries=asked.group * asked.query.shape[2]))
        for own in rows:
            if own.policy.hears_prompts and own.skip < asked.query.shape[2]:
                own.policy.attended(_votes(asked, own, merging))
        return finish(asked, merging)

    def cropped(self, positions: int, tiers: KvTiers) -> None:
        """A layer has been cropped to so many positions."""
        paddings = tiers.paddings_of(self._number, len(self._policies))
        for row, made in enumerate(self._policies):
            tokens = max(0, positions - paddings[row])
            if tokens < self._known[row]:
                made.cropped(tokens, tiers.reader.row(self._number, row))
                self._known[row] = tokens

    def require_apart(self, sources: Sequence[int]) -> None:
        """See that no row is to become two.

        Raises:
            UsageError: one is.
        """
        if len(set(sources)) < len(sources) and self._policies:
            raise UsageError(
                f"policy {self._choice} follows each sequence by itself, and rows are to be copied (beams do so): use "
                'num_beams=1, or policy="exact"'
            )

    def reordered(self, sources: Sequence[int]) -> None:
        """Rows have changed places, or some are gone."""
        if self._policies:
            self._policies[:] = [self._policies[source] for source in sources]
            self._known = [self._known[source] for source in sources]

    def reset(self) -> None:
        """All tokens are forgotten."""
        self._policies, self._known = [], []
        self._leaders.pop(self._number, None)

    def _rows(self, asked: Asked, tiers: KvTiers) -> list[_Own]:
        count = asked.query.shape[2]
        if not self._policies:
            self._make(asked, tiers)
        store = tiers.store(self._number)
        home = _CPU if store is None else store.rooms.home
        found = []
        for row, made in enumerate(self._policies):
            padding = min(asked.paddings[row], asked.before + count)
            skip = min(max(0, padding - asked.before), count)
            new = (asked.keys[row, :, skip:].detach().to(home), asked.values[row, :, skip:].detach().to(home))
            stored = tiers.reader.row(self._number, row, new)
            tokens = asked.before + count - padding
            assert stored.tokens == tokens, (stored.tokens, tokens)
            found.append(_Own(row=row, padding=padding, skip=skip, stored=stored, policy=made, tokens=tokens))
        return found

    def _make(self, asked: Asked, tiers: KvTiers) -> None:
        heads = Heads(
            kv_heads=asked.keys.shape[1],
            group=asked.group,
            dim=asked.keys.shape[3],
            itemsize=asked.keys.dtype.itemsize,
        )
        setting, choice = self._choice.setting(tiers.block_tokens), self._choice
        for row in range(asked.query.shape[0]):
            made = policy(choice.name, heads, setting, layer=self._number, dense_layers=choice.dense_layers)
            leader = self._number - (self._number - choice.dense_layers) % LAYERS
            if isinstance(made, WindowKv) and leader != self._number:
                ahead = self._leaders[leader][row]
                assert isinstance(ahead, WindowKv), leader
                made.follow(ahead)
            self._policies.append(made)
            self._known.append(0)
        self._leaders[self._number] = self._policies

    def _tell(self, own: _Own, new: int) -> bool:
        """Show a policy keys that it has not seen; whether some of them are not new: they came from a prefix store."""
        known = self._known[own.row]
        late = known < own.tokens - new
        for first, keys in own.stored.pieces(known, own.tokens, PIECE_TOKENS):
            own.policy.appended(keys.float().numpy())
            if self.sentences is not None:
                start = own.padding + first
                own.policy.ended(self.sentences.within(own.row, start, start + keys.shape[1]) - own.padding)
        self._known[own.row] = own.tokens
        return late

    def _attend_chosen(self, asked: Asked, tiers: KvTiers, rows: Sequence[_Own]) -> torch.Tensor:
        batch, heads, count, _ = asked.query.shape
        merging = Merging.of((batch, heads // asked.group, asked.group * count, asked.values.shape[3]), _CPU)
        before = tiers.reader.read_nbytes()
        for own in rows:
            start = own.stored.gathered_nbytes
            self._attend_row(asked, own, merging)
            self._figures.gathered_nbytes += own.stored.gathered_nbytes - start
            self._figures.whole_nbytes += own.tokens * _token_nbytes(asked, tiers, self._number)
        self._figures.read_nbytes += tiers.reader.read_nbytes() - before
        self._figures.steps += 1
        if self._calls % self._choice.recall_every == 0:
            self._compare(asked, tiers, merging.lse)
        self._calls += 1
        return finish(asked, merging)

    def _attend_row(self, asked: Asked, own: _Own, merging: Merging) -> None:
        for chosen in self._choices(asked, own):
            self._attend_to(asked, own, merging, chosen)

    def _choices(self, asked: Asked, own: _Own) -> Iterator[list[_Chosen]]:
        """Choices for some queries after another, as many together as want no more than twice the budget.

        Those of one prompt want much the same, which is gathered once then, and a long prompt is not gathered whole.
        """
        count = asked.query.shape[2]
        together: list[_Chosen] = []
        wanted: list[IntArray] = []
        for start in range(own.skip, count, QUERIES):
            stop = min(start + QUERIES, count)
            tokens = own.tokens - count + stop
            selection = own.policy.select(_query(asked, own.row, start, stop, tokens), own.stored)
            self._figures.scored_nbytes += selection.scored_nbytes
            ids = [selection.tokens(head, tokens) for head in range(len(selection.ids))]
            wanted = [np.union1d(*pair) for pair in zip(wanted, ids, strict=True)] if together else ids
            if together and max(map(len, wanted)) > 2 * self._choice.budget_tokens:
                yield together
                together, wanted = [], ids
            together.append((start, stop, ids))
        if together:  # else nothing but padding
            yield together

    def _attend_to(self, asked: Asked, own: _Own, merging: Merging, chosen: list[_Chosen]) -> None:
        count = asked.query.shape[2]
        wanted = [np.unique(np.concatenate(of_head)) for of_head in zip(*(ids for _, _, ids in chosen), strict=True)]
        sides = own.stored.split(wanted)
        gatherers = (own.stored.gather, own.stored.gather_there)
        rooms = [gather(ids) if any(map(len, ids)) else None for gather, ids in zip(gatherers, sides, strict=True)]
        for start, stop, ids in chosen:
            found = _Found.of(asked, len(ids), stop - start)
            for room, all_of_it, mine in zip(rooms, sides, own.stored.split(ids), strict=True):
                if room is not None and any(map(len, mine)):
                    alike = all(len(one) == len(other) for one, other in zip(mine, all_of_it, strict=True))
                    keys, values = room if alike else tuple(_part(each, all_of_it, mine) for each in room)
                    found.add(asked, own, (start, stop, mine), keys, values)
            shape = (len(ids), asked.group, count)
            out, lse = found.merging.out, found.merging.lse
            merging.out[own.row].view(*shape, -1)[:, :, start:stop] = out.view(*shape[:2], stop - start, -1)
            merging.lse[own.row].view(shape)[:, :, start:stop] = lse.view(*shape[:2], stop - start)
            if count == 1 and own.policy.hears_steps:
                own.policy.attended(Seen(tokens=tuple(ids), mass=found.mass(ids)))

    def _compare(self, asked: Asked, tiers: KvTiers, lse: torch.Tensor) -> None:
        """What part of the attention to all went to what was chosen: exp(ℓ of what was chosen − ℓ of all)."""
        before = tiers.reader.read_nbytes()
        whole = merged(asked, tiers.reader.blocks(self._number, ahead=False)).lse.cpu()
        shares = (lse - whole).exp()[lse > EMPTY].clamp(max=1.0)
        self._figures.compared([float(share) for share in shares], tiers.reader.read_nbytes() - before)


def _token_nbytes(asked: Asked, tiers: KvTiers, number: int) -> int:
    """Keys and values of a token as they are stored; as they will be, before any are."""
    store = tiers.store(number)
    if store is not None:
        return store.layout.stored_token_nbytes
    heads, dims = asked.keys.shape[1], asked.keys.shape[3] + asked.values.shape[3]
    return heads * dims * asked.keys.dtype.itemsize


def _rows_of(asked: Asked, row: int, start: int, stop: int, home: torch.device = _CPU) -> torch.Tensor:
    """Some queries of a row as rows of its key-value heads, where keys are: [kv_heads, group · queries, dim]."""
    query = asked.query[row, :, start:stop].detach().to(home)
    return query.reshape(query.shape[0] // asked.group, -1, query.shape[2])


def _query(asked: Asked, row: int, start: int, stop: int, tokens: int) -> Query:
    """The same for a policy, whose own scale is one by the root of the head size."""
    rows = _rows_of(asked, row, start, stop).float()
    return Query(values=(rows * (asked.scale * rows.shape[2] ** 0.5)).numpy(), tokens=tokens)


def _part(room: torch.Tensor, wanted: Sequence[IntArray], ids: Sequence[IntArray]) -> torch.Tensor:
    """Of what was gathered for all queries what some of them chose: [kv_heads, the most of any head, dim]."""
    part = room.new_zeros(len(ids), max(len(one) for one in ids), room.shape[2])
    for head, (all_of_it, tokens) in enumerate(zip(wanted, ids, strict=True)):
        part[head, : len(tokens)] = room[head, torch.from_numpy(np.searchsorted(all_of_it, tokens))]
    return part


def _bias(asked: Asked, own: _Own, ids: Sequence[IntArray], start: int, stop: int) -> torch.Tensor | None:
    """What is added to scores of some queries and chosen tokens: [kv_heads, group · queries, tokens]; None for nothing.

    Later tokens are hidden, and what is beyond the number of a head's tokens; a model's mask is used as it is.
    """
    most = max(len(one) for one in ids)
    if stop - start == 1 and asked.mask is None and all(len(one) == most for one in ids):
        return None
    positions = torch.zeros(len(ids), most, dtype=torch.int64)
    beyond = torch.ones(len(ids), most, dtype=torch.bool)
    for head, tokens in enumerate(ids):
        positions[head, : len(tokens)] = torch.from_numpy(tokens) + own.padding
        beyond[head, : len(tokens)] = False
    bias = torch.zeros(len(ids), asked.group, stop - start, most)
    bias.masked_fill_(beyond[:, None, None], EMPTY)
    if asked.mask is None:
        queries = torch.arange(asked.before + start, asked.before + stop)[:, None]
        bias.masked_fill_(positions[:, None, None] > queries, EMPTY)
    else:
        mask = bias_of(asked.mask[own.row if len(asked.mask) > 1 else 0, :, start:stop].cpu(), torch.float32)
        for head in range(len(ids)):
            of_group = mask if len(mask) == 1 else mask[head * asked.group : (head + 1) * asked.group]
            bias[head] += of_group[:, :, positions[head]]
    return bias.view(len(ids), -1, most)


def _votes(asked: Asked, own: _Own, merging: Merging) -> Seen:
    """What the last queries of a prompt attended to: keys are read once more, since the sum is known only now."""
    count, kv_heads = asked.query.shape[2], asked.keys.shape[1]
    start = max(own.skip, count - VOTERS)
    lse = merging.lse[own.row].cpu().view(kv_heads, asked.group, count)[:, :, start:].reshape(kv_heads, -1, 1)
    lse = lse.masked_fill(lse == EMPTY, 0.0)
    query = _rows_of(asked, own.row, start, count).float()
    mass = np.zeros((kv_heads, own.tokens), np.float32)
    for first, keys in own.stored.pieces(0, own.tokens, PIECE_TOKENS):
        scores = query @ keys.float().transpose(1, 2) * asked.scale
        if asked.cap is not None:
            scores = torch.tanh(scores / asked.cap) * asked.cap
        ids: IntArray = np.arange(first, first + keys.shape[1])
        bias = _bias(asked, own, (ids,) * kv_heads, start, count)
        scores = scores if bias is None else scores + bias
        mass[:, first : first + keys.shape[1]] = (scores - lse).exp().sum(dim=1).numpy()
    everything: IntArray = np.arange(own.tokens)
    return Seen(tokens=(everything,) * kv_heads, mass=tuple(mass), queries=count - start, prompt=True)
