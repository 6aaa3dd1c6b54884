"""Streamed training leaves the bits of the resident one: losses, norms, rates, weights, masters, states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import CASES, look
from training_reference import PLACEMENTS, Case, Reference, Streamed, Trace, prepared, resident, run, train
from zoo import Outputs, differences, load_resident

import penstock

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # transformers' own
]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", CASES)
def test_streamed_training_has_the_bits_of_the_resident_one(name: str, placement: str, tmp_path: Path) -> None:
    expected, left = resident(CASES[name])
    actual, state = train(CASES[name], tmp_path / "run", placement)
    assert differences(expected.outputs(), actual.outputs()) == []
    assert differences(dict(left), state) == []


def test_several_threads_have_the_bits_of_as_many(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    case = replace(CASES["gpt2"], name="gpt2 on two threads", steps=3)
    expected, left = resident(case)
    actual, state = train(case, tmp_path / "run", "smallest")
    assert differences(expected.outputs(), actual.outputs()) == []
    assert differences(dict(left), state) == []


@pytest.mark.parametrize("placement", ["smallest", "emulated"])
def test_the_small_budgets_do_stream(placement: str, tmp_path: Path) -> None:
    trainer = prepared(CASES["llama"], tmp_path / "run", placement)
    try:
        layout = trainer.model.penstock.machinery.layout
        assert layout.streamed()
        assert layout.on_disk()
    finally:
        penstock.close(trainer.model)


def test_the_cases_do_what_they_are_for() -> None:
    """Some expert and some layer go without a gradient, clipping clips, and a loss is lower at the end."""
    _, left = resident(CASES["perceptron"])
    assert "momentum_buffer spare.weight" not in left
    assert torch.equal(left["master spare.weight"], CASES["perceptron"].build().spare.weight.flatten().float())
    assert "master layers.1.weight" not in left
    mixtral, _ = resident(CASES["mixtral"])
    assert min(mixtral.norms) > 0.3
    llama, _ = resident(CASES["tied"])
    assert llama.losses[-1] < llama.losses[0]


def test_an_expert_without_tokens_is_there_and_its_gradient_is_zero() -> None:
    model = CASES["mixtral"].build()
    CASES["mixtral"].losses[0](model, 0).backward()
    experts = [p for name, p in model.named_parameters() if "experts" in name and p.dim() == 3]
    assert experts
    idle = 0
    for parameter in experts:
        assert parameter.grad is not None
        idle += int((parameter.grad.flatten(1).abs().amax(1) == 0).sum())
    assert idle


def test_gradients_of_one_forward_may_come_from_two_backward_passes(tmp_path: Path) -> None:
    """Losses of one forward, each with a backward of its own: the weights that it saved are fetched again for each."""
    case = Case(
        name="two backward passes",
        make=CASES["perceptron"].make,
        losses=CASES["perceptron"].losses,
        optimizer=penstock.AdamW(lr=1e-2),
        dtype=torch.bfloat16,
    )

    def steps(trainer: Reference | Streamed) -> Outputs:
        found = []
        for step in range(4):
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step)).bfloat16()
            out = trainer.model(x, also=True)
            for loss, again in ((out.square().mean(), True), (out.abs().sum(), False)):
                trainer.backward(loss, retain_graph=again)
                found.append(loss.detach())
            trainer.step()
        return {"losses": torch.stack(found), **trainer.state()}

    trainer = prepared(case, tmp_path / "run", "smallest")
    try:
        assert differences(steps(Reference(case)), steps(trainer)) == []
    finally:
        penstock.close(trainer.model)


def test_evaluation_while_the_step_is_still_carried_out(tmp_path: Path) -> None:
    """Right after `step()`: an evaluation, `state_dict` of a part, real weights lent, in this order and in another."""
    case = CASES["gpt2"]
    reference = Reference(case)
    trainer = prepared(case, tmp_path / "run", "smallest")
    try:
        for step in range(3):
            for each in (reference, trainer):
                torch.manual_seed(step)
                each.backward(case.losses[0](each.model, step))
                each.step()
            part = "transformer.h.2"
            if step % 2:
                assert differences(_weights(reference.model, part), _weights(trainer.model, part)) == []
            with torch.no_grad():
                assert torch.equal(look(reference.model)["loss"], look(trainer.model)["loss"])
            with trainer.model.penstock.gathered(trainer.model):
                lent = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            assert differences({n: p.detach() for n, p in reference.model.named_parameters()}, lent) == []
    finally:
        penstock.close(trainer.model)


def _weights(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.get_submodule(part).state_dict().items()}


def test_a_state_dict_that_is_kept_does_not_hide_later_steps(tmp_path: Path) -> None:
    case = CASES["tied"]
    reference = Reference(case)
    trainer = prepared(case, tmp_path / "run", "smallest")
    kept = []
    try:
        for step in range(3):
            for each in (reference, trainer):
                each.backward(case.losses[0](each.model, step))
                each.step()
            kept.append(trainer.model.state_dict())
            assert differences(dict(reference.model.state_dict()), dict(kept[-1])) == []
        assert kept[-1]["lm_head.weight"].data_ptr() == kept[-1]["model.embed_tokens.weight"].data_ptr()
    finally:
        kept.clear()
        penstock.close(trainer.model)


@pytest.mark.parametrize("memory", [{"host": 2**30}, None])
def test_a_checkpoint_is_trained_as_its_model_is(memory: dict[str, int] | None, tmp_path: Path) -> None:
    case = CASES["llama"]
    case.build().save_pretrained(tmp_path / "checkpoint", max_shard_size="100KB")
    reference = Reference(case, load_resident(tmp_path / "checkpoint"))

    def prepare(memory: dict[str, int]) -> Any:
        return penstock.prepare(
            tmp_path / "checkpoint",
            optimizer=case.optimizer,
            disk=tmp_path / "run",
            max_memory=memory,
            device="cpu",
            accumulate=3,
        )

    if memory is None:
        with pytest.raises(penstock.DoesNotFitError) as caught:
            prepare({"host": 1})
        memory = {"host": caught.value.needed_nbytes}
    trainer = Streamed(*prepare(memory))
    try:
        for step in range(3):
            for each in (reference, trainer):
                each.backward(case.losses[0](each.model, step))
                each.step()
        assert differences(reference.state(), trainer.state()) == []
        trainer.model.save_pretrained(tmp_path / "trained")
    finally:
        penstock.close(trainer.model)
    again = type(reference.model).from_pretrained(tmp_path / "trained")
    assert differences(dict(reference.model.state_dict()), dict(again.state_dict())) == []


def test_no_grad_forwards_before_the_first_step_change_nothing(tmp_path: Path) -> None:
    case = CASES["u-net"]
    expected, left = resident(case)
    trainer = prepared(case, tmp_path / "run", "smallest")
    try:
        trainer.model.eval()
        with torch.no_grad():
            for batch in range(3):
                case.losses[0](trainer.model, batch)
        trainer.model.train()
        trace = Trace()
        run(case, trainer, None, range(case.steps), trace)
        assert differences(expected.outputs(), trace.outputs()) == []
        assert differences(dict(left), trainer.state()) == []
    finally:
        penstock.close(trainer.model)
