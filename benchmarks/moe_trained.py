"""Train a small mixture of experts on text that ships with Python, record its routing, and hold policies against it.

    python -m benchmarks.moe_trained --minutes 10 --trace trained.moe       # then: penstock moe report trained.moe
    python -m benchmarks.moe_trained --minutes 0.2 --sequences 2            # tries it out

The standard library is cut into pieces of text (names, runs of spaces, single signs); the commonest are the vocabulary.
One file in ten is kept from training: of those come the prompts that are recorded, which the model continues with
tokens that it draws itself.
"""

import argparse
import math
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from penstock.runtime.experts.recording import RoutingRecorder
from penstock.scheduler.experts.belady import most_hits
from penstock.scheduler.experts.cache import CacheSetting
from penstock.scheduler.experts.events import events_of
from penstock.scheduler.experts.policies import DEFAULT, POLICIES, policy
from penstock.scheduler.experts.replay import ReplaySetting, replay
from penstock.scheduler.experts.trace import Trace
from penstock.scheduler.experts.tracefile import read_trace

PIECE = re.compile(r"[A-Za-z_]+|[0-9]+|[ ]+|.", re.DOTALL)
VOCABULARY = 4096
LENGTH, BATCH = 128, 16
"""Tokens of a sequence of training, and sequences of a step."""
PROMPT, CONTINUED = 64, 128
CAPACITIES = (0.25, 0.5)
GOAL_OVER_LRU, GOAL_BELOW_MIN = 3.0, 15.0
"""Points of hits."""


def corpus(most_nbytes: int) -> tuple[list[str], list[str]]:
    """Files of the standard library, for training and for prompts, as text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if "site-packages" not in path.parts and "test" not in path.parts
    )
    random.Random(0).shuffle(files)
    texts, kept, taken = [], [], 0
    for number, path in enumerate(files):
        text = path.read_text(encoding="utf-8", errors="replace")
        (kept if number % 10 == 0 else texts).append(text)
        taken += len(text)
        if taken > most_nbytes:
            break
    return texts, [text for text in kept if len(text) > 4000]


class Pieces:
    """The vocabulary."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(piece for text in texts for piece in PIECE.findall(text))
        self._ids = {piece: number + 1 for number, (piece, _) in enumerate(counts.most_common(VOCABULARY - 1))}

    def encode(self, text: str) -> list[int]:
        """Ids; 0 for what is not known."""
        return [self._ids.get(piece, 0) for piece in PIECE.findall(text)]


def make_model(layers: int, experts: int, top_k: int) -> transformers.PreTrainedModel:
    """A small Qwen3-MoE, whose routers are trained to share out the tokens as such models are."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=0.001,
        output_router_logits=True,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def train(
    model: transformers.PreTrainedModel, ids: torch.Tensor, *, minutes: float, console: Console
) -> tuple[float, int]:
    """Train for so long on [N] tokens; the last loss, and the steps made: how many that are is the machine's."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    draw = torch.Generator().manual_seed(1)
    began, step, mean = time.perf_counter(), 0, math.nan
    model.train()
    while (passed := time.perf_counter() - began) < 60 * minutes:
        part = passed / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * part)
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=draw).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            console.print(f"step {step}: loss {mean:.3f}", highlight=False)
    model.eval()
    return mean, step


def record(model: transformers.PreTrainedModel, prompts: Sequence[list[int]], path: Path, *, source: str) -> None:
    """Write the routing of prompts and of what the model draws behind them."""
    torch.manual_seed(2)
    with RoutingRecorder(model, path, source=source) as recorder:
        for ids in prompts:
            recorder.sequences(1)
            prompt = torch.tensor([ids])
            model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=CONTINUED,
                do_sample=True,
                temperature=0.8,
                pad_token_id=0,
            )


def hit_rates(trace: Trace, capacity: int) -> dict[str, float]:
    """Percent of the uses of decoding that each policy hits, and Belady's MIN with bypass."""
    routing, events = trace.header.routing, events_of(trace)
    uses = sum(len(event.experts) for event in events if event.phase == "decode")
    setting = ReplaySetting(cache=CacheSetting(capacity=capacity))
    found = {name: 100 * replay(routing, events, policy(name, routing), setting).decode.hit_rate for name in POLICIES}
    found["MIN"] = 100 * most_hits(routing, events, capacity, bypass=True, phase="decode") / uses
    return found


def report(trace: Trace, console: Console) -> None:
    """The table of policies, and what it comes to."""
    table = Table("cache", *POLICIES, "MIN", title=trace.header.source, title_justify="left")
    lines = []
    for part in CAPACITIES:
        rates = hit_rates(trace, round(part * trace.header.routing.total))
        table.add_row(f"{part:.0%}", *(f"{rate:.1f}" for rate in rates.values()))
        best = max(POLICIES, key=lambda name: rates[name])
        lines.append(
            f"{part:.0%}: {best} has {rates[best] - rates['lru']:.1f} points over lru (goal {GOAL_OVER_LRU:.0f}), and "
            f"is {rates['MIN'] - rates[best]:.1f} below MIN (goal {GOAL_BELOW_MIN:.0f} at most); {DEFAULT}: "
            f"{rates[DEFAULT] - rates['lru']:.1f} over lru, {rates['MIN'] - rates[DEFAULT]:.1f} below MIN"
        )
    console.print(table)
    for line in lines:
        console.print(line, highlight=False)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_trained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--experts", type=int, default=32, help="of a layer (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts of a token (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="that are recorded (default: %(default)s)")
    parser.add_argument("--text", type=int, default=8, help="MB of text, at most (default: %(default)s)")
    parser.add_argument("--trace", type=Path, default=Path("trained.moe"), help="the file to write")
    parser.add_argument("--force", action="store_true", help="overwrite it")
    arguments = parser.parse_args()
    if arguments.trace.exists() and not arguments.force:
        parser.error(f"{arguments.trace} exists; add --force to overwrite it")
    return arguments


def main() -> None:
    """Command line."""
    arguments = parse_arguments()
    console = Console(stderr=True)
    transformers.logging.set_verbosity_error()
    texts, kept = corpus(arguments.text * 10**6)
    pieces = Pieces(texts)
    prompts = [ids[:PROMPT] for text in kept if len(ids := pieces.encode(text[2000:])) > PROMPT][: arguments.sequences]
    if len(prompts) < arguments.sequences:
        sys.exit(f"error: the text has {len(prompts)} prompts: raise --text, or lower --sequences")
    model = make_model(arguments.layers, arguments.experts, arguments.top_k)
    ids = torch.tensor([number for text in texts for number in pieces.encode(text)])
    console.print(f"{len(ids)} tokens, {model.num_parameters() / 1e6:.1f} M parameters", highlight=False)
    loss, steps = train(model, ids, minutes=arguments.minutes, console=console)
    arguments.trace.unlink(missing_ok=True)
    source = f"trained for {steps} steps ({arguments.minutes:g} minutes) on the standard library, loss {loss:.2f}"
    record(model, prompts, arguments.trace, source=source)
    report(read_trace(arguments.trace), Console())


if __name__ == "__main__":
    main()
