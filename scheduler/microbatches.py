"""How many prompts run together: micro-batches, how many of them at once, and how much of a prefill per sweep.

Each sweep over a streamed model costs the same reads whatever is computed with it, so many sequences should share it.
What limits them is the memory of their keys and values, and of a prefill's activations; what they take is missing for
weights that could stay. Every choice is weighed by the same estimate of the whole run's time; the cut itself depends on
the prompts and on the chosen sizes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..memory.errors import DoesNotFitError
from .alternation import Alternation, Split
from .curves import Curve
from .mixture import Mixture

MOST_LANES: Final = 16
"""Each lane is a thread with a team of its own for computing."""
MOST_ROWS: Final = 128
CHUNKS: Final = (None, 1024, 256, 64)
"""Tokens of each prompt to prefill in one sweep; None is all of them."""
MEMORY_RATE: Final = 1.5e10
"""Bytes per second at which a pass reads weights that are in memory, where nothing better is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prompt."""

    index: int
    prompt_tokens: int
    new_tokens: int
    """The most that it may be continued by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What sequences take of memory, in bytes."""

    kv_nbytes_per_token: float
    activation_nbytes_per_token: float
    """The most that one forward takes at once."""
    held_nbytes_per_token: float
    """What stays of that while other micro-batches have their turn."""
    logits_nbytes_per_sequence: float
    lane_nbytes: int = 0
    """What each micro-batch under way keeps besides, however many sequences it has."""
    meeting_nbytes_per_token: float = 0
    """What a token takes while it waits for those of all other micro-batches, to be computed with them; 0 where each
    micro-batch is computed by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What there is to share."""

    room_nbytes: int
    """For sequences; where `sweep_s` is None, for weights that stay as well."""
    weights_nbytes: int
    sweep_s: float | None
    """Seconds for which a sweep's blocks keep the links busy, experts left out, where that is decided; None: all that
    sequences leave of the room keeps weights, and the rest is read from disk."""
    mixture: Mixture | None = None
    """The experts of the model: which of them a sweep uses depends on its tokens. None where it has none, or uses all
    of them."""
    least_weights_nbytes: int = 0
    """Of the room, what the model needs to run at all."""
    disk_rate: float = 2e9
    memory_rate: float = MEMORY_RATE
    products: Curve | None = None
    """Bytes of weights per second that products take, by rows; None where that was not measured, and every pass is
    taken to read weights at `memory_rate`."""
    alternation: Alternation | None = None
    """Chooses what the CPU computes beside the device; None where that is not known, or there is one processor."""
    host_room_nbytes: int | None = None
    """For the keys and values of what the CPU computes, which are in host memory; None where that is not bound."""

    def pass_s(self, rows: int) -> float:
        """Seconds that so many rows compute with all weights that they use."""
        if self.mixture is None:
            return self._product_s(self.weights_nbytes, rows)
        each = rows * self.mixture.share / max(self.mixture.used(rows), self.mixture.share)
        rest = self._product_s(self.weights_nbytes - self.mixture.nbytes, rows)
        return rest + self._product_s(self.mixture.nbytes * self.mixture.used(rows), each)

    def _product_s(self, nbytes: float, rows: float) -> float:
        """Seconds of products with so many bytes: beyond the rows that were measured, as long for each row."""
        if self.products is None:
            return nbytes / self.memory_rate
        beyond = max(rows / self.products.x[-1], 1.0)
        return beyond * nbytes / self.products.at(max(rows, 1))

    def moved_s(self, needed_nbytes: float, rows: float) -> float:
        """Seconds for which the links are busy in a sweep of so many tokens, where sequences take so much memory."""
        if self.sweep_s is not None:
            return self.sweep_s + (0.0 if self.mixture is None else self.mixture.moved_s(rows))
        missing = max(0.0, self.weights_nbytes - max(0, self.room_nbytes - int(needed_nbytes)))
        if self.mixture is not None:  # the rest comes first; the same part of all experts is missing
            missing -= min(missing, self.mixture.nbytes) * (1.0 - self.mixture.used(rows))
        return missing / self.disk_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Prompts that run as one batch."""

    indices: tuple[int, ...]
    prompt_tokens: int
    """Of the longest."""
    new_tokens: int
    """The most that any of them may be continued by."""
    chunk: int | None = None
    """Tokens per prompt and sweep of its prefill; None for all at once."""

    def in_chunks(self, chunk: int | None) -> MicroBatch:
        """The same with its prefill in pieces, if it is longer than one."""
        return replace(self, chunk=chunk) if chunk is not None and self.prompt_tokens > chunk else self

    @property
    def prefill_tokens(self) -> int:
        """Tokens that a sweep of its prefill computes."""
        return len(self.indices) * min(self.prompt_tokens, self.chunk or self.prompt_tokens)

    @property
    def prefill_sweeps(self) -> int:
        """Sweeps that its prefill takes."""
        return -(-self.prompt_tokens // self.chunk) if self.chunk else 1

    @property
    def kv_tokens(self) -> int:
        """Tokens of keys and values that it holds at its end."""
        return len(self.indices) * (self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The choice."""

    batches: tuple[MicroBatch, ...]
    """In the order in which they begin."""
    lanes: int
    """Micro-batches under way at once."""
    prefill_tokens: int
    """The most prompt tokens that one sweep computes, if more than one micro-batch's."""
    nbytes: int
    """Memory that the sequences take at the most, estimated."""
    sweeps: int
    """Expected."""
    seconds: float
    """Expected; it only ranks choices."""
    cpu_share: float = 0.0
    """The part, by bytes, of the blocks that the CPU can compute from host memory that it does compute, while other
    micro-batches go on on the device. At 0 one processor computes."""


def schedule(
    jobs: Sequence[Job],
    footprint: Footprint,
    machine: Machine,
    *,
    pads: bool = True,
    rows: int | None = None,
    lanes: int | None = None,
    most_lanes: int = MOST_LANES,
) -> Schedule:
    """The choice that is expected to take the least time.

    Args:
        pads: Whether prompts of different lengths may share a micro-batch.
        rows: Prompts per micro-batch, where the caller has decided.
        lanes: Micro-batches at once, likewise.

    Raises:
        DoesNotFitError: not even one prompt at a time fits.
    """
    assert jobs
    best: Schedule | None = None
    needed = None
    for count in [rows] if rows else _row_counts(len(jobs)):
        whole = cut(jobs, count, pads=pads)
        for chunk in CHUNKS:
            batches = tuple(batch.in_chunks(chunk) for batch in whole)
            if chunk is not None and all(batch.chunk is None for batch in batches):
                continue  # the same as without
            for option in _options(batches, footprint, machine, lanes, most_lanes):
                needed = option.nbytes if needed is None else min(needed, option.nbytes)
                fits = option.nbytes + machine.least_weights_nbytes <= machine.room_nbytes
                if fits and (best is None or option.seconds < best.seconds):
                    best = option
    if best is None:
        assert needed is not None
        available = max(0, machine.room_nbytes - machine.least_weights_nbytes)
        raise DoesNotFitError(
            f"the longest prompts need {needed} bytes ({needed / 2**20:.1f} MiB) for keys, values and activations, "
            f"besides the weights; {available} bytes ({available / 2**20:.1f} MiB) are left. Give shorter prompts, "
            f"fewer new tokens, smaller micro-batches, or more memory",
            tier="host",
            needed_nbytes=needed,
            available_nbytes=available,
        )
    return best


def cut(jobs: Sequence[Job], rows: int, *, pads: bool) -> tuple[MicroBatch, ...]:
    """Micro-batches of at most `rows` prompts, of like lengths, the longest first.

    A prompt joins longer ones if it is at least half as long, so that little of a batch is padding, and if it may go on
    at least half as long.
    """
    found: list[MicroBatch] = []
    members: list[Job] = []

    def close() -> None:
        found.append(
            MicroBatch(
                indices=tuple(job.index for job in members),
                prompt_tokens=max(job.prompt_tokens for job in members),
                new_tokens=members[0].new_tokens,
            )
        )
        members.clear()

    for job in sorted(jobs, key=lambda job: (-job.new_tokens, -job.prompt_tokens, job.index)):
        if members and (len(members) == rows or not _alike(members[0], job, pads)):
            close()
        members.append(job)
    close()
    return tuple(found)


def _alike(first: Job, job: Job, pads: bool) -> bool:
    """Whether a prompt may run together with one that comes before it."""
    if 2 * job.new_tokens < first.new_tokens or 2 * job.prompt_tokens < first.prompt_tokens:
        return False
    return job.prompt_tokens <= first.prompt_tokens if pads else job.prompt_tokens == first.prompt_tokens


def worth_compacting(*, live: int, rows: int, steps_left: int) -> bool:
    """Whether sequences that have ended should leave a micro-batch: copying the others' keys and values costs about
    what two steps cost to read them, and gives back the memory and the computing of those that ended."""
    return 0 < live <= rows - max(1, rows // 4) and steps_left >= 4


class Prefills:
    """Admits micro-batches, so that no sweep computes more prompt tokens than it may.

    Args:
        limit: Prompt tokens per sweep; one micro-batch alone may have more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: list[tuple[int, int]] = []
        """The last sweep of each prefill, and its tokens per sweep."""

    def admits(self, batch: MicroBatch, *, coming: int) -> bool:
        """Whether a prefill may begin in the sweep with the number `coming`; it is counted if so."""
        self._under_way = [(last, tokens) for last, tokens in self._under_way if last >= coming]
        if self._under_way and sum(tokens for _, tokens in self._under_way) + batch.prefill_tokens > self._limit:
            return False
        self._under_way.append((coming + batch.prefill_sweeps - 1, batch.prefill_tokens))
        return True


def _row_counts(jobs: int) -> list[int]:
    """Sizes of micro-batches that are tried: those that divide few prompts evenly, and steps of a quarter."""
    even = {-(-jobs // parts) for parts in range(1, min(jobs, MOST_ROWS) + 1)}
    steps = {power * quarters // 4 for power in (1, 2, 4, 8, 16, 32, 64) for quarters in (4, 5, 6, 7)} | {MOST_ROWS}
    return sorted(count for count in (even if jobs <= 2 * MOST_ROWS else steps) | {1} if count <= MOST_ROWS)


def _options(
    batches: tuple[MicroBatch, ...], footprint: Footprint, machine: Machine, lanes: int | None, most_lanes: int
) -> Iterator[Schedule]:
    """Every number of lanes, and of prompt tokens per sweep, for one cut."""
    most = min(most_lanes, len(batches))
    kv = sorted((batch.kv_tokens for batch in batches), reverse=True)
    prefill = sorted((batch.prefill_tokens for batch in batches), reverse=True)
    steps = sum(batch.new_tokens + batch.prefill_sweeps - 1 for batch in batches)
    longest = max(batch.new_tokens + batch.prefill_sweeps - 1 for batch in batches)
    rows = max(len(batch.indices) for batch in batches)
    usual_rows = sum(len(batch.indices) for batch in batches) / len(batches)
    usual_s = sum(machine.pass_s(len(batch.indices)) for batch in batches) / len(batches)
    prefill_s = 0.0
    if machine.products is not None:  # else nothing is known of what rows cost
        prefill_s = sum(batch.prefill_sweeps * machine.pass_s(batch.prefill_tokens) for batch in batches)
    for count in [min(lanes, len(batches))] if lanes else range(1, most + 1):
        together = sum(prefill[:count])
        limit = prefill[0]
        while True:
            at_once = min(limit, together)
            needed = footprint.kv_nbytes_per_token * sum(kv[:count])
            needed += footprint.activation_nbytes_per_token * prefill[0]
            needed += footprint.held_nbytes_per_token * (at_once - prefill[0])
            needed += footprint.meeting_nbytes_per_token * (count - 1) * rows  # of those that decode meanwhile
            needed += footprint.logits_nbytes_per_sequence * rows + footprint.lane_nbytes * count
            sweeps = max(-(-steps // count), longest) + -(-together // at_once) - 1
            moved = machine.moved_s(needed, count * usual_rows)
            computed = count * usual_s
            swept = Split(cpu_share=0.0, seconds=max(moved, computed))
            if machine.alternation is not None:
                keys = _most_keys(machine.host_room_nbytes, footprint.kv_nbytes_per_token * sum(kv[:count]))
                swept = machine.alternation.best(rows=rows, lanes=count, most_keys=keys)
            yield Schedule(
                batches=batches,
                lanes=count,
                prefill_tokens=at_once,
                nbytes=int(needed),
                sweeps=sweeps,
                seconds=sweeps * swept.seconds + prefill_s,
                cpu_share=swept.cpu_share,
            )
            if limit >= together:
                break
            limit *= 2


def _most_keys(room_nbytes: int | None, kv_nbytes: float) -> float:
    """The part of keys and values that such a room holds."""
    return 1.0 if room_nbytes is None or kv_nbytes <= room_nbytes else room_nbytes / kv_nbytes
