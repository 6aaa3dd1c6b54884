"""Which contender is best where: one field per recipe, a map per weight of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...scheduler.experts.contest import Cell

_WIDTH: Final = 440
_ALIKE: Final = 0.001
"""Of the best one's seconds: below that a difference is none."""
_PLAIN: Final = "#76808f"
_LEFT, _TOP, _FIELD, _HIGH, _GAP = 70, 34, 86, 58, 4


def maps(cells: Sequence[Cell], colours: Mapping[str, str]) -> str:
    """The maps, side by side."""
    return "".join(
        _map([cell for cell in cells if cell.recipe.token == token], token, colours)
        for token in sorted({cell.recipe.token for cell in cells})
    )


def _map(cells: Sequence[Cell], token: float, colours: Mapping[str, str]) -> str:
    across = sorted({cell.recipe.zipf for cell in cells})
    up = sorted({cell.recipe.context for cell in cells}, reverse=True)
    height = _TOP + len(up) * (_HIGH + _GAP) + 44
    parts = [f'<text x="{_LEFT}" y="18">words: token {token:g}</text>']
    for cell in cells:
        x = _LEFT + across.index(cell.recipe.zipf) * (_FIELD + _GAP)
        y = _TOP + up.index(cell.recipe.context) * (_HIGH + _GAP)
        others = sorted(cell.behind(each) for each in cell.results if each != cell.best)
        alike = bool(others) and others[-1] < _ALIKE
        name = "all alike" if alike else cell.best.name
        lead = f"next: +{100 * others[0]:.1f}%" if others and not alike else ""
        told = "; ".join(f"{each.name} {1e3 * cell.decode_s(each):.3f} ms" for each in cell.results)
        colour, centre = _PLAIN if alike else colours[name], x + _FIELD / 2
        parts.append(
            f"<g><title>{escape(told)}</title>"
            f'<rect x="{x}" y="{y}" width="{_FIELD}" height="{_HIGH}" rx="4" fill="{colour}"/>'
            f'<text class="on" x="{centre}" y="{y + 26}" text-anchor="middle">{escape(name.split(",")[0])}</text>'
            f'<text class="on small" x="{centre}" y="{y + 43}" text-anchor="middle">{lead}</text></g>'
        )
    for number, zipf in enumerate(across):
        middle = _LEFT + number * (_FIELD + _GAP) + _FIELD / 2
        parts.append(f'<text x="{middle}" y="{height - 26}" text-anchor="middle">{zipf:g}</text>')
    for number, context in enumerate(up):
        low = _TOP + number * (_HIGH + _GAP) + _HIGH / 2 + 4
        parts.append(f'<text x="{_LEFT - 8}" y="{low}" text-anchor="end">{context:g}</text>')
    parts.append(f'<text x="{_LEFT}" y="{height - 8}">skew: zipf →</text>')
    parts.append(f'<text x="4" y="{_TOP - 4}">↑ drift:</text><text x="4" y="{_TOP + 10}">context</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'
