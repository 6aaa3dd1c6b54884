"""Train a vision model that was built in memory and gives its weights up: any `nn.Module` can be prepared.

python examples/finetune_vision.py

A small ViT learns on which side noise is brighter. To go on with such a run, build the module again and give it to
`penstock.resume(folder, model=module)`.
"""

import tempfile
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import penstock

STEPS = 20


def pictures(seed: int, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise that is brighter on the left (0) or on the right (1): [count, 3, 32, 32], and what each is, [count]."""
    drawn = torch.Generator().manual_seed(seed)
    kinds = torch.randint(2, (count,), generator=drawn)
    found = torch.randn(count, 3, 32, 32, generator=drawn)
    slope = torch.linspace(-0.5, 0.5, 32)
    return found + slope * (2 * kinds - 1).view(-1, 1, 1, 1), kinds


def main() -> None:
    """Train from nothing, and look at pictures that were not trained on."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_labels=2,
    )
    module = ViTForImageClassification(config)
    with tempfile.TemporaryDirectory(dir=".") as here:
        model, optimizer = penstock.prepare(
            module,
            optimizer=penstock.AdamW(lr=1e-3, max_grad_norm=1.0),
            disk=Path(here) / "run",
            max_memory={"host": "38MiB"},
            device="cpu",
        )
        model.train()
        losses = []
        for step in range(STEPS):
            seen, kinds = pictures(step)
            loss = model(pixel_values=seen, labels=kinds).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        penstock.save(model, optimizer).wait()
        model.eval()
        unseen, kinds = pictures(1000, 64)
        with torch.no_grad():
            right = (model(pixel_values=unseen).logits.argmax(-1) == kinds).float().mean().item()
        first, last = (sum(some) / 5 for some in (losses[:5], losses[-5:]))
        print(f"loss {first:.3f} -> {last:.3f}; {right:.0%} of 64 other pictures are told right")
        penstock.close(model)


if __name__ == "__main__":
    main()
