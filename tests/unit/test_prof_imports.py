"""What importing libraries takes, and that imports stay what they are."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.runtime.profiler.imports import ImportWatch, is_library
from penstock.runtime.profiler.recorder import Recorder
from penstock.runtime.profiler.ring import Ring
from penstock.runtime.profiler.schema import Category, Tier

USED = "penstock_test_used"
"""A module that stands for what the process holds."""


@pytest.fixture
def process() -> Iterator[SimpleNamespace]:
    """A process: modules of the test add to what it uses."""
    found = SimpleNamespace(nbytes=1000, asked=0)
    sys.modules[USED] = found  # type: ignore[assignment]
    yield found
    del sys.modules[USED]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(Ring(capacity_nbytes=2**20))


@pytest.fixture
def watch(process: SimpleNamespace, recorder: Recorder) -> Iterator[ImportWatch]:
    def in_use() -> int:
        process.asked += 1
        return int(process.nbytes)

    with ImportWatch(recorder, in_use) as entered:
        yield entered


Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules: "site-packages/x" is a library's, "x" the program's own."""
    for folder in (tmp_path, tmp_path / "site-packages"):
        folder.mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)

    def written(name: str, body: str) -> None:
        (tmp_path / f"{name}.py").write_text(f"import {USED} as process\n{body}\n")
        importlib.invalidate_caches()

    yield written
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_library_is_measured_with_what_it_imports(
    write: Write, watch: ImportWatch, process: SimpleNamespace, recorder: Recorder
) -> None:
    write("site-packages/inner_library", "process.nbytes += 5")
    write("site-packages/outer_library", "process.nbytes += 70\nimport inner_library")
    module = importlib.import_module("outer_library")
    assert recorder.live[Tier.HOST] == 75
    assert process.asked == 2  # before the outer one and after it
    assert "exec_module" not in vars(module.__spec__.loader)
    importlib.import_module("outer_library")
    assert process.asked == 2


def test_a_programs_own_module_is_not_but_libraries_that_it_imports_are(
    write: Write, watch: ImportWatch, recorder: Recorder
) -> None:
    write("site-packages/some_library", "process.nbytes += 5")
    write("own_module", "process.nbytes += 70\nimport some_library")
    importlib.import_module("own_module")
    assert recorder.live[Tier.HOST] == 5


def test_who_only_asks_for_a_module_imports_nothing(
    write: Write, watch: ImportWatch, process: SimpleNamespace, recorder: Recorder
) -> None:
    write("site-packages/asked_for", "process.nbytes += 5")
    assert importlib.util.find_spec("asked_for") is not None
    assert importlib.util.find_spec("no_such_module_anywhere") is None
    assert process.asked == 0
    importlib.import_module("asked_for")
    assert recorder.live[Tier.HOST] == 5


def test_a_library_that_raises_raises_and_the_next_one_is_measured(
    write: Write, watch: ImportWatch, recorder: Recorder
) -> None:
    write("site-packages/broken_library", "process.nbytes += 5\nraise ValueError('broken')")
    write("site-packages/sound_library", "process.nbytes += 70")
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module("broken_library")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        importlib.import_module("no_such_module_anywhere")
    assert recorder.live[Tier.HOST] == 5
    importlib.import_module("sound_library")
    assert recorder.live[Tier.HOST] == 75


def test_tensors_that_get_their_names_meanwhile_are_not_the_librarys(
    write: Write, watch: ImportWatch, process: SimpleNamespace, recorder: Recorder
) -> None:
    process.name = lambda: recorder.memory(30, Tier.HOST, Category.WEIGHT)
    write("site-packages/model_library", "process.nbytes += 40\nprocess.name()")
    importlib.import_module("model_library")
    assert recorder.live[Tier.HOST] == 30 + 10


def test_after_the_recording_imports_are_nobodys(process: SimpleNamespace, recorder: Recorder, write: Write) -> None:
    before = list(sys.meta_path)
    with ImportWatch(recorder, lambda: process.nbytes) as watch:
        assert sys.meta_path == [watch, *before]
    assert sys.meta_path == before
    write("site-packages/late_library", "process.nbytes += 5")
    importlib.import_module("late_library")
    assert recorder.live[Tier.HOST] == 0


@pytest.mark.parametrize(
    ("origin", "library"),
    [
        ("/venv/lib/python3.12/site-packages/torch/__init__.py", True),
        ("/usr/lib/python3/dist-packages/numpy/__init__.py", True),
        (importlib.__file__, True),
        ("/home/me/train/model.py", False),
        ("/home/me/my-site-packages/model.py", False),
        ("", False),
    ],
)
def test_where_libraries_are(origin: str, library: bool) -> None:
    assert is_library(origin) is library
