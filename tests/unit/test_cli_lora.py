"""`--lora`: what it says, and what is no such thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_cli_finetune import RECIPE

from penstock.cli.lora_option import LoraOption, parse_lora
from penstock.memory.errors import UsageError


def test_a_rank_is_enough() -> None:
    assert parse_lora("r=8") == LoraOption(r=8, alpha=16, dropout=0.0, targets=("all-linear",), rslora=False)
    assert parse_lora("alpha=8") == LoraOption(r=16, alpha=8)


def test_everything_that_can_be_said() -> None:
    given = parse_lora(" r = 4, alpha=32,dropout=0.05,targets=q_proj+v_proj , rslora=true")
    assert given == LoraOption(r=4, alpha=32, dropout=0.05, targets=("q_proj", "v_proj"), rslora=True)
    assert str(given) == "r=4,alpha=32,dropout=0.05,targets=q_proj+v_proj,rslora=true"
    assert parse_lora(str(given)) == given
    assert parse_lora(str(parse_lora("r=8"))) == parse_lora("r=8")
    assert given.settings() == {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "task_type": "CAUSAL_LM",
    }
    assert parse_lora("r=8").settings()["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank=16", r"no key 'rank': did you mean r\?|no key 'rank': it has r, alpha"),
        ("r=16,alhpa=3", "no key 'alhpa': did you mean alpha"),
        ("r=16,drop=0.1", "did you mean dropout"),
        ("r=16,target=q_proj", "did you mean targets"),
        ("r=16,zzz=1", "it has r, alpha, dropout, targets, rslora"),
        ("16", "'16' is no key=value; write for example r=16"),
        ("r=", "no key=value"),
        ("", "no key=value"),
        ("r=16,", "no key=value"),
        ("r=0", "r=0 is no whole number above 0"),
        ("r=1.5", "r=1.5 is no whole number"),
        ("alpha=x", "alpha=x is no whole number"),
        ("dropout=1", "dropout=1 is no share"),
        ("dropout=nan", "dropout=nan is no share"),
        ("targets=q_proj+", "names of modules"),
        ("targets=all-linear+q_proj", "names of modules"),
        ("rslora=yes", "true or false"),
        ("r=1,r=2", "gives r twice"),
    ],
)
def test_what_has_no_meaning(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_lora(text)


def test_adapters_learn_faster_by_default_and_belong_to_the_settings() -> None:
    adapted = replace(RECIPE, lora=parse_lora("r=8"))
    assert RECIPE.hyperparameters()["lr"] == 1e-5
    assert adapted.hyperparameters()["lr"] == pytest.approx(1e-4)
    assert replace(adapted, lr=3e-4).hyperparameters()["lr"] == 3e-4
    assert "lora" not in RECIPE.settings(checkpoint="here", seq=8, steps=50)
    settings = adapted.settings(checkpoint="here", seq=8, steps=50)
    assert settings["lora"] == "r=8,alpha=16,dropout=0,targets=all-linear"
