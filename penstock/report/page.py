"""The page: the template, our own style and script, and the data, in one string."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any, Final

from ..runtime.profiler.profile import Profile
from ..runtime.profiler.summary import Idle, Summary
from .arrays import Arrays
from .run import run

_SCRIPTS: Final = (
    "units.js",
    "document.js",
    "theme.js",
    "dom.js",
    "plot.js",
    "range.js",
    "selection.js",
    "summary.js",
    "bands.js",
    "lanes.js",
    "hops.js",
    "bubbles.js",
    "residency.js",
    "modules.js",
    "bandwidth.js",
    "leads.js",
    "icicle.js",
    "diff.js",
    "main.js",
)
"""In the order in which they are joined: later ones use the names of earlier ones."""
_MOST_SPANS: Final = 90_000
_MOST_SPANS_OF_OTHER: Final = 12_000


def build(
    profile: Profile,
    summary: Summary,
    *,
    title: str = "",
    idle_steps: Sequence[tuple[int, Idle]] = (),
    other: tuple[Profile, Summary] | None = None,
) -> str:
    """The report of a run as one HTML page, which asks nothing of any network.

    `idle_steps` are the ids of steps with where each one's idle time went. With `other`, a second run is laid over the
    first one and a view lists what differs by module: deltas are `profile` less `other`. What a profile says is
    treated as hostile: it reaches the page as data only, and the page may run no script but the report's own.
    """
    arrays = Arrays()
    runs = [run(profile, summary, arrays, idle_steps=idle_steps, most=_MOST_SPANS)]
    if other is not None:
        runs.append(run(*other, arrays, idle_steps=(), most=_MOST_SPANS_OF_OTHER))
    title = _encodable(title or " ".join(profile.header.argv) or "a run")
    document = {"title": title, "runs": runs}
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    style = _asset("page.css")
    return Template(_asset("page.html")).substitute(
        title=html.escape(title),
        verdict=html.escape(_encodable(summary.verdict)),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        document=_json(document),
        arrays=arrays.encoded(),
    )


def _asset(name: str) -> str:
    return files(__package__ or "").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What the page's security policy allows to run, and nothing else."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _json(document: dict[str, Any]) -> str:
    """JSON that no HTML parser can end early; line separators are escaped by `ensure_ascii`."""
    text = json.dumps(_plain(document), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """The same without what JSON does not know: infinities and NaN, which stand for nothing that could be said."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _encodable(text: str) -> str:
    """Without the halves of characters that a damaged file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
