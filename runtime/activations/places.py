"""Room for the bytes of storages that leave: pieces of the host arena, and of scratch files."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...memory.arena import HostArena, Slot, debug_enabled, round_up
from ...memory.regions import Regions, RegionStatistics
from ...scheduler.activations import Part
from .hold import Piece, flat_of


class ActivationPlaces:
    """Gives places out, and takes them back. Not thread-safe: the store has a lock.

    Args:
        arena: Of host memory.
        host_nbytes: Of it, from its beginning, for what stays there.
        piece_nbytes: Of a piece on disk, at most.
        paths: Scratch files; storages take turns. None where nothing goes to disk.
    """

    def __init__(self, arena: HostArena, *, host_nbytes: int, piece_nbytes: int, paths: Sequence[str]) -> None:
        self._arena = arena
        self._host = Regions(host_nbytes)
        self._piece_nbytes = piece_nbytes
        self._files = {path: Regions() for path in paths}
        self._paths = paths
        self._turn = 0

    def take(self, storage: torch.UntypedStorage, parts: Sequence[Part]) -> list[Piece] | None:
        """Places for the bytes of a storage; None where there is no room, and then nothing is taken.

        What is to be kept while the rest leaves is copied: the storage itself will go.
        """
        found: list[Piece] = []
        at = 0
        path = self._paths[self._turn % len(self._paths)] if self._paths else ""
        self._turn += 1
        for part in parts:
            pieces = self._take_part(storage, part, at, path)
            if pieces is None:
                self.give(found)
                return None
            found += pieces
            at += part.nbytes
        return found

    def _take_part(self, storage: torch.UntypedStorage, part: Part, at: int, path: str) -> list[Piece] | None:
        if part.place == "keep":
            kept = flat_of(storage)[at : at + part.nbytes].clone()
            return [Piece(place="keep", start=at, nbytes=part.nbytes, kept=kept)]
        if part.place == "host":
            offset = self._host.take(part.nbytes)
            if offset is None:
                return None
            return [Piece(place="host", start=at, nbytes=part.nbytes, offset=offset)]
        if not path:
            return None
        found = []
        for start in range(at, at + part.nbytes, self._piece_nbytes):
            size = min(self._piece_nbytes, at + part.nbytes - start)
            offset = self._files[path].take(size)
            assert offset is not None  # a file has no end
            found.append(Piece(place="disk", start=start, nbytes=size, offset=offset, path=path))
        return found

    def give(self, pieces: Sequence[Piece]) -> None:
        """Have them used again."""
        for piece in pieces:
            if piece.place == "host":
                if debug_enabled():
                    self._arena.poison(Slot(arena=self._arena, offset=piece.offset, nbytes=round_up(piece.nbytes)))
                self._host.give(piece.offset, piece.nbytes)
            elif piece.place == "disk":
                self._files[piece.path].give(piece.offset, piece.nbytes)
            piece.kept = None

    def host_statistics(self) -> RegionStatistics:
        """Of the arena."""
        return self._host.statistics()

    def file_nbytes(self) -> int:
        """Of scratch files, that are used now."""
        return sum(file.statistics().used_nbytes for file in self._files.values())
