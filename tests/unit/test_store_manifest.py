"""The manifest as a file: one bit anywhere, another version, numbers that cannot be."""

import random
from typing import Any

import msgspec
import pytest

from penstock.memory.arena import PAGE
from penstock.memory.errors import StoreDamagedError, StoreVersionError, UsageError
from penstock.memory.store import sealed
from penstock.memory.store.manifest import (
    BlockRecord,
    DriveRecord,
    Manifest,
    facts_of,
    pack_manifest,
    unpack_manifest,
)
from penstock.memory.store.sealed import FORMAT_VERSION, seal, unseal

BLOCK = BlockRecord(name="a", kind="k", nbytes=10, drive=0, offset=0, slot=1, checksum=2**64 - 1, version=3)
GOOD = Manifest(
    store="s",
    commit=3,
    identity="i",
    metadata=bytes(range(256)),
    written_nbytes=12,
    drives=(DriveRecord(folder=b"/run", nbytes=4 * PAGE),),
    blocks=(BLOCK, msgspec.structs.replace(BLOCK, name="b", offset=2 * PAGE, slot=-1, checksum=0, version=0)),
)


def test_a_manifest_comes_back_as_it_was() -> None:
    packed = pack_manifest(GOOD)
    assert len(packed) == 2 * PAGE
    assert unpack_manifest(packed, "m") == (GOOD, 2)
    facts = facts_of(GOOD, ["/elsewhere"], ["/elsewhere/blocks.data"])
    assert facts.slotmap.span(1, 1).offset == 3 * PAGE
    assert facts.slotmap.drive_nbytes() == (4 * PAGE,)
    first, second = GOOD.committed()
    assert first is not None
    assert (first.slot, first.checksum, first.version) == (1, 2**64 - 1, 3)
    assert second is None


def test_every_single_bit_is_made_good_by_the_other_copy() -> None:
    packed = pack_manifest(GOOD)
    used = packed.rstrip(b"\0").__len__() - PAGE  # of each copy, without the zeros at its end
    for at in [*range(used), *range(PAGE, PAGE + used)]:
        damaged = bytearray(packed)
        damaged[at] ^= 1 << random.randrange(8)
        assert unpack_manifest(bytes(damaged), "m") == (GOOD, 1), at


def test_damage_of_both_copies_is_seen() -> None:
    packed = pack_manifest(GOOD)
    draw = random.Random(1)
    for _ in range(300):
        damaged = bytearray(packed)
        for start in (0, PAGE):
            damaged[start + draw.randrange(280)] ^= 1 << draw.randrange(8)
        with pytest.raises(StoreDamagedError, match=r"^m is damaged: neither of the two copies"):
            unpack_manifest(bytes(damaged), "m")


@pytest.mark.parametrize("nbytes", [0, 1, 31, 100, 600])
def test_a_torn_manifest_is_seen(nbytes: int) -> None:
    with pytest.raises(StoreDamagedError):
        unpack_manifest(pack_manifest(GOOD)[:nbytes], "m")


@pytest.mark.parametrize(("version", "word"), [(FORMAT_VERSION + 1, "newer"), (0, "older")])
def test_another_version_is_told_from_damage(version: int, word: str) -> None:
    with pytest.raises(
        StoreVersionError, match=rf"m is of version {version} .* reads version {FORMAT_VERSION}.*{word}"
    ):
        unpack_manifest(seal(b"mnfs", b"whatever it means", version), "m")


def test_a_file_of_another_kind_is_not_taken() -> None:
    with pytest.raises(StoreDamagedError):
        unseal(b"labl", pack_manifest(GOOD), "m")


def test_a_document_that_could_not_be_read_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "MOST_NBYTES", 2 * PAGE)
    seal(b"test", bytes(4000))
    with pytest.raises(UsageError, match=f"{4 * PAGE} bytes is too long: it may have {2 * PAGE}"):
        seal(b"test", bytes(5000))


@pytest.mark.parametrize(
    ("changes", "block_changes", "words"),
    [
        ({"drives": ()}, {}, "no drives"),
        ({"blocks": ()}, {}, "no blocks"),
        ({"commit": -1}, {}, "impossible number"),
        ({"drives": (DriveRecord(folder=b"/run", nbytes=5 * PAGE),)}, {}, "20480 bytes for blocks that take 16384"),
        ({"drives": (DriveRecord(folder=b"/r\0n", nbytes=4 * PAGE),)}, {}, "no absolute path"),
        ({"drives": (DriveRecord(folder=b"../x", nbytes=4 * PAGE),)}, {}, "no absolute path"),
        ({}, {"nbytes": 0}, "impossible size"),
        ({}, {"nbytes": 2**63 - 1}, "impossible size"),
        ({}, {"offset": -PAGE}, "impossible size or place"),
        ({}, {"offset": 1}, "not on a page"),
        ({}, {"offset": 2 * PAGE}, "overlaps"),
        ({}, {"nbytes": PAGE + 1}, "overlaps"),
        ({}, {"drive": 1}, "impossible size or place"),
        ({}, {"drive": -1}, "impossible size or place"),
        ({}, {"slot": 2}, "impossible slot"),
        ({}, {"checksum": -1}, "impossible slot or checksum"),
    ],
)
def test_hostile_manifests_are_refused(changes: dict[str, Any], block_changes: dict[str, Any], words: str) -> None:
    blocks = (msgspec.structs.replace(BLOCK, **block_changes), *GOOD.blocks[1:])
    hostile = msgspec.structs.replace(GOOD, **{"blocks": blocks, **changes})
    with pytest.raises(StoreDamagedError, match=f"m is whole but makes no sense: .*{words}"):
        unpack_manifest(pack_manifest(hostile), "m")


@pytest.mark.parametrize("body", [b"", b"\xff" * 20, msgspec.msgpack.encode({"store": 1}), msgspec.msgpack.encode([])])
def test_a_body_of_other_types_is_refused(body: bytes) -> None:
    with pytest.raises(StoreDamagedError, match="makes no sense"):
        unpack_manifest(seal(b"mnfs", body), "m")
