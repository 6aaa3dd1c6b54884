"""Functions whose calls are recordings."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from ...memory.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])


class Calls:
    """The calls of one function: the outermost of those under way is the one that is recorded."""

    def __init__(self, recording: Callable[[bool], AbstractContextManager[Any]]) -> None:
        self._recording = recording
        self._lock = threading.Lock()
        self._under_way = False
        self._again = False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A call."""
        with self._lock:
            mine, self._under_way = not self._under_way, True
        if not mine:
            yield
            return
        try:
            again, self._again = self._again, True
            with self._recording(again):
                yield
        finally:
            self._under_way = False


def recorded(recording: Callable[[bool], AbstractContextManager[Any]], function: Function) -> Function:
    """The function, each of whose calls is within `recording(whether it has been called before)`.

    Raises:
        UsageError: it is an asynchronous generator.
    """
    calls = Calls(recording)
    wrapped: Callable[..., Any]
    if inspect.isasyncgenfunction(function):
        raise UsageError(
            f"{function.__qualname__} is an asynchronous generator, which has no one call to record: "
            "enter the profiler around the loop that reads it"
        )
    if inspect.iscoroutinefunction(function):

        async def in_turn(*args: Any, **kwargs: Any) -> Any:
            with calls.recorded():
                return await function(*args, **kwargs)

        wrapped = in_turn
    elif inspect.isgeneratorfunction(function):

        def piecewise(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            with calls.recorded():
                return (yield from function(*args, **kwargs))

        wrapped = piecewise
    else:

        def at_once(*args: Any, **kwargs: Any) -> Any:
            with calls.recorded():
                return function(*args, **kwargs)

        wrapped = at_once
    return functools.wraps(function)(wrapped)  # type: ignore[return-value]
