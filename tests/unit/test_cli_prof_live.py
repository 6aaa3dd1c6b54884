"""`penstock prof live`: what a running recording shows, part by part, and how it ends."""

import os
from pathlib import Path
from typing import Any

import pytest
from profiles import MIB, footer, header, profile_of, streamed
from summaries import Recordings

from penstock.cli import main
from penstock.cli.prof.watch import WINDOW_NS, Watch
from penstock.runtime.profiler.profile import Columns, Profile
from penstock.runtime.profiler.running import announce
from penstock.runtime.profiler.schema import (
    Category,
    Cause,
    Compute,
    Gauge,
    Link,
    Memory,
    Meter,
    Phase,
    Step,
    Tier,
    Transfer,
    Wait,
)

S = 1_000_000_000


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    return Recordings(monkeypatch)


def part(second: int, *, last: bool = False, **changes: Any) -> Profile:
    """One second of a run: half of it waits, 100 MiB are read, one token is made."""
    at = second * S
    found = profile_of(
        [
            Step(id=second, phase=0, start=at, end=at + S, tokens=1),
            Transfer(
                id=second,
                block=0,
                link=Link.DISK_READ,
                nbytes=100 * MIB,
                cause=Cause.DEMAND,
                issued=at,
                start=at,
                end=at + S // 2,
            ),
            Wait(block=0, needed=at, ready=at + S // 2, module=1),
            Wait(block=1, needed=at + S // 4, ready=at + S // 2, module=2),
            Compute(module=0, phase=Phase.FORWARD, start=at, end=at + S),
            Compute(module=second % 4 + 1, phase=Phase.FORWARD, start=at + S // 2, end=at + S - 1, depth=1),
            Memory(at=at, tier=Tier.DISK, category=Category.KV, nbytes=MIB),
            Gauge(at=at, meter=Meter.HOST_RSS, value=(200 + second) * MIB),
        ],
        header=header(**changes),
    )
    found.footer = footer(written_ns=at + S, recorded=8, own_ns=(second + 1) * S // 100, last=last)
    return found


def test_a_watch_adds_parts_up_and_forgets_what_is_past() -> None:
    watch = Watch()
    assert watch.now() is None
    watch.add(part(0))
    now = watch.now()
    assert now is not None
    assert (now.steps, now.phase, now.module, now.elapsed_ns) == (1, "decode", "layers.0", S)
    assert now.tokens_per_s == 1.0
    assert now.stall == 0.5
    assert now.overhead == pytest.approx(0.01)
    assert [(tier.name, tier.nbytes, tier.limit_nbytes) for tier in now.tiers] == [
        ("host", 200 * MIB, 512 * MIB),
        ("disk", MIB, None),
    ]
    assert [(link.name, link.rate, link.peak) for link in now.links] == [("disk_read", 100 * MIB, 1e9)]
    for second in range(1, 20):
        watch.add(part(second))
    now = watch.now()
    assert now is not None
    assert (now.steps, now.module) == (20, "layers.3")
    assert [tier.nbytes for tier in now.tiers] == [219 * MIB, 20 * MIB]
    assert now.stall == pytest.approx(0.5)
    assert now.links[0].rate == pytest.approx(100 * MIB)
    assert all(len(columns) <= 2 * WINDOW_NS // S + 1 for columns in watch._recent.values())


def test_a_budget_bounds_what_came_on_top_of_what_was_there_before() -> None:
    # GIVEN a process of 200 MiB that holds 180 MiB since before the recording, under a budget of 512 MiB
    before = profile_of([Memory(at=0, tier=Tier.HOST, category=Category.BASELINE, nbytes=180 * MIB)])
    watch = Watch()
    watch.add(before)
    watch.add(part(0))
    now = watch.now()
    assert now is not None
    host = now.tiers[0]
    assert (host.nbytes, host.before_nbytes, host.counted_nbytes) == (200 * MIB, 180 * MIB, 20 * MIB)
    # WHEN the process gives back memory that it held before
    shrunk = part(1)
    shrunk.columns[Gauge] = Columns.of(Gauge, [Gauge(at=2 * S, meter=Meter.HOST_RSS, value=150 * MIB)])
    watch.add(shrunk)
    now = watch.now()
    assert now is not None
    assert now.tiers[0].counted_nbytes == 0
    # WHEN there is no budget, THEN the capacity holds all of it
    watch.add(part(2, budgets={}))
    now = watch.now()
    assert now is not None
    assert (now.tiers[0].before_nbytes, now.tiers[0].counted_nbytes) == (0, 202 * MIB)


def test_what_was_there_before_is_said_beside_the_bar(
    recordings: Recordings, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings.parts = [streamed()]
    assert main(["prof", "live", "run.prof", "--once"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1].endswith("20.00 MiB of 512.00 MiB (3.9%)")
    assert lines[2].strip() == "on top of 200.00 MiB from before"


def test_a_part_of_another_run_starts_anew() -> None:
    watch = Watch()
    watch.add(part(0))
    watch.add(part(1, run="another"))
    now = watch.now()
    assert now is not None
    assert now.steps == 1
    assert now.tiers[1].nbytes == MIB


def test_one_look_at_a_file(recordings: Recordings, capsys: pytest.CaptureFixture[str]) -> None:
    recordings.parts = [part(0)]
    assert main(["prof", "live", "run.prof", "--once"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "run.prof: 1.00 s, step 1 (decode)"
    assert lines[1].startswith("host ")
    assert lines[1].endswith("200.00 MiB of 512.00 MiB (39.1%)")
    assert lines[3].startswith("disk_read ")
    assert lines[3].endswith("100.00 MiB/s of 953.67 MiB/s (10.5%)")
    assert lines[4:] == [
        "module       layers.0",
        "tokens/s     1.00",
        "stall        50.0% of the time somebody waits for a block",
        "recording    takes 1.00% of the time",
    ]


def test_one_look_at_a_file_without_anything(recordings: Recordings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prof", "live", "run.prof", "--once"]) == 0
    assert capsys.readouterr().out == "run.prof: nothing recorded yet\n"


def test_watching_ends_with_the_recording(recordings: Recordings, capsys: pytest.CaptureFixture[str]) -> None:
    recordings.parts = [None, part(0), None, part(1, last=True), part(2)]
    assert main(["prof", "live", "run.prof"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("run.prof: 2.00 s, step 2 (decode), ended\n")
    assert out.endswith("of the time\n")
    assert len(recordings.parts) == 1


def test_watching_a_process_ends_with_it_after_its_last_part(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announcement = announce(tmp_path / "mine.prof")
    recordings.parts = [part(0), part(1)]
    monkeypatch.setattr("time.sleep", lambda seconds: announcement.close())
    assert main(["prof", "live", str(os.getpid())]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[0] == f"{os.getpid()} (mine.prof): 2.00 s, step 2 (decode)"
    assert recordings.parts == []


def test_a_file_is_watched_while_the_process_lives_that_announced_it(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announcement = announce(tmp_path / "mine.prof")
    monkeypatch.setattr("time.sleep", lambda seconds: announcement.close())
    assert main(["prof", "live", str(tmp_path / "mine.prof")]) == 0
    assert capsys.readouterr().out == "mine.prof: nothing recorded yet\n"


def test_watching_can_be_interrupted(recordings: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert main(["prof", "live", "run.prof", "--interval", "0.5"]) == 130
    assert main(["prof", "live", "run.prof", "--interval", "0"]) == 2


def test_a_process_that_records_nothing_is_2(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prof", "live", "1"]) == 2
    assert capsys.readouterr().err == (
        "error: process 1 records nothing; those that do: none at all. Name the file if there is one.\n"
    )
    announcement = announce(tmp_path / "mine.prof")
    assert main(["prof", "live", "1"]) == 2
    assert f"those that do: {os.getpid()} (mine.prof)." in capsys.readouterr().err
    announcement.close()


def test_a_plain_run_shows_no_bars_for_what_has_no_limit(
    recordings: Recordings, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = streamed()
    whole.header = header(budgets={}, capacities={}, peaks={})
    recordings.parts = [whole]
    assert main(["prof", "live", "run.prof", "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["host", "220.00", "MiB"]
    assert lines[2].split()[0] == "disk_read"
