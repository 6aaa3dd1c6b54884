"""The name under which transformers calls us for a layer of experts, and the configs that say so.

Configs are the user's, and may be shared by several models: what one said before is put back when the last model that
needs our name in it has ended.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final

REPLACED: Final = "grouped_mm"
"""The implementation whose results ours has, to the bit: what transformers chooses by itself."""
IMPLEMENTATION: Final = "penstock"
"""Our name in transformers' registry of experts functions."""
AROUND: Final = "_penstock_around_experts"
"""In the `__dict__` of a module in training whose experts may be behind: gives the context of a call, of the experts
that its tokens have chosen."""


@dataclass(kw_only=True, slots=True)
class _Use:
    config: Any
    """Kept, so that its id stays its own."""
    before: str | None
    models: int = 0


_uses: dict[int, _Use] = {}
_lock = threading.Lock()


def take_over(config: Any) -> None:
    """Have modules of this config call us. Its sub-configs stay as they are."""
    with _lock:
        use = _uses.setdefault(id(config), _Use(config=config, before=config._experts_implementation))
        use.models += 1
        config._experts_implementation = {"": IMPLEMENTATION}


def put_back(config: Any) -> None:
    """A model needs that no longer. What a user has set meanwhile stays."""
    with _lock:
        use = _uses[id(config)]
        use.models -= 1
        if use.models:
            return
        del _uses[id(config)]
        if config._experts_implementation == IMPLEMENTATION:
            config._experts_implementation = {"": use.before}
