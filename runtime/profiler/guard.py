"""What keeps a mistake of the recorder from becoming a failure of the program that is recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Hook = TypeVar("Hook", bound=Callable[..., Any])


def harmless(hook: Hook) -> Hook:
    """A method that torch calls in the middle of somebody's program, and that raises nothing into it.

    Its object has a `_recorder`, which is told what went wrong.
    """

    @functools.wraps(hook)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:  # whatever it is: the program has done nothing to deserve it
            self._recorder.failed(error)
            return None

    return guarded  # type: ignore[return-value]
