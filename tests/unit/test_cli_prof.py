"""`penstock prof …` through `main`: what is printed where, exit codes, files that are never overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from profiles import footer, profile_of, streamed
from summaries import MIB, MS, Recordings, module, summary, without_figures

from penstock.cli import main
from penstock.cli.prof.verbs import PROF_VERBS
from penstock.runtime.profiler.profile import Profile
from penstock.runtime.profiler.summary import Leak


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    return Recordings(monkeypatch)


@pytest.fixture
def run(recordings: Recordings, tmp_path: Path) -> str:
    """A good profile."""
    return recordings.add(tmp_path / "run.prof", streamed(), summary())


def test_help_reads_well_and_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "penstock", "prof", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in PROF_VERBS)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "penstock.cli.prof.verbs" in imported
    assert not imported & {"torch", "transformers"}


def test_the_profiler_needs_no_torch() -> None:
    modules = "limits", "comparison", "running", "exports.formats"
    imports = "; ".join(f"import penstock.runtime.profiler.{name}" for name in modules)
    code = f"import sys; {imports}; import penstock.cli.prof.watch, penstock.testing; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("verb", sorted(PROF_VERBS))
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main(["prof", verb, "--help"]) == 0
    assert f"penstock prof {verb}" in capsys.readouterr().out


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prof"]) == 2
    assert "stats" in "".join(capsys.readouterr())


@pytest.mark.parametrize("argv", [["stats"], ["report"], ["check", "--no-leaks"], ["export", "--to", "csv"]])
def test_what_is_no_profile_is_one_line(
    recordings: Recordings, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert main(["prof", *argv, "nothing.prof"]) == 1
    assert capsys.readouterr() == ("", "error: nothing.prof is no profile\n")


# stats


def test_stats_opens_on_the_verdict_and_shows_every_part(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prof", "stats", run]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "disk-bound: 75% of idle time waits on reads"
    assert "window       200.00 ms, 5 steps" in lines
    assert "tokens       5, 25.00 per second" in lines
    assert "distance     1.25 (time / least time possible, which is 160.00 ms, by disk_read)" in lines
    assert (
        "host peak    220.00 MiB; 30.00 MiB above the baseline, budget 512.00 MiB; capacity 1.00 GiB; 95.5% of it named"
        in lines
    )
    assert "Time without computing: 40.0%" in lines
    assert [line.split() for line in lines if line.startswith(" disk ")] == [
        ["disk", *["a", "block", "was", "still", "being", "read"], "60.00", "ms", "75.0%"]
    ]
    assert [line.split() for line in lines if line.startswith(" unaccounted")] == [
        ["unaccounted", "10.00", "MiB", "4.5%"]
    ]
    assert lines[-1] == "recorded     100 records, none lost; recording took 0.40% of the time"
    order = [out.index(part) for part in ("Time without", "Links", "Prefetch", "host: peak by category", "Modules")]
    assert order == sorted(order)
    assert "\x1b" not in out


def test_stats_of_a_run_without_anything(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recordings.add(tmp_path / "empty.prof", profile_of([]), without_figures())
    assert main(["prof", "stats", path]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("nothing was recorded\n")
    assert "Time without computing: –" in out


def test_stats_lists_one_thing_in_full(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = summary(modules=tuple(module(f"layers.{i}") for i in range(12)))
    path = recordings.add(tmp_path / "run.prof", streamed(), many)
    assert main(["prof", "stats", path, "--by", "module", "--top", "3"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("Modules (3 of 12)")
    assert "layers.2 " in out
    assert "layers.3 " not in out
    assert main(["prof", "stats", path, "--by", "link"]) == 0
    assert "disk_read" in capsys.readouterr().out
    assert main(["prof", "stats", path, "--by", "category"]) == 0
    assert "unaccounted" in capsys.readouterr().out


def test_names_in_a_profile_are_no_markup(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = summary(modules=(module("[red]layers[/nothing]"),), verdict="[bold]x[/]")
    path = recordings.add(tmp_path / "run.prof", streamed(), hostile)
    assert main(["prof", "stats", path]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("[bold]x[/]\n")
    assert "[red]layers[/nothing]" in out


def test_names_in_a_profile_send_nothing_to_the_terminal(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leak = Leak(tier="HOST", nbytes_per_step=float(MIB), steps=5, module="a\x1b]0;owned\x07\nb")
    hostile = summary(modules=(module("\x1b[2J\ud800"),), verdict="\x1b[31mx", leaks=(leak,))
    profile = streamed()
    profile.problems = ("\x1b[5m",)
    path = recordings.add(tmp_path / "run.prof", profile, hostile)
    verbs = (["stats", path], 0), (["check", path, "--no-leaks"], 4), (["diff", path, path, "--by", "module"], 0)
    for argv, code in verbs:
        assert main(["prof", *argv]) == code
        assert not set("".join(capsys.readouterr())) & {"\x1b", "\x07", "\ud800"}


def test_stats_as_json_is_everything(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prof", "stats", run, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["summary"]["idle"] == {"disk": 60 * MS, "link": 0, "space": 0, "host": 15 * MS, "other": 5 * MS}
    assert document["header"]["run"] == "0123456789abcdef"
    assert document["footer"]["dropped"] == 0


def damaged() -> Profile:
    profile = streamed()
    profile.problems = ("segment 3 is damaged and was left out",)
    profile.footer = footer(recorded=100, dropped=10, last=False)
    profile.header = msgspec.structs.replace(profile.header, emulated=True)
    return profile


def test_losses_and_damage_are_told_on_stderr_by_every_verb(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recordings.add(tmp_path / "run.prof", damaged(), summary())
    other = recordings.add(tmp_path / "other.prof", streamed(), summary())
    warnings = (
        f"warning: {path}: segment 3 is damaged and was left out\n"
        f"warning: {path}: 10 of 100 records were lost (see the log of the run for why); the figures are of the others"
        f"\n"
        f"warning: {path}: the run has not ended, or was killed; the figures are of what was written\n"
        f"warning: {path}: links were emulated: times are not those of a real device\n"
    )
    for argv in (
        ["stats", path, "--json"],
        ["check", path, "--no-leaks"],
        ["diff", path, other, "--json"],
        ["report", path],
        ["export", path, "--to", "csv"],
    ):
        assert main(["prof", *argv]) == 0
        assert capsys.readouterr().err.startswith(warnings)


def test_the_exception_that_ended_a_run_is_told(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = streamed()
    profile.footer = footer(failure="ValueError: [no]", last=True)
    path = recordings.add(tmp_path / "run.prof", profile, summary())
    assert main(["prof", "stats", path, "--json"]) == 0
    assert capsys.readouterr().err == f"warning: {path}: the run ended by ValueError: [no]\n"


# check


def test_check_of_kept_limits_is_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--max-host-peak", "1GiB", "--max-device-peak", "8GiB", "--max-bubble", "50%", "--min-on-time", "0.5"]
    limits += ["--min-overlap", "disk_read=0.5", "--max-distance", "1.3", "--no-leaks"]
    assert main(["prof", "check", run, *limits]) == 0
    assert capsys.readouterr() == (
        "ok: device peak 0 B (at most 8.00 GiB); host peak 220.00 MiB (at most 1.00 GiB); bubble 40.0% (at most 50.0%);"
        " distance 1.25 (at most 1.30); on time 90.0% (at least 50.0%); disk_read overlap 60.0% (at least 50.0%); no "
        "leaks in 5 steps\n",
        "",
    )


def test_check_of_broken_limits_is_a_line_each_and_4(
    recordings: Recordings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaking = summary(leaks=(Leak(tier="HOST", nbytes_per_step=float(MIB), steps=5),))
    path = recordings.add(tmp_path / "run.prof", streamed(), leaking)
    assert main(["prof", "check", path, "--max-bubble", "0.2", "--max-distance", "1.3", "--no-leaks"]) == 4
    assert capsys.readouterr() == (
        "bubble 40.0% is over the limit of 20.0%: 75.0% of it is disk, where blocks were still being read: more host "
        "memory keeps more of them off the disk\n"
        "host memory grows by 1.00 MiB per step over 5 steps, and no growth is allowed: look for tensors kept that "
        "outlive their step\n",
        "",
    )


def test_check_against_a_baseline(
    recordings: Recordings, tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = recordings.add(tmp_path / "slower.prof", streamed(), summary(step_ns=44 * MS))
    assert main(["prof", "check", run, "--baseline", run]) == 0
    assert main(["prof", "check", slower, "--baseline", run, "--tolerance", "11%"]) == 0
    capsys.readouterr()
    assert main(["prof", "check", slower, "--baseline", run]) == 4
    assert capsys.readouterr().out == (
        "time per step 44.00 ms is worse than the baseline's 40.00 ms (+10.0%), and 5% are tolerated: compare the two "
        "with penstock prof diff, or record a new baseline if the change is meant\n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is nothing to check: give a limit, for example --max-bubble 20%, or --baseline FILE"),
        (["--max-host-peak", "8G"], "'8G' is ambiguous: write 8GiB (2^30) or 8GB (10^9)"),
        (["--max-bubble", "20"], "'20' is ambiguous: write 20% or 0.2"),
        (["--max-bubble", "few"], "'few' is not a share: write 5% or 0.05"),
        (["--max-bubble", "-1%"], "'-1%' is not a share: write 5% or 0.05"),
        (["--max-bubble", "120%"], "max_bubble is a share between 0 and 1 (0% and 100%), not 1.2"),
        (["--min-overlap", "h2d"], "--min-overlap 'h2d': write a link and a share, for example h2d=0.8"),
        (["--min-overlap", "bus=0.8"], "there is no link 'bus': links are disk_read, disk_write, h2d, d2h"),
        (["--min-overlap", "h2d=0.8,h2d=0.9"], "--min-overlap names h2d twice: give it one share"),
        (
            ["--no-leaks", "--tolerance", "5%"],
            "--tolerance says how much worse than a baseline is still good: give --baseline FILE too",
        ),
    ],
)
def test_limits_that_mean_nothing_are_2(
    run: str, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert main(["prof", "check", run, *options]) == 2
    assert capsys.readouterr() == ("", f"error: {words}\n")


# diff


def test_diff_shows_figures_and_fails_only_beyond_a_threshold(
    recordings: Recordings, tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = summary(step_ns=44 * MS, bubble=0.3, modules=(module("layers.0", waited_ns=70 * MS),))
    slower = recordings.add(tmp_path / "slower.prof", streamed(), worse)
    assert main(["prof", "diff", run, slower, "--by", "module"]) == 0
    out, error = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert ["time", "per", "step", "*", "40.00", "ms", "44.00", "ms", "+10.0%", "worse"] in rows
    assert ["bubble", "*", "40.0%", "30.0%", "-10.0", "points", "better"] in rows
    assert out.index("layers.1") > out.index("Modules, per step")
    assert [row[:1] for row in rows if row and row[0].startswith("layers")] == [["layers.0"], ["layers.1"]]
    assert error == ""
    assert main(["prof", "diff", run, slower, "--threshold", "10%"]) == 0
    capsys.readouterr()
    assert main(["prof", "diff", run, slower, "--threshold", "0.05", "--json"]) == 4
    out, error = capsys.readouterr()
    document = json.loads(out)
    assert document["over_threshold"] == ["time per step"]
    assert document["figures"][0] == {
        "name": "time per step",
        "unit": "ns",
        "better": "less",
        "before": 40 * MS,
        "after": 44 * MS,
        "change": 0.1,
    }
    assert error == "time per step is worse by 10.0%; 0.05 are tolerated\n"
