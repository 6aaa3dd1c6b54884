"""The page of `penstock moe report`: charts, map and table as one HTML file. No network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from .inputs import Place, percent
from .lab import Row, table
from .linesvg import COLOURS, Curve, lines_svg
from .mapsvg import maps

if TYPE_CHECKING:
    from ...scheduler.experts.contest import Cell, Contender
    from ...scheduler.experts.shape import Routing

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1c1f24;--paper:#fff;--soft:#566071}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--paper:#14171c;--soft:#a5adba}}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:960px;padding:0 1rem}
body{color:var(--ink);background:var(--paper)}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin-top:2.2rem}p{max-width:46rem}.soft{color:var(--soft)}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}svg text{fill:currentColor}
.axis{stroke:currentColor;opacity:.35}.grid{stroke:currentColor;opacity:.1}.line{fill:none;stroke-width:2.2}
.bound{stroke-dasharray:5 4}svg .on{fill:#fff;font-weight:600}svg .small{font-size:11px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px;text-align:right}th:first-child,td:first-child{text-align:left}
th{font-weight:500;color:var(--soft)}.box{overflow-x:auto}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:1rem}
"""
BOUND_COLOUR: Final = "#8a93a3"


def page(
    *,
    title: str,
    source: str,
    place: Place,
    routing: Routing,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    contenders: Sequence[Contender],
    notes: Sequence[str],
) -> str:
    """The text of the file."""
    tier = "device" if place.separate else "host"
    colours = {each.name: COLOURS[number % len(COLOURS)] for number, each in enumerate(contenders)}
    held = f"experts that the {tier} holds"
    hits = lines_svg(_curves(rows, routing, colours, "hit_rate"), x_label=held, y_label="hits of decoding", y_unit="%")
    seconds = lines_svg(
        _curves(rows, routing, colours, "seconds"),
        x_label=held,
        y_label="simulated ms per generated token, expert layers alone",
        y_unit="",
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(source)}<br>{routing.layers} layers of {routing.experts} experts, {routing.top_k} '
        f"per token. Seconds are simulated for {escape(place.machine)}: nothing was measured.</p>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Hits</h2>",
        hits,
        '<p class="soft">Dashed: Belady\'s MIN, which knows the future. No cache of that size that may pass misses by '
        "has more hits; nor, where each miss has to be admitted, more than the lower of the two.</p>",
        "<h2>Seconds</h2>",
        seconds,
        "<h2>All figures</h2>",
        _table(rows, routing),
    ]
    if cells:
        parts += [
            "<h2>Which policy, for what routing</h2>",
            '<p class="soft">Generated routing of several kinds, with a cache of a quarter of the experts. A field '
            "names the policy with the least simulated time per generated token, and by how much the next best takes "
            "longer.</p>",
            f'<div class="maps">{maps(cells, colours)}</div>',
        ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _curves(rows: Sequence[Row], routing: Routing, colours: dict[str, str], what: str) -> list[Curve]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        share = 100 * row.capacity / routing.total
        if what == "hit_rate":
            found.setdefault(row.name, []).append((share, 100 * row.hit_rate))
        elif row.result is not None:
            found.setdefault(row.name, []).append((share, 1e3 * row.result.decode.seconds_per_token))
    return [
        Curve(name=name, points=tuple(points), colour=colours.get(name, BOUND_COLOUR), dashed=name not in colours)
        for name, points in found.items()
    ]


def _table(rows: Sequence[Row], routing: Routing) -> str:
    heading, *lines = table(rows, routing)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    first = percent(rows[0].capacity, routing) if rows else ""
    note = (
        f'<p class="soft">All but the last column are of decoding, from {first} of the experts up.</p>' if first else ""
    )
    return f'{note}<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
