"""The loss over the steps of a run as one SVG: no network, no library, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10
from typing import Any, Final

WIDTH: Final = 860
HEIGHT: Final = 420
MOST_POINTS: Final = 800
"""Of a line: more do not show. Neighbours are drawn as their mean."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 44, 44
_STYLE: Final = """
svg{color:#1c1f24;background:#fff;font:12px system-ui,sans-serif}text{fill:currentColor}.title{font-weight:600}
.axis{stroke:currentColor;opacity:.35}.grid{stroke:currentColor;opacity:.1}
.train{stroke:#2563eb;fill:none;stroke-width:1.5}.eval{stroke:#d97706;fill:none;stroke-width:2}
.train-text{fill:#2563eb}.eval-text,.point{fill:#d97706}
@media(prefers-color-scheme:dark){svg{color:#e6e8eb;background:#14171c}.train{stroke:#60a5fa}.train-text{fill:#60a5fa}}
"""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCurve:
    """Losses by step."""

    training: Sequence[Point]
    evaluation: Sequence[Point]


def loss_curve(records: Iterable[dict[str, Any]]) -> LossCurve:
    """The losses of a file of metrics; steps without one are left out."""
    training: list[Point] = []
    evaluation: list[Point] = []
    for record in records:
        for name, points in (("loss", training), ("eval_loss", evaluation)):
            value = record.get(name)
            if isinstance(value, int | float) and isfinite(value):
                points.append((float(record["step"]), float(value)))
    return LossCurve(training=thinned(training), evaluation=thinned(evaluation))


def thinned(points: Sequence[Point], *, most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: means of neighbours."""
    each = max(ceil(len(points) / most), 1)
    groups = [points[begin : begin + each] for begin in range(0, len(points), each)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def draw_loss(curve: LossCurve, *, title: str) -> str:
    """The drawing, as the text of an SVG file."""
    points = [*curve.training, *curve.evaluation]
    left, right = (pick((x for x, _ in points), default=1.0) for pick in (min, max))
    ticks = round_ticks(*(pick((y for _, y in points), default=1.0) for pick in (min, max)))

    def at(point: Point) -> str:
        share = (point[0] - left) / (right - left) if right > left else 0.5
        return f"{_LEFT + share * (WIDTH - _LEFT - _RIGHT):.1f},{up(point[1]):.1f}"

    def up(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text class="title" x="{_LEFT}" y="20">{escape(title)}</text>']
    for y in ticks:
        kind = "axis" if y == ticks[0] else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x, anchor in ((left, "start"), (right, "end")):
        across = at((x, ticks[0])).split(",")[0]
        parts.append(f'<text x="{across}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="{anchor}">{x:.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">step</text>')
    for number, (name, line) in enumerate((("train", curve.training), ("eval", curve.evaluation))):
        if not line:
            continue
        told = {"train": "training loss", "eval": "evaluation loss"}[name]
        parts.append(f'<polyline class="{name}" points="{" ".join(at(point) for point in line)}"/>')
        x = WIDTH - _RIGHT - 130 * (1 - number)
        parts.append(f'<text class="{name}-text" x="{x}" y="20" text-anchor="end">{told} {line[-1][1]:.4f}</text>')
    for x, y in curve.evaluation:
        across, height = at((x, y)).split(",")
        note = f"<title>evaluation at step {x:.0f}: {y:.4f}</title>"
        parts.append(f'<circle class="point" cx="{across}" cy="{height}" r="3">{note}</circle>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>\n"
    )


def round_ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers at equal distances, at least two, the first at or below `low` and the last at or above `high`."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    unit = 10.0 ** floor(log10((high - low) / most))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10, 20) if ceil(high / (s * unit)) - floor(low / (s * unit)) <= most)
    first, last = floor(low / step), ceil(high / step)
    return [number * step for number in range(first, last + 1)]
