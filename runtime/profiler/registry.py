"""The streamed models of this process, and who records them: a recording finds models loaded before it and after."""

from __future__ import annotations

import functools
import threading
import weakref
from pathlib import Path
from typing import Protocol

from torch import nn

from ...memory.errors import UsageError
from ..build import Machinery


class Recording(Protocol):
    """A recording under way."""

    path: Path
    """Its file."""

    def attach(self, module: nn.Module, machinery: Machinery) -> None:
        """Record this streamed model too."""
        ...

    def introduce(self, module: nn.Module) -> None:
        """This module is a model, and its weights have its modules' names from now on."""
        ...


class Registry:
    """Pairs of a model and its machinery, and the recordings that want to know of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection inside may close a dead model, which comes back here
        self._models: list[tuple[weakref.ref[nn.Module], Machinery]] = []
        self._recording: Recording | None = None
        self._attaching = False
        """Whether the recording is ready to be told of models."""

    def add(self, module: nn.Module, machinery: Machinery) -> None:
        """A model starts to stream; it is forgotten when its machinery closes."""
        pair = (weakref.ref(module), machinery)
        with self._lock:
            self._models.append(pair)
            recording = self._recording if self._attaching else None
        machinery.on_close(lambda: self._remove(pair))
        if recording is not None:
            recording.attach(module, machinery)

    def introduce(self, module: nn.Module) -> None:
        """A built module is about to be planned: it is a model whether or not it is called, or streams in the end."""
        with self._lock:
            recording = self._recording if self._attaching else None
        if recording is not None:
            recording.introduce(module)

    def _remove(self, pair: tuple[weakref.ref[nn.Module], Machinery]) -> None:
        with self._lock:
            if pair in self._models:
                self._models.remove(pair)

    def claim(self, recording: Recording) -> None:
        """A recording wants to start. There is one at a time: torch applies the hooks of one only.

        Raises:
            UsageError: another one is under way in this process.
        """
        with self._lock:
            if self._recording is not None:
                raise UsageError(
                    f"this process is being recorded already, to {self._recording.path}: one recording at a time. "
                    "End that one first, or leave this one out."
                )
            self._recording = recording

    def begin(self, recording: Recording) -> None:
        """The recording is told of all models, those that are there and those to come."""
        with self._lock:
            self._attaching = True
            models = list(self._models)
        for known, machinery in models:
            module = known()
            if module is not None:
                recording.attach(module, machinery)

    def end(self, recording: Recording) -> None:
        """The recording ends."""
        with self._lock:
            if self._recording is recording:
                self._recording, self._attaching = None, False

    @property
    def recording(self) -> bool:
        """Whether anything is being recorded."""
        return self._recording is not None


@functools.cache
def process_registry() -> Registry:
    """The one that all models and recordings of this process share."""
    return Registry()
