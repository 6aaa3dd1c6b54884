"""Several models in one process, several drives for one model, and blocks that change places."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from zoo import ZOO, differences, load_resident
from zoo.budgets import DEVICES, find_limits

import penstock
from penstock.memory.capacity import host_capacity
from penstock.memory.ledger import process_ledger

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    ZOO[name].make().save_pretrained(folder)
    return folder


def test_a_second_auto_budget_leaves_what_the_first_has_reserved(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "checkpoint")
    other = process_ledger().reserve("the other model", "host", 2 * host_capacity().total_nbytes)
    other.touched = lambda: 0
    try:
        with pytest.raises(penstock.DoesNotFitError) as caught:
            penstock.load(folder, device="cpu")
        assert caught.value.exit_code == 3
        with pytest.raises(penstock.DoesNotFitError, match=r"the other model holds .* GiB. Close one"):
            penstock.load(folder, device="cpu", max_memory={"host": "1GiB"})
        other.touched = lambda: other.nbytes  # it has taken its memory: what is available is available
        penstock.close(penstock.load(folder, device="cpu", max_memory={"host": "1GiB"}))
    finally:
        other.release()
    assert process_ledger().reserved("host") == 0


def test_what_weights_only_passed_through_is_not_kept_from_others(tmp_path: Path) -> None:
    """Everything fits the emulated device, whose memory is the host's: the arena on the way there is gone."""
    folder = saved("llama", tmp_path / "checkpoint")
    model = penstock.load(folder, device="emulated", max_memory={"device": "64MiB", "host": "64MiB"})
    try:
        plan = model.penstock.plan
        assert plan.resident
        reserved = process_ledger().reserved("host")
        assert plan.device_nbytes <= reserved < plan.device_nbytes + plan.host_nbytes
        assert process_ledger().untouched("host") < plan.device_nbytes // 4
    finally:
        penstock.close(model)
    assert process_ledger().reserved("host") == process_ledger().reserved("device") == 0


def moe_checkpoint(folder: Path) -> None:
    """Experts stored as the published checkpoints store them: transposed against what the model computes with."""
    decoder = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    config = tf.Qwen3VLMoeConfig(
        text_config=decoder,
        vision_config={**vision, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )
    torch.manual_seed(0)
    tf.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    stored = {name: t.mT.contiguous() if ".mlp.experts." in name else t for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def test_what_must_be_repacked_is_spread_over_the_drives_that_are_named(tmp_path: Path) -> None:
    moe_checkpoint(tmp_path / "checkpoint")
    drives = [tmp_path / "one", tmp_path / "two"]
    ids = torch.randint(0, 100, (1, 8), generator=torch.Generator().manual_seed(1))
    resident = tf.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "checkpoint").eval()
    model = penstock.load(tmp_path / "checkpoint", device="cpu", max_memory={"host": "1GiB"}, disk=drives)
    sizes = [sum(f.stat().st_size for f in drive.rglob("repacked.bin")) for drive in drives]
    assert all(sizes)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, resident(input_ids=ids).logits)
    penstock.close(model)
    assert not any(f for drive in drives for f in drive.rglob("repacked.bin"))
    needed = sum(sizes)
    with pytest.raises(penstock.DiskError, match=rf"{needed} bytes of weights go to disk; the disk budget is 4096"):
        penstock.load(tmp_path / "checkpoint", device="cpu", max_memory={"host": "1GiB", "disk": 4096}, disk=drives)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_part_that_runs_again_and_again_takes_the_places_of_the_others(tmp_path: Path, device: str) -> None:
    """CLIP, used for texts only for a while, then for both, then for images only."""
    folder = saved("clip", tmp_path / "checkpoint")
    resident = load_resident(folder)
    inputs = ZOO["clip"].inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    image = {"pixel_values": inputs["pixel_values"]}
    with torch.no_grad():
        both, texts = resident(**inputs), resident.get_text_features(**text)
        images = resident.get_image_features(**image)
    limits = find_limits(partial(place, folder), "cpu", "host", {})
    exchanged = 0
    for share in (0.3, 0.5, 0.7):
        budget = {"host": limits.needed + int((limits.resident - limits.needed) * share)}
        if device == "emulated":
            budget = {"device": budget["host"], "host": 2**30}
        model = place(folder, budget, DEVICES[device])
        try:
            with torch.no_grad():
                for _ in range(6):
                    assert differences(_plain(texts), _plain(model.get_text_features(**text))) == []
                assert differences(_plain(both), _plain(model(**inputs))) == []
                for _ in range(6):
                    assert differences(_plain(images), _plain(model.get_image_features(**image))) == []
            kinds = [record.kind for record in model.penstock.timeline.records()]
            assert kinds.count("exchange") == model.penstock.statistics().executor.exchanged
            exchanged += kinds.count("exchange")
        finally:
            penstock.close(model)
    assert exchanged > 0


def _plain(result: Any) -> dict[str, torch.Tensor]:
    """The tensors of a result, by name."""
    if isinstance(result, torch.Tensor):
        return {"features": result}
    return {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}


def place(folder: Path, budget: dict[str, int], device: str) -> Any:
    return penstock.load(folder, max_memory=budget, device=device)
