"""What policies of selection and codecs cost in answers: recall against budget, without downloads.

    python -m benchmarks.kv_accuracy --json kv-accuracy.json --plot docs/kv-recall.svg    # trains some minutes, once
    python -m benchmarks.kv_accuracy --steps 4 --length 64 --rows 1 --questions 2         # tries it out

A model of two layers learns to look up pairs: a key comes again, and its value is to follow (`kv_accuracy_model`). It
is kept in the user's cache. Then each key of a context is there once, a question is one token that is computed with a
policy, and the answer is right or not. What was asked is cropped again, so all questions see the same context; for
policies that hear of each step (h2o, alisa) the context is computed anew, since those remember what was asked.

Constructed keys need no model: is the one key that a query looks for among those that were chosen? Policies that choose
by votes have nothing to choose by there, and are left out. Keys are drawn one by one, or in runs that are much alike.

Two turns: SnapKV's votes come from the first question. A second one as a token of the reply finds what the first left
(as if the rest were deleted); as a prompt it votes anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import penstock
from penstock.scheduler.kv.arraykeys import ArrayKeys
from penstock.scheduler.kv.choice import PolicyChoice
from penstock.scheduler.kv.policies import POLICIES, policy
from penstock.scheduler.kv.policies.policy import Heads, Query, Setting

from .kv_accuracy_model import KEYS, VALUES, context_of, trained
from .kv_accuracy_plot import draw

SHARES = (0.0625, 0.125, 0.25, 0.5, 1.0)
BLOCK, RECENT, SINKS = 8, 8, 4
LEAST = 3 * BLOCK + SINKS
GOAL = 0.95
"""Of the recall of attention to all, at a quarter of the budget, by the best policy."""
MODELLED = [name for name in POLICIES if name not in ("vq", "sale", "exact")]
"""vq codes from 1024 keys on, and sale is for prompts."""
SCORED = ("random", "quest", "landmark", "sparq", "oracle")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy with one budget."""

    task: str
    name: str
    share: float
    """Of the context that is attended to."""
    answers: float
    """Part of the questions that were answered rightly."""
    attention: float | None
    """Kept, on average over heads, layers and questions."""
    read: float | None
    """Bytes that were read, as a part of those of all keys and values, what choosing looked at included."""


def cache_for(model: Any, choice: PolicyChoice, codec: str | None) -> Any:
    """All in host memory: answers do not depend on where blocks are."""
    return penstock.TieredCache(
        model.config, max_memory={"host": "64MiB", "disk": 0}, block_tokens=BLOCK, policy=choice, codec=codec
    )


def answers(
    model: Any, contexts: torch.Tensor, asked: torch.Tensor, expected: torch.Tensor, cache: Any
) -> tuple[float, Any]:
    """The part of questions [rows, questions] that is answered rightly, each of them in the same context.

    Policies that hear steps would remember the questions before, which a crop does not undo: for them the context is
    computed again for each.
    """
    right = 0
    anew = POLICIES[cache.choice.name].hears_steps
    with torch.no_grad():
        for number in range(asked.shape[1]):
            if anew or not number:
                cache.reset()
                model(input_ids=contexts, past_key_values=cache, use_cache=True)
            some = asked[:, number : number + 1]
            logits = model(input_ids=some, past_key_values=cache, use_cache=True).logits[:, -1]
            right += int((logits.argmax(dim=-1) == expected[:, number]).sum())
            cache.crop(-1)
    return right / asked.numel(), cache.statistics().chosen


def modelled(model: Any, arguments: argparse.Namespace) -> Iterable[Row]:
    """The model's answers, by policy and budget, and by codec."""
    draw_from = torch.Generator().manual_seed(arguments.seed)
    contexts, asked, expected = context_of(arguments.length, arguments.rows, arguments.questions, draw_from)
    kinds: list[tuple[str, float, PolicyChoice, str | None]] = [("exact", 1.0, PolicyChoice(), None)]
    kinds += [(codec, 1.0, PolicyChoice(), codec) for codec in ("int8", "int4")]
    for name in MODELLED:
        for share in SHARES:
            budget = max(LEAST, int(share * (contexts.shape[1] + 1)))  # the question is one token more
            choice = PolicyChoice(
                name=name, budget_tokens=budget, sinks=SINKS, recent=RECENT, dense_layers=0, recall_every=1
            )
            kinds.append((name, budget / (contexts.shape[1] + 1), choice, None))
    warm = cache_for(model, PolicyChoice(), None)  # from the second call on all calls are ours
    answers(model, contexts[:1, :4], asked[:1, :1], expected[:1, :1], warm)
    warm.close()
    for name, share, choice, codec in kinds:
        cache = cache_for(model, choice, codec)
        part, chosen = answers(model, contexts, asked, expected, cache)
        cache.close()
        attention = read = None
        if chosen is not None and chosen.steps:
            attention = chosen.recall
            kept_nbytes = 0 if name in ("sparq", "oracle") else chosen.scored_nbytes  # keys were counted as gathered
            read = (chosen.gathered_nbytes + kept_nbytes) / chosen.whole_nbytes
        yield Row(task="model", name=name, share=share, answers=part, attention=attention, read=read)


def constructed(arguments: argparse.Namespace, *, run: int) -> Iterable[Row]:
    """Whether the key that is looked for was chosen: 4096 of unit length, in runs of so many that are alike."""
    rng = np.random.default_rng(arguments.seed)
    tokens, dim = 4096, 64
    centres = np.repeat(rng.standard_normal((tokens // run, dim)), run, axis=0)
    keys = (centres if run > 1 else 0) + rng.standard_normal((tokens, dim)) * (0.3 if run > 1 else 1.0)
    keys = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)[None]
    heads = Heads(kv_heads=1, group=1, dim=dim, itemsize=4)
    needles = rng.integers(SINKS, tokens - 64, arguments.needles)
    for name in SCORED:
        for share in SHARES[:-1]:
            setting = Setting(budget_tokens=int(share * tokens), sinks=SINKS, recent=RECENT, block_tokens=16)
            made = policy(name, heads, setting, layer=0, dense_layers=0)
            made.appended(keys)
            found, read = 0, 0
            for needle in needles.tolist():
                noisy = keys[0, needle] + 0.05 * rng.standard_normal(dim).astype(np.float32)
                query = Query(values=(noisy * 8 * dim**0.5).astype(np.float32)[None, None], tokens=tokens)
                selection = made.select(query, ArrayKeys(heads, keys))
                found += needle in selection.tokens(0, tokens)
                read += selection.scored_nbytes + selection.attended_nbytes(heads, tokens)
            part = read / len(needles) / (2 * heads.key_nbytes * tokens)
            task = "needles" if run == 1 else f"needles in runs of {run}"
            yield Row(task=task, name=name, share=share, answers=found / len(needles), attention=None, read=part)


def two_turns(model: Any, arguments: argparse.Namespace) -> Iterable[Row]:
    """A second question, after SnapKV has chosen by the first one."""
    draw_from = torch.Generator().manual_seed(arguments.seed + 1)
    contexts, asked, expected = context_of(arguments.length, arguments.rows, arguments.questions, draw_from)
    budget = max(LEAST, contexts.shape[1] // 4)
    choice = PolicyChoice(name="snapkv", budget_tokens=budget, sinks=SINKS, recent=RECENT, dense_layers=0)
    right = {"first question": 0, "second, as if the rest were deleted": 0, "second, recalled": 0}
    for at in range(asked.shape[1]):
        first, second = asked[:, at : at + 1], asked[:, at - 1 : at] if at else asked[:, -1:]
        answer = expected[:, at - 1] if at else expected[:, -1]
        cache = cache_for(model, choice, None)
        with torch.no_grad():
            logits = model(input_ids=torch.cat([contexts, first], dim=1), past_key_values=cache, use_cache=True).logits
            right["first question"] += int((logits[:, -1].argmax(dim=-1) == expected[:, at]).sum())
            logits = model(input_ids=second, past_key_values=cache, use_cache=True).logits
            right["second, as if the rest were deleted"] += int((logits[:, -1].argmax(dim=-1) == answer).sum())
            cache.crop(-1)
            asked_again = torch.cat([expected[:, at : at + 1], second], dim=1)  # the first answer, then the question
            logits = model(input_ids=asked_again, past_key_values=cache, use_cache=True).logits
            right["second, recalled"] += int((logits[:, -1].argmax(dim=-1) == answer).sum())
        cache.close()
    for name, count in right.items():
        part, share = count / asked.numel(), budget / contexts.shape[1]
        yield Row(task="two turns, snapkv", name=name, share=share, answers=part, attention=None, read=None)


def table_of(rows: Sequence[Row]) -> Table:
    """One line for each row."""
    table = Table("task", "policy", "budget", "answers", "attention kept", "bytes read")
    for row in rows:
        kept = "" if row.attention is None else f"{row.attention:.3f}"
        read = "" if row.read is None else f"{row.read:.3f}"
        table.add_row(row.task, row.name, f"{row.share:.1%}", f"{row.answers:.3f}", kept, read)
    return table


def main() -> None:
    """Train or load, ask, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="of training, at most")
    parser.add_argument("--length", type=int, default=2 * KEYS, help="tokens of a context: pairs of a key and a value")
    parser.add_argument("--rows", type=int, default=8, help="contexts")
    parser.add_argument("--questions", type=int, default=32, help="of each")
    parser.add_argument("--needles", type=int, default=256, help="among constructed keys")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="file for the plot, as SVG")
    arguments = parser.parse_args()
    console = Console()
    model = trained(arguments.steps, tell=lambda text: console.print(text, markup=False, emoji=False))
    rows = [
        *modelled(model, arguments),
        *two_turns(model, arguments),
        *constructed(arguments, run=1),
        *constructed(arguments, run=32),
    ]
    console.print(table_of(rows))
    whole = next(row.answers for row in rows if row.name == "exact")
    said = f"attention to all answers {whole:.3f} of the questions (chance: {1 / VALUES:.3f})"
    quarter = [row for row in rows if row.task == "model" and row.attention is not None and row.share <= SHARES[2]]
    if best := max((row for row in quarter if row.name != "oracle"), key=lambda row: row.answers, default=None):
        said += f"; best with a quarter: {best.name}, {best.answers:.3f}; the goal is {GOAL} of what all answers"
    console.print(said, markup=False, emoji=False)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if arguments.plot is not None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.task == "model" and row.attention is not None:
                lines.setdefault(row.name, []).append((row.share, row.answers))
        arguments.plot.write_text(draw(lines, whole=whole))


if __name__ == "__main__":
    main()
