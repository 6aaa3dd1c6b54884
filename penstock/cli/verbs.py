"""The registry of verbs. A new verb is a file beside this one, and a line here.

A verb is a function that typer can read (its docstring is the help text). It may return an exit code. Modules of verbs
are imported for every `penstock --help`: torch and transformers are imported inside the function, not at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import typer

from .calibrate import calibrate
from .chat import chat
from .demo import demo
from .doctor import doctor
from .finetune import finetune
from .moe.verbs import moe
from .plan import plan
from .prof.verbs import prof
from .run import run
from .store.verbs import store

VERBS: Final[dict[str, Callable[..., int | None]]] = {
    "demo": demo,
    "run": run,
    "chat": chat,
    "plan": plan,
    "finetune": finetune,
    "calibrate": calibrate,
    "doctor": doctor,
}

GROUPS: Final[dict[str, Callable[[], typer.Typer]]] = {
    "moe": moe,
    "prof": prof,
    "store": store,
}
"""Verbs that have verbs of their own."""
