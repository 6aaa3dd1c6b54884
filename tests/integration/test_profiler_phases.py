"""What the calls of a generation are called: reading a prompt, one token, or the check of several guessed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from zoo import llama_config, token_ids

from penstock.runtime.profiler.profiler import Profiler
from penstock.runtime.profiler.schema import Step
from penstock.runtime.profiler.tokens import tokens_made

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.filterwarnings("ignore::UserWarning")]


def llama(layers: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(llama_config(num_hidden_layers=layers)).eval()


def phases(profiler: Profiler) -> list[str]:
    profile = profiler.profile()
    return [profile.string(number) for number in profile[Step].phase.tolist()]


def noted(model: Any, calls: list[tuple[str, int, int]], who: str) -> None:
    """Write down every call of a model: by whom, tokens in, tokens in its cache before."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        calls.append((who, kwargs["input_ids"].shape[1], 0 if cache is None else int(cache.get_seq_length())))

    model.register_forward_pre_hook(before, with_kwargs=True)


def test_verifying_is_told_from_reading_a_prompt(tmp_path: Path) -> None:
    target, draft = llama(3, seed=0), llama(1, seed=1)
    calls: list[tuple[str, int, int]] = []
    noted(target, calls, "target")
    noted(draft, calls, "draft")
    with Profiler(tmp_path / "run.prof") as profiler:
        target.generate(token_ids(batch=1), max_new_tokens=12, do_sample=False, assistant_model=draft)
    expected = []
    for who, tokens, cached in calls:
        # a draft that reads what the target accepted guesses nothing: it reads on
        several = "verify" if cached and who == "target" else "prefill"
        expected.append("decode" if tokens == 1 else several)
    assert phases(profiler) == expected
    assert sum(phase == "verify" for phase in expected) >= 2
    first = next(row for row, call in enumerate(calls) if call[0] == "target")
    assert expected[first] == "prefill", "the prompt goes in with the first guesses"


def test_tokens_are_those_of_the_model_that_checks(tmp_path: Path) -> None:
    target, draft = llama(3, seed=0), llama(1, seed=1)
    calls: list[tuple[str, int, int]] = []
    noted(target, calls, "target")
    noted(draft, calls, "draft")
    with Profiler(tmp_path / "run.prof") as profiler:
        target.generate(token_ids(batch=1), max_new_tokens=12, do_sample=False, assistant_model=draft)
    profile = profiler.profile()
    made = tokens_made(profile[Step], profile.string)
    checks, expected = [], []
    for row, (who, tokens, cached) in enumerate(calls):
        if who == "draft":
            expected.append(0)
            continue
        # from the first check on: what the call before it has added to the cache
        first = not checks and (tokens == 1 or not cached)
        expected.append(1 if first or not checks else cached - checks[-1])
        checks += [] if first else [cached]
        assert made[row] == expected[row]
    assert made.tolist() == expected
    assert 8 <= made.sum() <= 12, "all but what the first and the last call had right"


@pytest.mark.parametrize("kind", [None, "static"])
def test_a_second_prompt_on_a_filled_cache_is_no_verification(tmp_path: Path, kind: str | None) -> None:
    model, ids = llama(2, seed=0), token_ids(batch=1)
    options: dict[str, Any] = {"do_sample": False, "disable_compile": True, "return_dict_in_generate": True}
    with Profiler(tmp_path / "run.prof") as profiler:
        cache = (
            transformers.StaticCache(config=model.config, max_cache_len=64)
            if kind
            else transformers.DynamicCache(config=model.config)
        )
        first = model.generate(ids, max_new_tokens=3, past_key_values=cache, **options)
        longer = torch.cat((first.sequences, token_ids(batch=1, seed=2)), dim=1)
        model.generate(longer, max_new_tokens=3, past_key_values=cache, **options)
    assert phases(profiler) == ["prefill", "decode", "decode"] * 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_program_of_ones_own_may_verify_too(tmp_path: Path, kind: str) -> None:
    model, ids = llama(2, seed=0), token_ids(batch=1)
    cache: Any = (
        transformers.StaticCache(config=model.config, max_cache_len=64)
        if kind == "static"
        else transformers.DynamicCache(config=model.config)
    )
    with torch.no_grad(), Profiler(tmp_path / "run.prof") as profiler:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        model(input_ids=ids, use_cache=True)
    assert phases(profiler) == ["prefill", "decode", "verify", "prefill"]
