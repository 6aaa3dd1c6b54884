"""Policies of selection: one file each, and one line here. All but `exact` are lossy."""

from __future__ import annotations

from typing import Final

from ....memory.errors import UsageError
from .alisa import Alisa
from .exact import Exact
from .h2o import H2o
from .landmark import Landmark
from .oracle import Oracle
from .policy import Heads, Policy, Setting
from .quest import Quest
from .random import Random
from .sale import Sale
from .sentences import Sentences
from .snapkv import SnapKv
from .sparq import SparQ
from .vectors import Vectors
from .window import Window
from .windowkv import LAYERS, WindowKv

POLICIES: Final[dict[str, type[Policy]]] = {
    policy.name: policy
    for policy in (
        Exact,
        Window,
        H2o,
        SnapKv,
        Quest,
        Landmark,
        SparQ,
        WindowKv,
        Sale,
        Sentences,
        Vectors,
        Alisa,
        Oracle,
        Random,
    )
}
DEFAULT: Final = Exact.name
DENSE_LAYERS: Final = 2
"""First layers, which attend to all: their attention is spread, and what they lose is lost to all others (Quest)."""


def policy(name: str, heads: Heads, setting: Setting, *, layer: int, dense_layers: int = DENSE_LAYERS) -> Policy:
    """A policy for one layer of one sequence, which has seen nothing yet.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in POLICIES:
        raise UsageError(f"policy {name!r} is not known: use {', '.join(POLICIES)}")
    return (Exact if layer < dense_layers else POLICIES[name])(heads, setting)


def policies(
    name: str, heads: Heads, setting: Setting, *, layers: int, dense_layers: int = DENSE_LAYERS
) -> tuple[Policy, ...]:
    """The policies of all layers of one sequence. Where layers choose alike, they are joined here.

    Raises:
        UsageError: there is none of that name.
    """
    made = tuple(policy(name, heads, setting, layer=layer, dense_layers=dense_layers) for layer in range(layers))
    chosen = [one for one in made if isinstance(one, WindowKv)]
    for number, one in enumerate(chosen):
        if number % LAYERS:
            one.follow(chosen[number - number % LAYERS])
    return made
