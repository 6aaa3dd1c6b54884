"""Replays of all contenders at all capacities, and Belady's bounds beside them: what `replay` and `report` show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...sizes import format_size
from .inputs import Place, percent

if TYPE_CHECKING:
    from ...scheduler.experts.contest import Contender
    from ...scheduler.experts.events import Event
    from ...scheduler.experts.replay import ReplayResult
    from ...scheduler.experts.shape import Routing


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be replayed."""

    routing: Routing
    contenders: Sequence[Contender]
    capacities: Sequence[int]
    host: int
    prefetch: int
    between_s: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one capacity; or one of Belady's bounds, which has hits and nothing else."""

    capacity: int
    name: str
    result: ReplayResult | None
    uses: int
    hit_rate: float
    """Of decoding."""
    kept_rate: float
    """The same without what was prefetched: what the bounds bound."""


def run(asked: Asked, events: Sequence[Event], place: Place) -> Iterator[Row]:
    """Row by row: of each capacity the bounds first."""
    from ...scheduler.experts.belady import most_hits
    from ...scheduler.experts.contest import compete

    uses = sum(len(event.experts) for event in events if event.phase == "decode")
    for capacity in asked.capacities:
        for name, bypass in (("MIN", True), ("MIN, always admits", False)):
            hits = most_hits(asked.routing, events, capacity, bypass=bypass, phase="decode")
            rate = hits / uses if uses else 0.0
            yield Row(capacity=capacity, name=name, result=None, uses=uses, hit_rate=rate, kept_rate=rate)
        replays = compete(
            asked.routing,
            events,
            asked.contenders,
            capacity,
            scheduler=place.scheduler,
            expert_nbytes=place.expert.nbytes,
            host=asked.host,
            prefetch=asked.prefetch,
            between_s=asked.between_s,
        )
        for contender, result in replays:
            decode = result.decode
            yield Row(
                capacity=capacity,
                name=contender.name,
                result=result,
                uses=uses,
                hit_rate=decode.hit_rate,
                kept_rate=decode.kept_rate,
            )


def steps(asked: Asked) -> int:
    """Rows that `run` will give."""
    return len(asked.capacities) * (2 + len(asked.contenders))


HEADING = ["policy", "capacity", "hits", "of MIN", "copied/token", "read/token", "on CPU", "ms/token", "prompts"]


def table(rows: Sequence[Row], routing: Routing) -> list[list[str]]:
    """Rows as text, under a heading. All but the last column are of decoding."""
    best = {row.capacity: row.hit_rate for row in rows if row.name == "MIN"}
    lines = [HEADING]
    for row in rows:
        share = row.kept_rate / best[row.capacity] if best[row.capacity] else 1.0
        cells = [row.name, percent(row.capacity, routing), f"{100 * row.hit_rate:.1f}%", f"{100 * share:.0f}%"]
        if row.result is None:
            lines.append([*cells, "", "", "", "", ""])
            continue
        decode, tokens = row.result.decode, max(row.result.decode.tokens, 1)
        lines.append(
            [
                *cells,
                format_size(decode.copied_nbytes // tokens),
                format_size(decode.read_nbytes // tokens),
                f"{100 * decode.computed_by_cpu / max(decode.uses, 1):.0f}%",
                f"{1e3 * decode.seconds_per_token:.3f}",
                f"{row.result.prefill.seconds:.3f} s",
            ]
        )
    return lines


def document(rows: Sequence[Row], routing: Routing) -> list[dict[str, Any]]:
    """Rows for JSON: times in seconds, sizes in bytes, shares of 1."""
    import msgspec

    return [
        {
            "policy": row.name,
            "capacity": row.capacity,
            "capacity_share": row.capacity / routing.total,
            "hit_rate": row.hit_rate,
            "kept_rate": row.kept_rate,
            "simulated": None if row.result is None else msgspec.to_builtins(row.result),
        }
        for row in rows
    ]


def prefetching(rows: Sequence[Row]) -> list[str]:
    """What was said about prefetching, each sentence once."""
    found = [
        f"{row.name} at {row.capacity} experts: prefetching is off: {row.result.prefetching.off}"
        for row in rows
        if row.result is not None and row.result.prefetching is not None and row.result.prefetching.off
    ]
    return list(dict.fromkeys(found))
