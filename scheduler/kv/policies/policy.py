"""What a policy of selection is: it names keys and values to attend to, and deletes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ....memory.errors import UsageError
from ..shape import TOKENS

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The heads of one layer."""

    kv_heads: int
    group: int
    """Query heads that share a key-value head."""
    dim: int
    itemsize: int
    """Bytes of an element of keys and values, as they are stored."""

    @property
    def key_nbytes(self) -> int:
        """One key of one head; a value takes as much."""
        return self.dim * self.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How much is attended to, of one layer and sequence."""

    budget_tokens: int
    """Per key-value head, all that is always kept included."""
    sinks: int = 4
    """First tokens, which are always kept: much attention goes there whatever they are (StreamingLLM, 2309.17453)."""
    recent: int = 64
    """Last tokens, which are always kept, the current one among them."""
    block_tokens: int = TOKENS
    """Of a block, for policies that choose whole ones."""

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1 or self.block_tokens < 1:
            raise UsageError(f"a policy keeps at least the last token, and blocks have at least one: {self}")
        if self.budget_tokens < self.sinks + self.recent:
            raise UsageError(
                f"a budget of {self.budget_tokens} tokens is less than the {self.sinks} first and {self.recent} last "
                "ones that are always kept: give a larger budget, or keep fewer"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What is asked of one layer in one step."""

    values: FloatArray
    """[kv_heads, rows, dim], rotated as the keys are. Rows are the heads of a group; in prefill, times queries."""
    tokens: int
    """How many keys there are, the newest one included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What became of a step: how much attention each key got."""

    tokens: tuple[IntArray, ...]
    """Of each head: which keys were attended to."""
    mass: tuple[FloatArray, ...]
    """Of each head: the attention that each of them got, summed over queries and the heads of the group."""
    queries: int = 1
    prompt: bool = False
    """Whether these were the last queries of a prompt, which attended to all keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What to attend to, and what it took to choose."""

    ids: tuple[IntArray, ...]
    """Of each key-value head, ascending: numbers of units of `unit_tokens` tokens."""
    unit_tokens: int
    scored_nbytes: int
    """Read in order to choose: keys, parts of keys, or what was kept about them. Not what is attended to then."""

    def tokens(self, head: int, count: int) -> IntArray:
        """Numbers of the tokens that a head attends to, of `count`."""
        spread = (self.ids[head][:, None] * self.unit_tokens + np.arange(self.unit_tokens)).ravel()
        return spread[spread < count]

    def attended_nbytes(self, heads: Heads, count: int) -> int:
        """Keys and values that are read then."""
        return sum(2 * heads.key_nbytes * len(self.tokens(head, count)) for head in range(heads.kv_heads))


class Keys(Protocol):
    """Stored keys of one layer and sequence. What is read here is read from where they lie, and counts."""

    def rows(self, head: int, tokens: IntArray) -> FloatArray:
        """Whole keys: [tokens, dim]."""

    def channels(self, head: int, channels: IntArray, start: int, stop: int) -> FloatArray:
        """Some elements of each key from `start` to `stop`, [tokens, channels], from a copy arranged by channel."""


class Policy(Protocol):
    """Chooses keys of one layer and one sequence. Its name is what `--kv-policy` takes."""

    name: ClassVar[str]
    summary: ClassVar[str]
    hears_prompts: bool
    """Whether it wants to know what the last queries of a prompt attended to: keys are read once more for that."""
    hears_steps: bool
    """Whether it wants to know what each later step attended to."""
    for_prompts: bool
    """Whether it chooses for prompts as well. All others leave those as they are."""
    reads_all_keys: bool
    """Whether it reads from every stored key in each step: those have to be in memory."""

    def __init__(self, heads: Heads, setting: Setting) -> None: ...

    def appended(self, keys: FloatArray) -> None:
        """New keys were made, [kv_heads, tokens, dim]; they are at hand, so that looking at them reads nothing."""

    def ended(self, tokens: IntArray) -> None:
        """Sentences end with these tokens, which were appended just now."""

    def attended(self, seen: Seen) -> None:
        """A step is over."""

    def cropped(self, tokens: int, keys: Keys) -> None:
        """All but the first `tokens` keys are forgotten."""

    def select(self, query: Query, keys: Keys) -> Selection:
        """What to attend to in this step."""
