"""A line chart as one HTML page with an SVG in it: no network, no library, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Final

WIDTH: Final = 860
HEIGHT: Final = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 30, 70
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:900px;padding:0 1rem;color:#1c1f24;background:#fff}
h1{font-size:1.1rem;font-weight:600}svg{width:100%;height:auto}text{fill:currentColor;font-size:12px}
.axis{stroke:currentColor;opacity:.35}.grid{stroke:currentColor;opacity:.1}.mark{font-size:11px;opacity:.75}
.l0{stroke:#2563eb;fill:none;stroke-width:2.5}.p0{fill:#2563eb}.l1{stroke:#d97706;fill:none;stroke-width:2.5}
.p1{fill:#d97706}
@media(prefers-color-scheme:dark){body{color:#e6e8eb;background:#14171c}.l0{stroke:#60a5fa}.p0{fill:#60a5fa}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Points that belong together."""

    name: str
    points: tuple[tuple[float, float], ...]


def draw(
    *,
    title: str,
    x_label: str,
    x_text: Callable[[float], str],
    y_label: str,
    lines: Sequence[Line],
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A page with a chart: x on a logarithmic axis with a tick at each point, y from 0. `marks` are words at an x."""
    xs = sorted({x for line in lines for x, _ in line.points}) or [1.0]
    top = _ceiling(max((y for line in lines for _, y in line.points), default=1.0))

    def across(x: float) -> float:
        low, high = log10(xs[0]), log10(xs[-1])
        share = (log10(x) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return HEIGHT - _BOTTOM - y / top * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(0):.1f}" y2="{up(0):.1f}"/>']
    for step in range(6):
        y = top * step / 5
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in xs:
        parts.append(
            f'<text x="{across(x):.1f}" y="{HEIGHT - _BOTTOM + 20}" text-anchor="middle">{escape(x_text(x))}</text>'
        )
    for number, line in enumerate(lines):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="l{number % 2}" points="{path}"/>')
        for x, y in line.points:
            told = f"{escape(line.name)} at {escape(x_text(x))}: {y:.4g}"
            place = f'cx="{across(x):.1f}" cy="{up(y):.1f}"'
            parts.append(f'<circle class="p{number % 2}" {place} r="4"><title>{told}</title></circle>')
    heights = {x: max(y for line in lines for at, y in line.points if at == x) for x in xs if lines and lines[0].points}
    for index, (x, word) in enumerate(marks):
        if index == 0 or marks[index - 1][1] != word:  # where it changes
            parts.append(
                f'<text class="mark" x="{across(x):.1f}" y="{up(heights[x]) - 12:.1f}" text-anchor="middle">'
                f"{escape(word)}</text>"
            )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{_TOP - 12}">{escape(y_label)}; the words say what binds from there on</text>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg></html>\n'
    )


def _ceiling(value: float) -> float:
    """A round number at or above a value."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** floor(log10(value))
    return unit * min(step for step in (1, 2, 2.5, 5, 10) if step * unit >= value * (1 - 1e-9)) if unit else ceil(value)
