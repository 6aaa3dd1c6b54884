"""Several lines over shares of a whole, as one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from ..losschart import round_ticks

COLOURS: Final = ("#2f7fc1", "#d65a1c", "#148a6c", "#b8559a", "#b5830d", "#6b5bd2", "#5d6b7a")
"""Hues that keep apart for colour-blind eyes (after Okabe and Ito), on light and on dark ground."""
WIDTH: Final = 900
HEIGHT: Final = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 190, 28, 46


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line."""

    name: str
    points: tuple[tuple[float, float], ...]
    """x from 0 to 100, ascending."""
    colour: str
    dashed: bool


def lines_svg(curves: Sequence[Curve], *, x_label: str, y_label: str, y_unit: str) -> str:
    """The drawing. x are percents, y starts at 0; names stand at the lines' ends, moved apart where they would
    touch."""
    highest = max((y for curve in curves for _, y in curve.points), default=1.0)
    ticks = [tick for tick in round_ticks(0.0, highest or 1.0) if tick >= 0]

    def across(x: float) -> float:
        return _LEFT + x / 100 * (WIDTH - _LEFT - _RIGHT)

    def up(y: float) -> float:
        return HEIGHT - _BOTTOM - y / ticks[-1] * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text x="{_LEFT}" y="{_TOP - 12}">{escape(y_label)}</text>']
    for y in ticks:
        kind = "axis" if y == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}{y_unit}</text>')
    for x in sorted({x for curve in curves for x, _ in curve.points}):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.3g}%</text>')
    parts.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for curve in curves:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve.points)
        dash = " bound" if curve.dashed else ""
        parts.append(f'<polyline class="line{dash}" stroke="{curve.colour}" points="{path}"/>')
        for x, y in curve.points:
            told = f"{escape(curve.name)} at {x:.3g}%: {y:.4g}{y_unit}"
            place = f'cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"'
            parts.append(f'<circle {place} fill="{curve.colour}"><title>{told}</title></circle>')
    for curve, height in _apart([(curve, up(curve.points[-1][1])) for curve in curves if curve.points]):
        x = across(curve.points[-1][0]) + 10
        parts.append(f'<text x="{x:.1f}" y="{height + 4:.1f}" style="fill:{curve.colour}">{escape(curve.name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _apart(labels: list[tuple[Curve, float]], *, least: float = 15.0) -> list[tuple[Curve, float]]:
    """Labels from the top down, none nearer to the one above it than `least`, the last within the drawing."""
    placed: list[tuple[Curve, float]] = []
    for curve, height in sorted(labels, key=lambda each: each[1]):
        above = placed[-1][1] + least if placed else _TOP
        placed.append((curve, max(height, above)))
    below = HEIGHT - _BOTTOM + 6.0
    for number in range(len(placed) - 1, -1, -1):
        curve, height = placed[number]
        placed[number] = curve, min(height, below)
        below = placed[number][1] - least
    return placed
