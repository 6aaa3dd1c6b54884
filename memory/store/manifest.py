"""The manifest: which slot of each block is committed, with its checksum. And the label that marks a folder as ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from ..arena import PAGE, round_up
from ..errors import StoreDamagedError
from .sealed import seal, unseal
from .slotmap import SLOTS, BlockSpec, Home, SlotMap
from .slots import Copy, Cut

_LABEL: Final = b"labl"
_MANIFEST: Final = b"mnfs"
_NO_SLOT: Final = -1
_MOST_BYTES: Final = 2**62
"""Above every offset that a file can have; keeps sums of hostile numbers sums of bytes."""


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """Says that a folder is a part of a store."""

    store: str
    """Drawn at random when the store was made; the same in all its folders."""
    drive: int
    """0 for the home folder, which has the manifest."""
    home: bytes
    """Where the home folder was when the store was made (os.fsencode, since not every path is text)."""


class DriveRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A folder of the store."""

    folder: bytes
    """Where it was at this commit, as os.fsencode spells it."""
    nbytes: int
    """Length of its data file."""


class BlockRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A block: what it is, where its slots lie, which of them is committed."""

    name: str
    kind: str
    nbytes: int
    drive: int
    offset: int
    slot: int
    """-1 for a block that was never written."""
    checksum: int
    version: int
    """Number of the commit that wrote what the slot holds."""

    @property
    def written(self) -> bool:
        """Whether the block has a committed state."""
        return self.slot != _NO_SLOT


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One commit."""

    store: str
    commit: int
    """0 for the empty store."""
    identity: str
    """The caller's fingerprint of what the store belongs to."""
    metadata: bytes
    """The caller's own."""
    written_nbytes: int
    """What the store wrote since it was made, manifests included, this one not."""
    drives: tuple[DriveRecord, ...]
    blocks: tuple[BlockRecord, ...]

    def committed(self) -> tuple[Copy | None, ...]:
        """The committed state of each block."""
        return tuple(
            Copy(slot=block.slot, checksum=block.checksum, version=block.version) if block.written else None
            for block in self.blocks
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreFacts:
    """What does not change while a store lives."""

    store: str
    identity: str
    folders: tuple[str, ...]
    """One per drive, the home folder first."""
    slotmap: SlotMap

    def manifest(self, cut: Cut, written_nbytes: int) -> Manifest:
        """The manifest that publishes a cut."""
        sizes = self.slotmap.drive_nbytes()
        pairs = zip(self.folders, sizes, strict=True)
        drives = tuple(DriveRecord(folder=os.fsencode(folder), nbytes=nbytes) for folder, nbytes in pairs)
        described = zip(self.slotmap.blocks, self.slotmap.homes, cut.copies, strict=True)
        return Manifest(
            store=self.store,
            commit=cut.number,
            identity=self.identity,
            metadata=cut.metadata,
            written_nbytes=written_nbytes,
            drives=drives,
            blocks=tuple(_block_record(spec, home, copy, cut.number) for spec, home, copy in described),
        )


def facts_of(manifest: Manifest, folders: Sequence[str], paths: Sequence[str]) -> StoreFacts:
    """What a manifest says of the store, with its folders and data files where they are now."""
    return StoreFacts(
        store=manifest.store,
        identity=manifest.identity,
        folders=tuple(folders),
        slotmap=SlotMap(
            blocks=tuple(BlockSpec(name=b.name, kind=b.kind, nbytes=b.nbytes) for b in manifest.blocks),
            homes=tuple(Home(drive=b.drive, offset=b.offset) for b in manifest.blocks),
            paths=tuple(paths),
        ),
    )


def pack_manifest(manifest: Manifest) -> bytes:
    """The manifest as a file."""
    return seal(_MANIFEST, msgspec.msgpack.encode(manifest))


def unpack_manifest(data: bytes, path: str) -> tuple[Manifest, int]:
    """The manifest in a file, and how many of its two copies are good.

    Raises:
        StoreDamagedError: it is damaged, or names places that cannot be.
        StoreVersionError: it is of another version of the format.
    """
    sealed = unseal(_MANIFEST, data, path)
    manifest = _decode(sealed.body, Manifest, path)
    _check(manifest, path)
    return manifest, sealed.good_copies


def pack_label(label: Label) -> bytes:
    """The label as a file."""
    return seal(_LABEL, msgspec.msgpack.encode(label))


def unpack_label(data: bytes, path: str) -> Label:
    """The label in a file.

    Raises:
        StoreDamagedError: it is damaged.
        StoreVersionError: it is of another version of the format.
    """
    return _decode(unseal(_LABEL, data, path).body, Label, path)


_Document = TypeVar("_Document", Manifest, Label)


def _decode(body: bytes, kind: type[_Document], path: str) -> _Document:
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise StoreDamagedError(
            f"{path} is whole but makes no sense: {error}; it was not written by penstock"
        ) from error


def _block_record(spec: BlockSpec, home: Home, copy: Copy | None, number: int) -> BlockRecord:
    if copy is None:
        slot, checksum, version = _NO_SLOT, 0, 0
    else:
        assert copy.checksum is not None, spec.name
        slot, checksum, version = copy.slot, copy.checksum, copy.version or number
    return BlockRecord(
        name=spec.name,
        kind=spec.kind,
        nbytes=spec.nbytes,
        drive=home.drive,
        offset=home.offset,
        slot=slot,
        checksum=checksum,
        version=version,
    )


def _check(manifest: Manifest, path: str) -> None:
    """A checksum proves that nothing was lost, not that whoever wrote it meant well."""
    if not manifest.drives or not manifest.blocks or not 0 <= manifest.commit < _MOST_BYTES:
        raise _senseless(path, "it has no drives, no blocks or an impossible number")
    ends = [0] * len(manifest.drives)
    for number, block in sorted(enumerate(manifest.blocks), key=lambda item: item[1].offset):
        if not (0 <= block.drive < len(ends) and 0 < block.nbytes < _MOST_BYTES and 0 <= block.offset < _MOST_BYTES):
            raise _senseless(path, f"block {number} has an impossible size or place")
        if block.slot not in (_NO_SLOT, *range(SLOTS)) or not 0 <= block.checksum < 2**64:
            raise _senseless(path, f"block {number} has an impossible slot or checksum")
        if block.offset % PAGE or block.offset < ends[block.drive]:
            raise _senseless(path, f"block {number} overlaps another or is not on a page")
        ends[block.drive] = block.offset + SLOTS * round_up(block.nbytes)
    for drive, (record, end) in enumerate(zip(manifest.drives, ends, strict=True)):
        if b"\0" in record.folder or not record.folder.startswith(b"/"):
            raise _senseless(path, f"the folder of drive {drive} is no absolute path")
        if record.nbytes != end:
            raise _senseless(path, f"drive {drive} has {record.nbytes} bytes for blocks that take {end}")


def _senseless(path: str, what: str) -> StoreDamagedError:
    return StoreDamagedError(f"{path} is whole but makes no sense: {what}; it was not written by penstock")
