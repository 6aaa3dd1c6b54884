"""`penstock moe`: what is printed, what is drawn, and every way to say no."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from moe_traces import plain_trace, recipe

from penstock.cli import main
from penstock.scheduler.experts.tracefile import encode_trace, read_trace

SMALL = ("--layers", "3", "--experts", "16", "--top-k", "2", "--requests", "2", "--prompt", "8", "--generate", "20")


@pytest.fixture
def trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "made.moe"
    assert main(["moe", "generate", str(path), *SMALL]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    return path


def test_generate_takes_the_sizes_of_a_config(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 100, "num_local_experts": 8,
        "num_experts_per_tok": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "made.moe"
    assert main(["moe", "generate", str(path), "--model", str(tmp_path), "--requests", "1"]) == 0
    header = read_trace(path).header
    assert (header.routing.layers, header.routing.experts, header.routing.top_k) == (2, 8, 2)
    assert header.expert is not None
    assert (header.expert.hidden, header.expert.ffn, header.expert.gated, header.expert.dtype) == (
        256,
        512,
        True,
        "float32",
    )
    assert header.source.startswith("generated: seed 0")


def test_generate_makes_the_same_file_twice_and_overwrites_only_when_told(trace: Path, tmp_path: Path) -> None:
    before = trace.read_bytes()
    assert main(["moe", "generate", str(trace), *SMALL, "--seed", "1"]) == 2
    assert trace.read_bytes() == before
    assert main(["moe", "generate", str(tmp_path / "b.moe"), *SMALL]) == 0
    assert (tmp_path / "b.moe").read_bytes() == before
    assert main(["moe", "generate", str(trace), *SMALL, "--seed", "1", "--force"]) == 0
    assert trace.read_bytes() != before


def test_replay_prints_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["moe", "replay", str(trace), "--policy", "lru,decayed-lfu", "--capacity", "25%"]) == 0
    out, notes = capsys.readouterr()
    heading, *lines = out.splitlines()
    assert heading.split()[:3] == ["policy", "capacity", "hits"]
    assert [line.split("  ")[0] for line in lines] == ["MIN", "MIN, always admits", "lru", "decayed-lfu"]
    assert "seconds are simulated, of the expert layers alone, for RTX 4090" in notes


def test_replay_as_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["moe", "replay", str(trace), "--policy", "mrs", "--capacity", "25%,24", "--prefetch", "1", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["machine"].startswith("RTX 4090")
    assert [(row["policy"], row["capacity"]) for row in found["rows"]] == [
        (name, capacity) for capacity in (12, 24) for name in ("MIN", "MIN, always admits", "mrs")
    ]
    row = found["rows"][2]
    assert row["simulated"]["decode"]["seconds"] > 0
    assert sum(row["simulated"]["decode"]["hits"].values()) == pytest.approx(
        row["hit_rate"] * row["simulated"]["decode"]["uses"]
    )
    assert row["kept_rate"] <= found["rows"][0]["hit_rate"]
    assert row["simulated"]["prefetching"]["asked"] > 0


def test_replay_on_a_machine_without_a_device(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["moe", "replay", str(trace), "--policy", "lru", "--hardware", "cpu-only", "--json"]
    assert main(arguments) == 0
    row = json.loads(capsys.readouterr().out)["rows"][2]["simulated"]["decode"]
    assert row["copied_nbytes"] == 0
    assert row["read_nbytes"] > 0
    assert row["computed_by_cpu"] == row["uses"]
    assert main([*arguments, "--host", "50%"]) == 2
    assert "has no device: --capacity is what its memory holds" in capsys.readouterr().err


class Page(HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text("utf-8"))
    return page


def test_report_is_one_file_that_needs_nothing_else(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["moe", "report", str(trace), "--policy", "lru,decayed-lfu", "--capacity", "12%,50%", "--no-map"]
    assert main(arguments) == 0
    path = trace.with_suffix(".html")
    assert capsys.readouterr().out == f"{path}\n"
    page = parsed(path)
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2
    assert page.tags.count("polyline") == 6, "two bounds and two policies; seconds of the policies"
    for words in ("MIN, always admits", "decayed-lfu", "nothing was measured", "made.moe: caches of experts"):
        assert words in page.text
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


def test_report_maps_the_best_policy(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.scheduler.experts import contest

    monkeypatch.setattr(contest, "ZIPFS", (0.0, 1.2))
    monkeypatch.setattr(contest, "CONTEXTS", (0.5,))
    out = tmp_path / "map.html"
    assert main(["moe", "report", str(trace), "--policy", "lru,lfu", "--capacity", "25%", "-o", str(out)]) == 0
    page = parsed(out)
    assert page.tags.count("rect") == 4
    assert "words: token 0.25" in page.text
    assert "next: +" in page.text or "all alike" in page.text


def test_where_policies_do_not_differ_the_map_names_none() -> None:
    from penstock.cli.moe.mapsvg import maps
    from penstock.scheduler.experts.account import Account
    from penstock.scheduler.experts.cache import CacheStatistics
    from penstock.scheduler.experts.contest import Cell, Contender
    from penstock.scheduler.experts.replay import ReplayResult

    def cell(*seconds: float) -> Cell:
        results = {}
        for name, each in zip(("lru", "mrs"), seconds, strict=True):
            decode = Account(tokens=1, seconds=each).result(1)
            results[Contender(policy=name)] = ReplayResult(
                prefill=decode,
                decode=decode,
                cache=CacheStatistics(held=0, admitted=0, evicted=0, bypassed=0),
                prefetching=None,
            )
        return Cell(recipe=recipe(), results=results)

    colours = {"lru": "#111111", "mrs": "#222222"}
    same, other = maps([cell(1.0, 1.0)], colours), maps([cell(1.1, 1.0)], colours)
    assert "all alike" in same
    assert "#111111" not in same
    assert "next: +10.0%" in other
    assert "#222222" in other


def test_names_in_a_trace_reach_the_page_as_text_only(tmp_path: Path) -> None:
    from dataclasses import replace

    import msgspec

    from penstock.scheduler.experts.shape import ExpertShape

    made = plain_trace([[[1, 2]], [[1, 3]]])
    header = msgspec.structs.replace(
        made.header, source="<script>alert(1)</script>", expert=ExpertShape(hidden=8, ffn=8)
    )
    path = tmp_path / "a.moe"
    path.write_bytes(b"".join(encode_trace(replace(made, header=header))))
    assert main(["moe", "report", str(path), "--policy", "lru", "--capacity", "25%", "--no-map"]) == 0
    assert "script" not in parsed(path.with_suffix(".html")).tags


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--policy", "arc"), "--policy 'arc' is not known: use lru, lfu, decayed-lfu"),
        (("--capacity", "25"), ""),
        (("--capacity", "101%"), "a share is between 0% and 100%"),
        (("--capacity", "49"), "there are 48 experts in all layers together"),
        (("--capacity", "lots"), "write for example 25%, 2GiB"),
        (("--capacity", "1KiB"), "1KiB holds no expert: one takes"),
        (("--minimum", "2"), "--minimum"),
        (("--host", "25%,50%"), "--host '25%,50%' names 2 sizes: it takes one"),
        (("--admit", "never"), "--admit 'never' is not known: use always, better, proven, adaptive"),
        (("--hardware", "nosuch"), "is no file and no machine known here: use"),
    ],
)
def test_what_has_no_meaning_is_a_usage_error(
    trace: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], why: str
) -> None:
    code = main(["moe", "replay", str(trace), *more])
    assert code == (2 if why else 0)
    assert why in capsys.readouterr().err


def test_files_that_cannot_be_used(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["moe", "replay", str(tmp_path / "none.moe")]) == 1
    assert "cannot read" in capsys.readouterr().err
    bare = tmp_path / "bare.moe"
    bare.write_bytes(b"".join(encode_trace(plain_trace([[[1, 2]]]))))
    assert main(["moe", "replay", str(bare)]) == 2
    assert "does not say how large its experts are" in capsys.readouterr().err
    cut = tmp_path / "cut.moe"
    cut.write_bytes(trace.read_bytes()[:-1])
    assert main(["moe", "replay", str(cut)]) == 1
    assert "ends within its first segment" in capsys.readouterr().err
    assert main(["moe", "generate", str(tmp_path / "x.moe"), "--top-k", "9", "--experts", "8"]) == 2
    assert "a token can use 1 to all of them" in capsys.readouterr().err


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from penstock.cli import main; main(['moe', 'generate', sys.argv[1], '--layers', '1']); "
        "main(['moe', 'replay', sys.argv[1], '--policy', 'lru']); sys.exit('torch' in sys.modules)"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{folder}/a.moe"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
