"""The streamed models of this process, and who records them: a recording finds models loaded before it and after."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Protocol

from torch import nn

from ..build import Machinery


class Recording(Protocol):
    """A recording under way."""

    def attach(self, module: nn.Module, machinery: Machinery) -> None:
        """Record this streamed model too."""
        ...


class Registry:
    """Pairs of a model and its machinery, and the recordings that want to know of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection inside may close a dead model, which comes back here
        self._models: list[tuple[weakref.ref[nn.Module], Machinery]] = []
        self._recordings: list[Recording] = []

    def add(self, module: nn.Module, machinery: Machinery) -> None:
        """A model starts to stream; it is forgotten when its machinery closes."""
        pair = (weakref.ref(module), machinery)
        with self._lock:
            self._models.append(pair)
            recordings = list(self._recordings)
        machinery.on_close(lambda: self._remove(pair))
        for recording in recordings:
            recording.attach(module, machinery)

    def _remove(self, pair: tuple[weakref.ref[nn.Module], Machinery]) -> None:
        with self._lock:
            if pair in self._models:
                self._models.remove(pair)

    def begin(self, recording: Recording) -> None:
        """A recording starts: it is told of all models, those that are there and those to come."""
        with self._lock:
            self._recordings.append(recording)
            models = list(self._models)
        for known, machinery in models:
            module = known()
            if module is not None:
                recording.attach(module, machinery)

    def end(self, recording: Recording) -> None:
        """A recording ends."""
        with self._lock:
            if recording in self._recordings:
                self._recordings.remove(recording)

    @property
    def recording(self) -> bool:
        """Whether anything is being recorded."""
        return bool(self._recordings)


@functools.cache
def process_registry() -> Registry:
    """The one that all models and recordings of this process share."""
    return Registry()
