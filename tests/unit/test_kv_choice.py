"""What `--kv-policy` says, and attention to keys that were chosen."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.attention_chosen import attend_chosen, reference
from penstock.memory.errors import UsageError
from penstock.scheduler.kv.choice import BUDGET_TOKENS, PolicyChoice, choice_for, read_choice
from penstock.scheduler.kv.chosen import ChosenFigures


def test_choices_as_people_write_them() -> None:
    assert read_choice("exact") == PolicyChoice()
    assert not read_choice("exact").lossy
    assert read_choice("quest") == PolicyChoice(name="quest", budget_tokens=BUDGET_TOKENS)
    assert read_choice("quest", 512) == read_choice("quest:512") == PolicyChoice(name="quest", budget_tokens=512)
    assert read_choice("h2o:100,recent=8,sinks=0,dense=1,recall=3") == PolicyChoice(
        name="h2o", budget_tokens=100, recent=8, sinks=0, dense_layers=1, recall_every=3
    )
    assert read_choice("h2o:recent=8").recent == 8
    assert str(read_choice("quest:512,recent=8")) == "quest:512"


def test_what_changes_what_is_computed_has_a_name_of_its_own() -> None:
    base = "quest:512,recent=8,sinks=2,dense=1"
    others = ("landmark:512,recent=8,sinks=2,dense=1", "quest:513,recent=8,sinks=2,dense=1")
    others += ("quest:512,recent=9,sinks=2,dense=1", "quest:512,recent=8,sinks=3,dense=1")
    others += ("quest:512,recent=8,sinks=2,dense=0",)
    salts = {read_choice(text).salt for text in (base, *others)}
    assert len(salts) == 1 + len(others)
    assert read_choice(f"{base},recall=3").salt == read_choice(base).salt
    assert PolicyChoice().salt == ""


@pytest.mark.parametrize(
    ("text", "budget", "message"),
    [
        ("best", None, "use exact, window"),
        ("quest:many", None, "'many' is not a number"),
        ("quest:512,late=3", None, "'late=3' is not known"),
        ("quest:512", 512, "give one of them"),
        ("exact:512", None, "no budget and no options"),
        ("exact", 512, "no budget and no options"),
        ("quest:512,recall=0", None, "1 at least"),
        ("window:67", None, "less than the 4 first and 64 last"),
        ("quest:100", None, "of the blocks of 64 tokens"),
    ],
)
def test_what_is_refused(text: str, budget: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choice_for(text, budget)


def test_a_choice_has_its_budget() -> None:
    choice = PolicyChoice(name="window", budget_tokens=100)
    assert choice_for(choice, None) is choice
    with pytest.raises(UsageError, match="leave out budget=3"):
        choice_for(choice, 3)


def test_figures_add_up() -> None:
    figures = ChosenFigures("window:100")
    assert figures.statistics().recall is None
    figures.compared([0.5, 1.0], 10)
    figures.compared([0.75], 0)
    found = figures.statistics()
    assert (found.recall, found.least_recall, found.compared_steps, found.compared_nbytes) == (0.75, 0.5, 2, 10)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [False, True])
def test_attention_to_what_was_chosen(cap: float | None, dtype: torch.dtype, hidden: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 8, generator=draw).to(dtype)
    keys, values = torch.randn(2, 11, 8, generator=draw).to(dtype), torch.randn(2, 11, 5, generator=draw).to(dtype)
    bias = None
    if hidden:
        bias = torch.zeros(2, 3, 11)
        bias[0, :, 7:] = float("-inf")
        bias[1, 1] = float("-inf")  # sees nothing
    found = attend_chosen(query, keys, values, scale=0.3, bias=bias, cap=cap)
    expected = reference(query, keys, values, scale=0.3, bias=bias, cap=cap)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=1e-5)
