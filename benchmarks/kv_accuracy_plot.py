"""Recall against budget as one SVG, a line for each policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 150, 20, 50
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#65a30d", "#db2777", "#57534e", "#a16207")


def draw(lines: Mapping[str, Sequence[tuple[float, float]]], *, whole: float) -> str:
    """Points (share of the context, part of the questions) of each policy; `whole` is what attention to all answers."""
    least = min(share for points in lines.values() for share, _ in points)

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (1 - log2(share) / log2(least) if least < 1 else 0.5)

    def y(part: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - part)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="{HEIGHT - 8}">part of the context that is attended to</text>',
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(whole):.1f}" y2="{y(whole):.1f}" stroke="#000" '
        'stroke-dasharray="4 4"/>',
    ]
    for part in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<text x="{LEFT - 40}" y="{y(part) + 4:.1f}">{part:.0%}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(part):.1f}" y2="{y(part):.1f}" stroke="#ddd"/>')
    for share in sorted({share for points in lines.values() for share, _ in points}):
        parts.append(f'<text x="{x(share) - 12:.1f}" y="{HEIGHT - BOTTOM + 18}">{share:.0%}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour, dash = COLOURS[number % len(COLOURS)], ' stroke-dasharray="6 3"' if number >= len(COLOURS) else ""
        path = " ".join(f"{x(share):.1f},{y(part):.1f}" for share, part in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        at = TOP + 16 * number + 12
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{at}" fill="{colour}">{escape(name)}</text>')
    return "".join([*parts, "</svg>\n"])
