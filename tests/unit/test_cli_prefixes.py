"""`penstock store stats|verify|prune` of a prefix store."""

import json
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.memory.prefix import KvIdentity, PrefixStore

IDENTITY = KvIdentity(weights="w", dtype="BF16", rope="r", layout="l", block_tokens=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two prompts of a block each, one of another model, and one more after the first."""
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("NO_COLOR", "1")
    with PrefixStore(tmp_path / "store", 2**20) as store:
        store.put(IDENTITY, [1, 2], [b"a" * 1000])
        store.put(IDENTITY, [1, 2, 3, 4], [b"b" * 1000], first=1)
        store.put(KvIdentity(weights="v", dtype="", rope="", layout="", block_tokens=2), [5, 6], [b"c" * 1000])
    return tmp_path / "store"


def test_stats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "stats", str(folder)]) == 0
    assert capsys.readouterr() == (
        f"folder  {folder}\nstored  6 tokens in 3 blocks, 2.93 KiB\nmodels  2\n"
        "on disk 48.00 KiB of 1.00 MiB, 3 files\n",
        "",
    )
    (folder / ("0" * 32 + ".kv.new")).touch()
    assert main(["store", "stats", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["capacity_nbytes"], found["blocks"], found["left_over_files"]) == (2**20, 3, 1)
    assert main(["store", "stats", str(folder), "--drive", "/x"]) == 2
    assert "leave --drive out" in capsys.readouterr().err


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(folder)]) == 0
    assert capsys.readouterr() == ("ok: 3 blocks in 3 files, 2.93 KiB\n", "")
    path = sorted(folder.glob("*.kv"))[0]
    data = bytearray(path.read_bytes())
    data[8192] ^= 1
    path.write_bytes(data)
    assert main(["store", "verify", str(folder)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"bad: 1000 B at offset 8192 of {path}: its checksum is")
    assert last.startswith("1 bad among 3 blocks in 3 files, 2.93 KiB: ")
    path.write_bytes(b"")
    assert main(["store", "verify", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["good"], found["blocks"], [bad["path"] for bad in found["bad"]]) == (False, 2, [str(path)])
    assert main(["store", "stats", str(folder)]) == 0
    assert "1 files cannot be read: penstock store verify" in capsys.readouterr().out


def test_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(path for path in folder.glob("*.kv") if b"a" * 1000 in path.read_bytes())
    first.unlink()  # what follows it cannot be found any more
    (folder / ("0" * 32 + ".kv.new")).touch()
    assert main(["store", "stats", str(folder)]) == 0
    assert "1 files follow a block that is gone, 1 were left" in capsys.readouterr().out
    assert main(["store", "prune", str(folder)]) == 0
    assert capsys.readouterr().out == (
        "gave 12.00 KiB back: 1 files of blocks, 1 left over; 24.00 KiB of 1.00 MiB stay in use\n"
    )
    assert main(["store", "prune", str(folder), "--capacity", "24KiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["capacity_nbytes"] == 24 * 1024
    assert main(["store", "prune", str(folder), "--capacity", "1KiB"]) == 2
    with PrefixStore(folder):
        assert main(["store", "prune", str(folder)]) == 1
        assert "is in use by" in capsys.readouterr().err
        assert main(["store", "verify", str(folder)]) == 0
    run = folder.parent / "run"
    run.mkdir()
    assert main(["store", "prune", str(run), "--capacity", "1GiB"]) == 2
    assert "leave --capacity out" in capsys.readouterr().err
