"""The pytest plugin: tests within their limits pass, others fail with the sentences of `penstock prof check`."""

import sys
from pathlib import Path
from types import ModuleType, TracebackType

import pytest
from profiles import streamed
from summaries import Recordings, summary

pytest_plugins = ("pytester",)

OVER = (
    "bubble 40.0% is over the limit of 20.0%: 75.0% of it is disk, where blocks were still being read: more host "
    "memory keeps more of them off the disk"
)


class FakeProfiler:
    """Records nothing, and tells what it was asked for."""

    made: list["FakeProfiler"]
    recordings: Recordings

    def __init__(self, path: Path, *, level: str, force: bool) -> None:
        self.path, self.level, self.force = path, level, force
        self.error: BaseException | None = None
        self.made.append(self)

    def __enter__(self) -> "FakeProfiler":
        self.path.write_bytes(b"profile")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.error = error
        self.recordings.add(self.path, streamed(), summary())


@pytest.fixture
def profilers(monkeypatch: pytest.MonkeyPatch) -> list[FakeProfiler]:
    monkeypatch.setattr(FakeProfiler, "made", [], raising=False)
    monkeypatch.setattr(FakeProfiler, "recordings", Recordings(monkeypatch), raising=False)
    fake = ModuleType("penstock.runtime.profiler.profiler")
    fake.__dict__["Profiler"] = FakeProfiler
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return FakeProfiler.made


def ran(pytester: pytest.Pytester, marker: str, body: str = "pass") -> pytest.RunResult:
    pytester.makepyfile(f"import pytest\n\n@pytest.mark.offload_limits({marker})\ndef test_it():\n    {body}\n")
    return pytester.runpytest_inprocess("-p", "penstock.testing", "-p", "no:cacheprovider", "--strict-markers")


def test_within_its_limits_a_test_passes_and_leaves_nothing(
    pytester: pytest.Pytester, profilers: list[FakeProfiler]
) -> None:
    ran(pytester, 'host_peak="1GiB", max_bubble="50%", min_overlap={"disk_read": 0.5}').assert_outcomes(passed=1)
    (profiler,) = profilers
    assert (profiler.level, profiler.force, profiler.error) == ("light", True, None)
    assert not profiler.path.parent.exists()


def test_over_its_limits_a_test_fails_with_the_sentences_of_check(
    pytester: pytest.Pytester, profilers: list[FakeProfiler]
) -> None:
    result = ran(pytester, "max_bubble=0.2, max_distance=1.1, no_leaks=True")
    result.assert_outcomes(failed=1)
    (profiler,) = profilers
    lines = result.stdout.lines
    assert OVER in lines
    assert f"the profile: {profiler.path}" in lines
    assert sum("is over the limit of" in line for line in lines[lines.index(OVER) : lines.index(OVER) + 2]) == 2
    assert profiler.path.exists()
    profiler.path.unlink()
    profiler.path.parent.rmdir()


def test_a_test_that_fails_by_itself_fails_as_ever(pytester: pytest.Pytester, profilers: list[FakeProfiler]) -> None:
    result = ran(pytester, "max_bubble=0.2", "assert 1 == 2")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])
    result.stdout.no_fnmatch_line("*over the limit*")
    (profiler,) = profilers
    assert isinstance(profiler.error, AssertionError)
    assert not profiler.path.parent.exists()


def test_a_skip_inside_is_a_skip(pytester: pytest.Pytester, profilers: list[FakeProfiler]) -> None:
    ran(pytester, "max_bubble=0.2", "pytest.skip('no GPU')").assert_outcomes(skipped=1)


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("max_buble=0.2", "offload_limits: there is no limit 'max_buble': did you mean max_bubble?"),
        ('"8GiB"', "offload_limits: limits are given by name, not as '8GiB': device_peak, *"),
        ("", "offload_limits: there is nothing to check: give a limit, one of *"),
        ('host_peak="8G"', "offload_limits: '8G' is ambiguous: *"),
        ("min_overlap=0.8", "offload_limits: min_overlap is a dictionary by link, *"),
        ('max_distance="x"', "offload_limits: max_distance is a number, *"),
    ],
)
def test_a_marker_that_means_nothing_fails_the_test_before_it_runs(
    pytester: pytest.Pytester, profilers: list[FakeProfiler], marker: str, words: str
) -> None:
    result = ran(pytester, marker, "print('it ran')")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([words])
    result.stdout.no_fnmatch_line("*it ran*")
    assert profilers == []


def test_unmarked_tests_are_not_recorded(pytester: pytest.Pytester, profilers: list[FakeProfiler]) -> None:
    pytester.makepyfile("def test_it(): pass")
    pytester.runpytest_inprocess("-p", "penstock.testing", "-p", "no:cacheprovider").assert_outcomes(passed=1)
    assert profilers == []


def test_the_marker_is_documented(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("-p", "penstock.testing", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.offload_limits(device_peak=…, host_peak=…, *"])
