"""A run's adapters as PEFT's folder: its bits, and that PEFT loads it."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_cases import BFLOAT, GPT2, MIXTRAL, TIED, WORDY, LoraCase, llama, prepared, resumed
from safetensors.torch import load_file
from training_cases import language
from training_reference import Trace, run
from zoo import differences, load_resident

import penstock
from penstock.cli import main
from penstock.memory.store import BlockStore
from penstock.runtime.training import mergedexport
from penstock.runtime.training.export import plan_export

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' and peft's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks transformers for it
]


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG")
    monkeypatch.setenv("NO_COLOR", "1")


def trained(lora: LoraCase, folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Train a little; the adapters by name, and an answer. PEFT's own way of saving them is taken as well."""
    trainer = prepared(lora, folder, "smallest")
    model: Any = trainer.model
    try:
        run(lora.case, trainer, None, range(3), Trace())
        penstock.save(model, trainer.optimizer).wait()
        model.save_pretrained(folder / "by peft")
        values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model.eval()
        with torch.no_grad():
            return values, language(model, 3)
    finally:
        penstock.close(model)


@pytest.mark.parametrize("lora", [BFLOAT, TIED, WORDY], ids=["bfloat", "tied", "wordy"])
def test_adapters_are_loaded_by_peft_bit_for_bit(
    lora: LoraCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values, said = trained(lora, tmp_path)
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["names"], report["files"], report["steps"]) == ("adapter", ["adapter_model.safetensors"], 3)
    assert (report["tensors"], report["trained"]) == (len(values), len(values))
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]

    loaded: Any = peft.PeftModel.from_pretrained(load_resident(tmp_path / "checkpoint"), tmp_path / "out")
    found = {name: p.detach() for name, p in loaded.named_parameters() if "lora_" in name}
    assert differences(values, found) == []
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(language(loaded, 3), said)

    # AND it is what PEFT writes itself, which adds an embedding's own weights where that has an adapter
    own = tmp_path / "by peft"
    by_peft = {name: value for name, value in load_file(own / "adapter_model.safetensors").items() if "lora_" in name}
    assert differences(by_peft, load_file(tmp_path / "out" / report["files"][0])) == []
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (own, tmp_path / "out")]
    for config in configs:
        config["target_modules"] = set(config["target_modules"])
        config["rank_pattern"] = dict(config["rank_pattern"])
    assert configs[0] == configs[1]


def test_another_dtype_and_a_checkpoint_that_was_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, _ = trained(BFLOAT, tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    command = ["store", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(command) == 1
    assert "checkpoint" in capsys.readouterr().err
    assert main([*command, "--source", str(tmp_path / "moved")]) == 0
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rounded = {name.replace(".default", ""): value.bfloat16() for name, value in values.items()}
    assert differences(rounded, stored) == []
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "moved"
    )
    # AND what there is is not overwritten
    assert main([*command, "--source", str(tmp_path / "moved")]) == 2
    assert main([*command[:3], str(tmp_path / "moved"), "--source", str(tmp_path / "moved"), "--force"]) == 2


PATTERNS = replace(
    BFLOAT,
    config=lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "embed_tokens"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
    ),
    case=replace(BFLOAT.case, name="patterns", make=lambda: llama(tie_word_embeddings=True, attention_bias=True)),
)
"""An adapter on an embedding that is tied to the output layer, and ranks and scales that differ from layer to layer."""


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize(
    "lora",
    [BFLOAT, TIED, WORDY, GPT2, MIXTRAL, PATTERNS],
    ids=["bfloat", "tied", "wordy", "gpt2", "mixtral", "patterns"],
)
def test_merged_weights_have_the_bits_of_merge_and_unload(
    lora: LoraCase, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(lora, tmp_path)
    command = ["store", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--merged", "--dtype", dtype, "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["names"] == "checkpoint"
    assert report["merged"] > 0
    base = load_resident(tmp_path / "checkpoint", **({} if dtype == "auto" else {"dtype": torch.float16}))
    loaded: Any = peft.PeftModel.from_pretrained(base, tmp_path / "by peft")
    expected = loaded.merge_and_unload().state_dict()
    found = load_resident(tmp_path / "out").state_dict()
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in expected.items()}
    assert differences(expected, found) == []
    assert differences(load_resident(tmp_path / "checkpoint").state_dict(), found) != []


def test_merging_holds_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(BFLOAT, tmp_path)
    live: list[weakref.ref[torch.Tensor]] = []
    most = 0
    plain = mergedexport._value

    def value(*arguments: Any) -> torch.Tensor:
        nonlocal most
        made = plain(*arguments)
        live.append(weakref.ref(made))
        most = max(most, sum(each.nbytes for each in (ref() for ref in live) if each is not None))
        return made

    monkeypatch.setattr(mergedexport, "_value", value)
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--merged"]) == 0
    sizes = [p.nbytes for n, p in load_resident(tmp_path / "checkpoint").named_parameters() if "layers" in n]
    assert len(live) > 10
    assert most <= max(sizes)


def test_there_is_nothing_to_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = penstock.prepare(
        TIED.checkpoint(tmp_path / "checkpoint"),
        optimizer=penstock.AdamW(),
        disk=tmp_path / "run",
        device="cpu",
        max_memory={"host": 2**30},
    )
    penstock.save(model, optimizer).wait()
    penstock.close(model)
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--merged"]) == 2
    assert "nothing to merge" in capsys.readouterr().err


def test_adapters_of_a_module_that_did_not_lie_in_order(tmp_path: Path) -> None:
    """Training makes them contiguous; so the module that is given to export must not tell by its own strides."""

    def adapted() -> Any:
        made = TIED.adapted(TIED.case.build())
        for name, parameter in made.named_parameters():
            if "lora_A" in name:
                parameter.data = parameter.data.t().contiguous().t()
                assert not parameter.is_contiguous()
        return made

    model, optimizer = penstock.prepare(
        adapted(), optimizer=TIED.case.optimizer, disk=tmp_path / "run", device="cpu", max_memory={"host": 2**30}
    )
    try:
        language(model, 0).backward()
        optimizer.step()
        penstock.save(model, optimizer).wait()
        values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    finally:
        penstock.close(model)
    found = exported(tmp_path / "run", adapted())
    assert differences(values, {name: value.view(values[name].shape) for name, value in found.items()}) == []


def exported(run: Path, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What an export of a module's run writes, flat."""
    with BlockStore.open(run / "states", readonly=True) as store:
        planned = plan_export(store, module=module)
        written = {tensor.name: bytearray(tensor.nbytes) for tensor in planned.tensors}

        class Sink:
            def write(self, name: str, offset: int, data: memoryview) -> None:
                written[name][offset : offset + len(data)] = data

        planned.write_masters(store, Sink())
    return {name: torch.frombuffer(raw, dtype=torch.float32) for name, raw in written.items()}


def test_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(BFLOAT, tmp_path)
    other = TIED.checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--source", str(other)]) in (1, 2)
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err


def test_a_run_of_a_module_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = penstock.prepare(
        TIED.case.build(),
        lora=TIED.config(),
        optimizer=TIED.case.optimizer,
        disk=tmp_path / "run",
        device="cpu",
        max_memory={"host": 2**30},
    )
    try:
        language(model, 0).backward()
        optimizer.step()
        penstock.save(model, optimizer).wait()
        values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    finally:
        penstock.close(model)
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "model.save_pretrained" in capsys.readouterr().err
    # AND from Python, given the module, its parameters can be had by their names
    found = exported(tmp_path / "run", TIED.adapted(TIED.case.build()))
    assert differences(values, {name: value.view(values[name].shape) for name, value in found.items()}) == []


def test_an_exported_run_can_be_gone_on_with(tmp_path: Path) -> None:
    """Exporting changes nothing."""
    trained(TIED, tmp_path)
    assert main(["store", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    trainer = resumed(TIED, tmp_path, "resident")
    try:
        run(TIED.case, trainer, None, range(3, 4), Trace())
        assert trainer.optimizer.training.counts == [4] * len(trainer.optimizer.training.counts)
    finally:
        penstock.close(trainer.model)
