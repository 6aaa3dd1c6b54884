"""`penstock run --kv` and `penstock chat`: keys and values in tiers, and conversations that are kept."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TextStreamer

from penstock.cli import main
from penstock.cli.kv_cache import whole_context
from penstock.cli.kv_option import CODECS
from penstock.kernels.kv_codec import BITS
from penstock.kvcache import TieredCache
from penstock.memory.capacity import host_capacity
from penstock.memory.ledger import process_ledger
from penstock.runtime.kv.prefixchoice import PrefixCosts
from penstock.scheduler.kv.reuse import ReadTime

KV = "host=2MiB,disk=64MiB"
PROMPT = ",".join(str(1 + at % 90) for at in range(400))
TEMPLATE = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from penstock.demo.checkpoint import DemoShape, write

    folder = tmp_path_factory.mktemp("demo")
    write(folder, DemoShape(hidden_size=64))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(folder: Path, *options: str) -> int:
    return main(["run", str(folder), "--device", "cpu", "--max-memory", "host=2MiB", "--json", *options])


@pytest.fixture
def chat(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def talk(*messages: str, options: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{message}\n" for message in messages)))
        common = ["--device", "cpu", "--max-memory", "host=2MiB", "--max-new-tokens", "5", "--context", "2000"]
        common += ["--dtype", "float32"]  # in bf16 roundings decide among tokens that are alike to a random model
        return main(["chat", str(checkpoint), *common, *options])

    return talk


def test_a_run_with_keys_and_values_on_disk(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--prompt-ids", PROMPT, "--max-new-tokens", "6")
    assert run(checkpoint, *common) == 0
    expected = json.loads(capsys.readouterr().out)
    assert "kv" not in expected
    assert run(checkpoint, *common, "--kv", KV, "--context", "1000") == 0
    out, error = capsys.readouterr()
    document = json.loads(out)
    assert document["ids"] == expected["ids"]
    assert document["kv"]["tokens"] == 405
    assert document["kv"]["read_nbytes"] > document["kv"]["written_nbytes"] > 0
    assert document["kv"]["host_nbytes"] <= document["kv"]["host_budget_nbytes"] == 2 * 2**20
    assert "keys and values: " in error


def test_a_run_with_keys_and_values_on_a_device(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--device", "emulated:h2d=1GiB/s,d2h=1GiB/s", "--max-memory", "device=4MiB,host=64MiB")
    common = ("--prompt-ids", PROMPT, "--max-new-tokens", "6", *where)
    assert run(checkpoint, *common) == 0
    expected = json.loads(capsys.readouterr().out)
    assert run(checkpoint, *common, "--kv", "device=1MiB,host=2MiB,disk=64MiB") == 0
    out, error = capsys.readouterr()
    document = json.loads(out)
    assert document["ids"] == expected["ids"]
    assert 0 < document["kv"]["device_nbytes"] <= document["kv"]["device_budget_nbytes"] == 2**20
    assert document["kv"]["sent_nbytes"] > 0
    assert "on the device (of 1.00 MiB)" in error
    assert run(checkpoint, *common, "--kv", "device=1MiB,host=2MiB,disk=64MiB", "--kv-policy", "quest:4096") == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["ids"] == expected["ids"], "the policy's budget is all there is"
    assert "on the device (of 1.00 MiB)" in error
    assert "quest:4096" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv", "device=1GiB,host=1GiB"), "has no memory of its own"),
        (("--kv", "device=1GiB,host=1GiB", "--kv-policy", "quest:256"), "has no memory of its own"),
        (("--kv", "disk=1GiB"), "say how much host memory"),
        (("--kv", "host=1G"), "ambiguous"),
        (("--kv", "host=1GiB", "--exact"), "--exact forbids"),
        (("--context", "3"), "--context 3 is less than the 68 tokens"),
        (("--kv-policy", "window:100"), "add --kv"),
        (("--kv", "host=1GiB", "--kv-policy", "best"), "use exact, window"),
        (("--kv", "device=1GiB,host=1GiB", "--kv-codec", "int4"), "beside --kv-codec int4"),
        (("--kv-codec", "int8"), "add --kv"),
        (("--kv", "host=1GiB", "--kv-codec", "fp8"), "use int8 or int4"),
    ],
)
def test_what_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert run(checkpoint, "--prompt-ids", "1,2,3,4", *options) == 2
    assert message in capsys.readouterr().err


def test_a_policy_is_named_lossy_and_says_what_it_kept(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], chat: Callable[..., int]
) -> None:
    common = ("--prompt-ids", PROMPT, "--max-new-tokens", "6")
    assert run(checkpoint, *common, "--kv", KV, "--kv-policy", "window:100,dense=0") == 0
    out, error = capsys.readouterr()
    chosen = json.loads(out)["kv"]["chosen"]
    assert chosen["policy"] == "window:100"
    assert chosen["steps"] > 0
    assert 0 < chosen["gathered_nbytes"] + chosen["read_nbytes"] < chosen["whole_nbytes"]
    assert 0 < chosen["least_recall"] <= chosen["recall"] <= 1
    said = " ".join(error.split())
    assert "LOSSY policy window:100" in said
    assert "of the attention was kept" in said
    assert chat("word " * 80, options=("--kv-policy", "window:100,dense=0")) == 0
    assert "LOSSY policy window:100" in capsys.readouterr().err


def test_a_codec_is_named_lossy_and_keeps_no_conversations(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], chat: Callable[..., int]
) -> None:
    assert tuple(BITS) == CODECS
    found = {}
    for options in ((), ("--kv-codec", "int4")):
        assert run(checkpoint, "--prompt-ids", PROMPT, "--max-new-tokens", "2", "--kv", KV, *options) == 0
        out, error = capsys.readouterr()
        kv = json.loads(out)["kv"]
        found[kv["codec"]] = kv["host_nbytes"] + kv["disk_nbytes"]
        assert ("LOSSY codec int4" in error) is bool(options)
    assert 0 < found["int4"] <= found[None] / 2  # slots are whole pages
    assert chat("word " * 80, options=("--kv-codec", "int8")) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "conversations are not kept: a prefix store has keys and values as they were made" in error
    assert "LOSSY codec int8" in error
    assert chat("word", options=("--kv-codec", "int8", "--store", "there")) == 2
    assert "or the codec" in " ".join(capsys.readouterr().err.split())


def test_too_little_memory_is_said_with_what_to_change(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--prompt-ids", "1,2,3,4", "--kv", "host=64KiB") == 3
    assert "Raise the budget of the cache" in capsys.readouterr().err


def test_a_plan_leaves_host_memory_for_keys_and_values(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = replace(host_capacity(), available_nbytes=2**31, obtainable_nbytes=2**31)
    monkeypatch.setattr("penstock.runtime.tiers.host_capacity", lambda: there)
    where = ("--device", "emulated:h2d=1GiB/s,d2h=1GiB/s", "--max-memory", "device=4MiB")
    common = ("--prompt-ids", "1,2,3", "--max-new-tokens", "1", *where)
    found = []
    for options in ((), ("--kv", "host=256MiB"), ("--kv", "host=256MiB,disk=1GiB", "--kv-codec", "int8")):
        assert run(checkpoint, *common, *options) == 0
        found.append(json.loads(capsys.readouterr().out)["plan"]["host_budget_nbytes"])
    assert found[0] - found[1] == pytest.approx(0.9 * 256 * 2**20, abs=1)
    assert found[1] == found[2]
    assert run(checkpoint, *common, "--kv", "host=3GiB") == 3
    assert "keys and values (--kv) needs 3.00 GiB of host memory; 2.00 GiB" in " ".join(capsys.readouterr().err.split())
    assert process_ledger().reserved("host") == 0


def test_turns_go_on_and_conversations_are_kept(chat: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    first = "word " * 80
    assert chat(first, "and then", options=("--no-store",)) == 0
    expected = capsys.readouterr().out
    assert len(expected.splitlines()) >= 2
    assert chat(first, "and then") == 0
    out, error = capsys.readouterr()
    assert out == expected
    assert "were read" not in error
    assert chat(first, "and then") == 0
    out, error = capsys.readouterr()
    assert out == expected
    assert error.count("tokens were read, and are not computed again") == 1


def test_what_is_computed_faster_than_read_is_computed(
    chat: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Instant:
        def call_s(self, before: int, tokens: int) -> float:
            return 0.0

    slow = PrefixCosts(prefill=Instant(), reading=ReadTime(rate=1.0))
    monkeypatch.setattr("penstock.cli.conversation.prefix_costs", lambda model, folder: slow)
    said = []
    for options in ((), (), ("--always-read",)):
        assert chat("word " * 80, options=options) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out == said[2].out
    computed, read = "tokens that are stored are computed again", "tokens were read, and are not computed again"
    assert [(computed in one.err, read in one.err) for one in said] == [(False, False), (True, False), (False, True)]


def test_a_small_budget_gives_the_same(chat: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    messages = ["word " * 300, "and then"]
    assert chat(*messages, options=("--no-store",)) == 0
    expected = capsys.readouterr().out
    for _ in range(2):
        assert chat(*messages, options=("--kv", KV)) == 0
        assert capsys.readouterr().out == expected


def test_an_interrupt_stops_a_reply_only(
    chat: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []

    class Interrupting(TextStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            tokens.extend(value.flatten().tolist())
            if len(tokens) == 2:
                signal.raise_signal(signal.SIGINT)
            super().put(value)

    monkeypatch.setattr("penstock.cli.conversation.writer_for", lambda tokenizer: Interrupting(tokenizer))
    before = signal.getsignal(signal.SIGINT)
    assert chat("one", "two") == 0
    assert len(tokens) in (7, 8)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_that_is_too_long_is_said(chat: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("word " * 50, options=("--context", "10")) == 2
    assert "--context is 10" in capsys.readouterr().err


def test_without_a_template_there_is_no_chat(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    assert main(["chat", str(folder)]) == 2
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("codec", [None, *CODECS])
@pytest.mark.parametrize("dim", [16, 64])
def test_a_chat_asks_for_as_much_as_its_context_takes(codec: str | None, dim: int) -> None:
    """No more than half of it again, less where it is coded; and a context of that length fits."""
    settings: dict[str, Any] = {"vocab_size": 50, "hidden_size": 4 * dim, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**settings, num_hidden_layers=2, num_attention_heads=4)).eval()
    tokens = 1000
    host = whole_context(model.config, torch.float32, tokens, codec)
    plain = 2 * 2 * 4 * dim * 4 * tokens
    assert host < plain * (1.5 if codec is None else 0.8 if codec == "int8" else 0.7)
    cache = TieredCache(model.config, max_memory={"host": host, "disk": 0}, codec=codec)
    with torch.no_grad():
        model(input_ids=torch.arange(tokens)[None] % 50, past_key_values=cache)
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == tokens + 1
    assert cache.statistics().host_budget_nbytes <= host
    cache.close()
