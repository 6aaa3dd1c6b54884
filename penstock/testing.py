"""A pytest plugin: tests that fail when the code they run takes more memory, or waits longer, than it may.

    @pytest.mark.offload_limits(host_peak="8GiB", max_bubble=0.2, min_overlap={"h2d": 0.8})
    def test_generates(): ...

The test is recorded, and its profile held against the limits, as `penstock prof check` does.
"""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .memory.errors import UsageError

if TYPE_CHECKING:
    from .runtime.profiler.limits import Limits

_MARKER: Final = "offload_limits"
_SIZES: Final = ("device_peak", "host_peak")
_SHARES: Final = ("max_bubble", "min_on_time")
_NAMES: Final = (*_SIZES, *_SHARES, "max_distance", "min_overlap", "no_leaks")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known (called by pytest)."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}({', '.join(f'{name}=…' for name in _NAMES)}): record the test with penstock.Profiler, and fail it "
        "if a limit is not kept",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Record a marked test, then hold it against its limits (called by pytest around each test)."""
    marker = item.get_closest_marker(_MARKER)
    if marker is None:
        return (yield)
    from .runtime.profiler.profiler import Profiler  # not before: most tests are not marked

    try:
        limits = limits_of(*marker.args, **marker.kwargs)
    except UsageError as error:
        pytest.fail(f"{_MARKER}: {error}", pytrace=False)
    folder = Path(tempfile.mkdtemp(prefix="penstock-test-"))
    path = folder / "test.prof"
    try:
        with Profiler(path, level="light", force=True):
            result = yield
    except BaseException:  # the test's own: it stands as it is, and there is nothing to keep
        shutil.rmtree(folder, ignore_errors=True)
        raise
    broken = _broken(path, limits)
    if broken:
        pytest.fail("\n".join([*broken, f"the profile: {path}"]), pytrace=False)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def limits_of(*args: object, **kwargs: Any) -> Limits:
    """The limits that a marker names: sizes as "8GiB" or bytes, shares as 0.2 or "20%".

    Raises:
        UsageError: an unknown name, a value that means nothing, or no limit at all.
    """
    from .runtime.profiler.limits import Limits
    from .shares import parse_share
    from .sizes import parse_size

    if args:
        raise UsageError(f"limits are given by name, not as {args[0]!r}: {', '.join(_NAMES)}")
    for name in kwargs:
        if name not in _NAMES:
            close = difflib.get_close_matches(name, _NAMES, n=1)
            meant = f"did you mean {close[0]}?" if close else f"limits are {', '.join(_NAMES)}"
            raise UsageError(f"there is no limit {name!r}: {meant}")
    values = {name: value for name, value in kwargs.items() if value is not None}
    for name in values:
        if name in _SIZES:
            values[name] = parse_size(values[name])
        elif name in _SHARES:
            values[name] = parse_share(values[name])
    distance = values.get("max_distance")
    if distance is not None and not isinstance(distance, int | float):
        raise UsageError(f"max_distance is a number, such as 1.15, not {distance!r}")
    overlaps = values.get("min_overlap", {})
    if not isinstance(overlaps, Mapping):
        raise UsageError(f'min_overlap is a dictionary by link, such as {{"h2d": 0.8}}, not {overlaps!r}')
    values["min_overlap"] = {link: parse_share(value) for link, value in overlaps.items()}
    limits = Limits(**values)
    if limits.empty:
        raise UsageError(f"there is nothing to check: give a limit, one of {', '.join(_NAMES)}")
    return limits


def _broken(path: Path, limits: Limits) -> list[str]:
    from .runtime.profiler.limits import judge
    from .runtime.profiler.metrics import summarise
    from .runtime.profiler.reader import read_profile

    judgements = judge(summarise(read_profile(path)), limits)
    return [judgement.sentence for judgement in judgements if not judgement.holds]
