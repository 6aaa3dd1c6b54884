"""Adapters on a base that streams have the bits of PEFT's in memory, and the base is only read."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from activation_rooms import set_room, slow_processor
from lora_cases import BFLOAT, GPT2, MIXTRAL, SEED, TIED, WORDY, Saved, llama, prepared, resumed, train
from torch import nn
from training_cases import UNet, language, restore
from training_reference import PLACEMENTS, Case, Reference, Trace, run, scheduled, smallest
from zoo import Outputs, differences

import penstock
from penstock.memory.disk import DiskEngine
from penstock.memory.store import BlockStore

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' and peft's own
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks transformers for it
]
CASES = {
    "bfloat": BFLOAT,
    "wordy": WORDY,
    "tied": TIED,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "short": replace(BFLOAT, case=replace(BFLOAT.case, steps=3)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def in_memory(name: str, folder: Path) -> tuple[Trace, Outputs]:
    """The reference from beginning to end."""
    return train(CASES[name], CASES[name].reference(CASES[name].checkpoint(folder / name)))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["bfloat", "tied", "wordy", "gpt2", "mixtral"])
def test_adapters_have_the_bits_of_those_in_memory(
    name: str, placement: str, checkpoints: Path, tmp_path: Path
) -> None:
    expected, left = in_memory(name, checkpoints)
    trainer = prepared(CASES[name], tmp_path, placement)
    try:
        layout = trainer.model.penstock.machinery.layout
        assert bool(layout.on_disk()) == (placement != "resident")
        if name == "wordy" and placement != "resident":
            assert list(layout.tables) == ["base_model.model.model.embed_tokens.base_layer.weight"]
        actual, state = train(CASES[name], trainer)
    finally:
        penstock.close(trainer.model)
    assert differences(expected.outputs(), actual.outputs()) == []
    assert differences(left, state) == []
    assert all(value.any() for name, value in left.items() if name.startswith("weight") and "lora_B" in name)


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload", "auto"])
def test_activations_wherever_they_are(
    activations: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if activations in ("offload", "auto"):
        set_room(monkeypatch, "mixed")
        slow_processor(monkeypatch)
    expected, left = in_memory("short", checkpoints)
    trainer = prepared(CASES["short"], tmp_path, "smallest", activations=activations)
    try:
        actual, state = train(CASES["short"], trainer)
        keeper = trainer.model.penstock.machinery.session.saved.keeper
        assert (keeper is None) == (activations in ("keep", "recompute"))
    finally:
        penstock.close(trainer.model)
    assert differences(expected.outputs(), actual.outputs()) == []
    assert differences(left, state) == []


@pytest.mark.parametrize(("before", "after"), [("resident", "smallest"), ("smallest", "emulated")])
def test_a_run_goes_on_with_the_same_bits(before: str, after: str, checkpoints: Path, tmp_path: Path) -> None:
    expected, left = in_memory("bfloat", checkpoints)
    case = BFLOAT.case
    trainer = prepared(BFLOAT, tmp_path, before)
    try:
        torch.manual_seed(7)
        schedule = scheduled(case, trainer.optimizer)
        run(case, trainer, schedule, range(9), Trace())
        penstock.save(trainer.model, trainer.optimizer, scheduler=schedule, extra={"next": 9})
        run(case, trainer, schedule, range(9, 11), Trace())  # what no commit has is forgotten
    finally:
        penstock.close(trainer.model)
    trainer, trace = resumed(BFLOAT, tmp_path, after), Trace()
    try:
        assert trainer.optimizer.extra == {"next": 9}
        run(case, trainer, trainer.optimizer.scheduler, range(9, case.steps), trace)
        assert differences(expected.since(9, case).outputs(), trace.outputs()) == []
        assert differences(left, trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_base_is_only_read_and_states_are_those_of_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = DiskEngine.write

    def noted(engine: DiskEngine, path: str, offset: int, data: memoryview) -> Any:
        written.append(path)
        return write(engine, path, offset, data)

    monkeypatch.setattr(DiskEngine, "write", noted)
    checkpoint = BFLOAT.checkpoint(tmp_path / "checkpoint")
    before = digests(checkpoint)
    trainer = prepared(BFLOAT, tmp_path, "smallest")
    model = trainer.model
    try:
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        run(BFLOAT.case, trainer, None, range(3), Trace())
        read = model.penstock.statistics().disk_read_nbytes
        assert read > 3 * 2 * base  # bytes of bf16: it did stream
        assert written == []
        assert model.penstock.statistics().disk_written_nbytes == 0
        penstock.save(model, trainer.optimizer).wait()
        committed = model.penstock.statistics().disk_written_nbytes
        assert committed == 12 * sum(-(-count // 1024) * 1024 for count in trained)  # each begins on a page
        penstock.save(model, trainer.optimizer).wait()
        assert model.penstock.statistics().disk_written_nbytes == committed  # nothing has changed since
    finally:
        penstock.close(model)
    assert {Path(path).parent.name for path in written} == {"states"}
    assert digests(checkpoint) == before
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["states"]
    with BlockStore.open(tmp_path / "run" / "states", readonly=True) as store:
        assert sum(block.nbytes for block in store.blocks) == committed
    assert (tmp_path / "run" / "states" / "blocks.data").stat().st_size == 2 * committed  # two slots each


def test_the_budget_counts_what_adapters_take(tmp_path: Path) -> None:
    trainer = prepared(BFLOAT, tmp_path, "smallest")
    try:
        machinery, training = trainer.model.penstock.machinery, trainer.optimizer.training
        weights = sum(each.parameter.nbytes for each in training.trained)
        arenas = sum(a.nbytes for a in training._pipeline.arenas) + training.gradients.intake.room.arena.nbytes
        assert machinery.changing.own_nbytes >= weights + arenas
        assert machinery.changing.own_nbytes <= weights + arenas + 24 * 256 * 1024 + 2**16
    finally:
        penstock.close(trainer.model)


# --- modules that are built -------------------------------------------------------------------------------------------


def by_hand(config: Callable[[], Any], make: Callable[[], nn.Module] = llama) -> Any:
    """A module that a user has put adapters into."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make().to(torch.bfloat16)
        torch.manual_seed(SEED)
        return peft.get_peft_model(model, config()).train()


DORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, lora_dropout=0.1)
PISSA = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa")
BIASED = peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all", modules_to_save=["lm_head"])
EMBEDDED = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
MANUAL = {"plain": BFLOAT.config(), "dora": DORA, "pissa": PISSA, "biased": BIASED, "embedded": EMBEDDED}


@pytest.mark.parametrize(("name", "placement"), [*((name, "smallest") for name in MANUAL), ("dora", "emulated")])
def test_adapters_of_ones_own_making(name: str, placement: str, tmp_path: Path) -> None:
    """Settings that need the weights in memory work where the module has been built there."""

    def make() -> nn.Module:
        return llama(attention_bias=name == "biased")

    case = Case(
        name=name,
        make=lambda: by_hand(lambda: MANUAL[name], make),
        losses=(language,),
        optimizer=penstock.AdamW(lr=1e-2, max_grad_norm=0.5),
        dtype=torch.bfloat16,
        steps=4,
    )
    reference = Reference(case, case.make())
    expected, trace = Trace(), Trace()
    torch.manual_seed(7)
    run(case, reference, None, range(4), expected)

    def place(memory: dict[str, int], device: str) -> Any:
        return penstock.prepare(
            case.make(), optimizer=case.optimizer, disk=tmp_path / "run", max_memory=memory, device=device
        )

    device, memory = smallest(place, placement)
    trainer = Saved(*place(memory, device))
    try:
        torch.manual_seed(7)
        run(case, trainer, None, range(3), trace)
        penstock.save(trainer.model, trainer.optimizer).wait()
    finally:
        penstock.close(trainer.model)
    trainer = Saved(*penstock.resume(tmp_path / "run", model=case.make(), device="cpu", max_memory={"host": 2**30}))
    try:
        run(case, trainer, None, range(3, 4), trace)
        assert differences(expected.outputs(), trace.outputs()) == []
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)


def test_adapters_are_put_into_a_module_that_is_no_language_model(tmp_path: Path) -> None:
    """`lora=` of a built module, with buffers that change, and its end: the module is built anew to go on."""
    case = Case(
        name="u-net",
        make=UNet,
        losses=(restore,),
        optimizer=penstock.Lion(lr=1e-3, max_grad_norm=0.2),
        steps=6,
    )
    config = peft.LoraConfig(r=2, target_modules=["0", "stem", "head"])
    torch.manual_seed(SEED)
    reference = Reference(
        case, peft.get_peft_model(case.build(), peft.LoraConfig(r=2, target_modules=["0", "stem", "head"])).train()
    )
    expected, trace = Trace(), Trace()
    run(case, reference, None, range(6), expected)

    def place(memory: dict[str, int], device: str) -> Any:
        torch.manual_seed(SEED)
        return penstock.prepare(
            case.build(), lora=config, optimizer=case.optimizer, disk=tmp_path / "run", max_memory=memory, device=device
        )

    device, memory = smallest(place, "smallest")
    trainer = Saved(*place(memory, device))
    try:
        trainer.model.train()
        run(case, trainer, None, range(4), trace)
        penstock.save(trainer.model, trainer.optimizer).wait()
    finally:
        penstock.close(trainer.model)
    trainer = Saved(*penstock.resume(tmp_path / "run", model=case.build(), device="cpu", max_memory=memory))
    try:
        trainer.model.train()
        run(case, trainer, None, range(4, 6), trace)
        assert differences(expected.outputs(), trace.outputs()) == []
        assert differences(reference.state(), trainer.state()) == []
    finally:
        penstock.close(trainer.model)
    assert config.target_modules == {"0", "stem", "head"}


def test_a_module_that_does_not_fit_is_as_it_was(tmp_path: Path) -> None:
    model = llama()
    names = [name for name, _ in model.named_modules()]
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(penstock.DoesNotFitError):
        penstock.prepare(
            model,
            lora=TIED.config(),
            optimizer=TIED.case.optimizer,
            disk=tmp_path / "run",
            device="cpu",
            max_memory={"host": 1},
        )
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert differences(values, {name: p.detach() for name, p in model.named_parameters()}) == []


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: peft.LoraConfig(init_lora_weights="pissa"), r"'pissa'.*not in memory.*get_peft_model"),
        (lambda: peft.LoraConfig(init_lora_weights="pissa_niter_4"), r"pass over the model's weights"),
        (lambda: peft.LoraConfig(init_lora_weights="olora"), r"pass over the model's weights"),
        (lambda: peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig()), r"pass over"),
        (lambda: peft.LoraConfig(use_dora=True), r"use_dora=True.*norms of the weights"),
        (lambda: peft.LoraConfig(bias="all"), r"bias='all'.*leave \"none\""),
        (lambda: peft.LoraConfig(modules_to_save=["lm_head"]), r"modules_to_save.*whole modules"),
        (lambda: peft.LoraConfig(target_parameters=["mlp.experts.down_proj"]), r"target_parameters.*get_peft_model"),
        (lambda: peft.LoraConfig(trainable_token_indices=[1]), r"trainable_token_indices.*rows of the embedding"),
        (lambda: peft.LoraConfig(layer_replication=[(0, 2)]), r"layer_replication.*another model"),
        (lambda: peft.LoraConfig(task_type="SEQ_CLS"), r"task_type.*leave task_type out"),
        (lambda: peft.LoraConfig(alora_invocation_tokens=[1]), r"not known to work"),
        (lambda: peft.LoraConfig(target_modules=["nothing"]), r"PEFT cannot put these adapters into a Llama.*nothing"),
        (lambda: peft.IA3Config(), r"lora is a IA3Config: give a peft.LoraConfig"),
        (lambda: "r=16", r"lora is a str"),
    ],
)
def test_settings_that_cannot_be_had(config: Callable[[], Any], words: str, tmp_path: Path) -> None:
    checkpoint = TIED.checkpoint(tmp_path / "checkpoint")
    with pytest.raises(penstock.UsageError, match=words):
        penstock.prepare(checkpoint, optimizer=TIED.case.optimizer, disk=tmp_path / "run", lora=config(), device="cpu")


def test_updates_in_backward_are_refused(tmp_path: Path) -> None:
    with pytest.raises(penstock.UsageError, match=r'say "step"'):
        prepared(TIED, tmp_path, "resident", updates="backward")


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = TIED.checkpoint(tmp_path / "checkpoint")
    config = TIED.config()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(penstock.UsageError, match=r"pip install peft"):
        penstock.prepare(checkpoint, optimizer=TIED.case.optimizer, disk=tmp_path / "run", lora=config, device="cpu")
    model, _optimizer = penstock.prepare(
        checkpoint, optimizer=TIED.case.optimizer, disk=tmp_path / "run", device="cpu", max_memory={"host": 2**30}
    )
    penstock.close(model)


def test_a_graph_from_before_a_step_is_refused(tmp_path: Path) -> None:
    trainer = prepared(TIED, tmp_path, "smallest")
    try:
        loss = language(trainer.model, 0)
        loss.backward(retain_graph=True)
        trainer.step()
        with pytest.raises(RuntimeError, match=r"made before optimizer\.step"):
            loss.backward()
    finally:
        penstock.close(trainer.model)


def test_words_are_those_of_the_model_in_memory(tmp_path: Path) -> None:
    """transformers' own `generate`, with adapters and, in PEFT's context, without them."""
    reference = TIED.reference(TIED.checkpoint(tmp_path / "checkpoint"))
    trainer = prepared(TIED, tmp_path, "smallest")
    try:
        for each in (reference, trainer):
            torch.manual_seed(7)
            run(TIED.case, each, None, range(3), Trace())
            each.model.eval()
        ids = torch.tensor([[5, 6, 7]])
        for model in (reference.model, trainer.model):
            model.generation_config.pad_token_id = 0
        said = [m.generate(input_ids=ids, max_new_tokens=8, do_sample=False) for m in (reference.model, trainer.model)]
        assert torch.equal(*said)
        with torch.no_grad(), reference.model.disable_adapter(), trainer.model.disable_adapter():
            assert torch.equal(reference.model(ids).logits, trainer.model(ids).logits)
    finally:
        penstock.close(trainer.model)
