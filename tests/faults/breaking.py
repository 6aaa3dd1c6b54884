"""Operations on files that fail on demand, whoever calls them: the functions of `os` are replaced for a while."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

Answer = Callable[..., Any]
"""Called with the plain function and its arguments; raises, or gives the result."""


def fails(code: int) -> Answer:
    """As the system does."""

    def answer(plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return answer


@contextmanager
def breaking(operation: str, name: str, answer: Answer, *, after: int = 0) -> Iterator[list[str]]:
    """Replace `os.<operation>` for files whose path ends in `name`, from the call numbered `after` on.

    Gives the list of paths for which that happened.
    """
    plain = getattr(os, operation)
    broken: list[str] = []
    calls = iter(range(10**9))

    def call(*args: Any, **options: Any) -> Any:
        path = _path(args[0])
        if not path.endswith(name) or next(calls) < after:
            return plain(*args, **options)
        broken.append(path)
        return answer(plain, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, operation, call)
        yield broken


def _path(of: Any) -> str:
    return os.readlink(f"/proc/self/fd/{of}") if isinstance(of, int) else os.fspath(of)


@contextmanager
def readonly_disk() -> Iterator[None]:
    """Nothing can be made or opened for writing."""
    opened, made = os.open, os.mkdir

    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(30, os.strerror(30))

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not os.fspath(path).startswith(("/dev", "/proc")):
            refuse()
        return opened(path, flags, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_)
        patch.setattr(os, "mkdir", refuse)
        yield
    assert (os.open, os.mkdir) == (opened, made)
