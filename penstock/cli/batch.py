"""Carries out `penstock run --prompts`. Imported late: torch and transformers take seconds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers.utils import logging as transformers_logging

from ..api import close, explain
from ..memory.errors import UsageError
from ..runtime.handle import Handle
from ..runtime.pretrained import locate
from ..runtime.throughput import Completion, Completions, ThroughputStatistics
from ..runtime.throughput_choice import Sampling
from ..runtime.throughput_start import Asked, Limits, start
from ..sizes import format_size
from .generation import plan_summary
from .output import Output
from .prompts import ManyRequest, PromptLine
from .results import ResultFile
from .sharing import Loaded, load_for
from .text import decode, encode, find_tokenizer


def carry_out_many(
    request: ManyRequest, lines: Sequence[PromptLine], results: ResultFile | None, output: Output
) -> None:
    """Load with room for the sequences, continue what is not finished, write results as they come, tell the pace."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it advises on arguments of its own
    finished = results.finished if results is not None else set()
    left = [index for index in range(len(lines)) if index not in finished]
    if finished:
        output.notes.print(f"{len(finished)} of {len(lines)} results are there already")
    if not left:
        if results is not None:
            results.begin()
        return
    with output.busy("loading"):
        folder = locate(request.checkpoint, trust_remote_code=request.trust_remote_code)
        tokenizer = find_tokenizer(folder, trust_remote_code=request.trust_remote_code)
        prompts = [_encode(request, index, lines[index], tokenizer) for index in left]
        loaded = load_for(request, folder, prompts)
    try:
        output.notes.print(explain(loaded.model))
        if results is not None:
            results.begin()
        _run(request, loaded, lines, prompts, results, tokenizer, output)
    finally:
        close(loaded.model)


def _encode(request: ManyRequest, index: int, line: PromptLine, tokenizer: Any | None) -> Asked:
    name = f"{request.file}, line {line.line}"
    try:
        ids = encode(line.prompt(chat=request.chat), tokenizer, request.checkpoint)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    return Asked(index=index, ids=tuple(ids), new_tokens=line.max_new_tokens or request.max_new_tokens, name=name)


def _run(
    request: ManyRequest,
    loaded: Loaded,
    lines: Sequence[PromptLine],
    prompts: Sequence[Asked],
    results: ResultFile | None,
    tokenizer: Any | None,
    output: Output,
) -> None:
    handle: Handle = loaded.model.penstock
    asked = request.sampling
    sampling = Sampling(temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k, seed=asked.seed or 0)
    work = start(loaded.model, prompts, sampling, limits=Limits(), choice=loaded.choice, products=loaded.products)
    began, waited = time.monotonic(), handle.statistics().waited_s
    with Completions(work, ordered=False, decode=None) as completions:
        output.notes.print(_told(completions.statistics(), streams=not handle.plan.resident))
        try:
            with _bar(output, completions.statistics):
                for done in completions:
                    _write(results, _record(lines[done.index], done, decode(tokenizer, list(done.ids))))
        except BaseException:
            if results is not None:
                output.notes.print(
                    f"{completions.statistics().finished} more results are in {results.path}; --resume goes on there"
                )
            raise
        reached = completions.statistics()
    seconds = time.monotonic() - began
    pace = _pace(handle, reached, seconds, handle.statistics().waited_s - waited)
    output.notes.print(_summary(pace))
    if request.as_json:
        output.write_json({**pace, "skipped": len(lines) - len(prompts), "plan": plan_summary(handle.plan)})


def _write(results: ResultFile | None, record: dict[str, object]) -> None:
    if results is not None:
        results.write(record)
    else:
        print(json.dumps(record, ensure_ascii=False), file=sys.stdout, flush=True)


def _record(line: PromptLine, done: Completion, text: str | None) -> dict[str, object]:
    """One line of results."""
    named = {} if line.id is None else {"id": line.id}
    asked: dict[str, object] = {"prompt": line.text} if line.ids is None else {"prompt_ids": list(line.ids)}
    return {
        "index": done.index,
        **named,
        **asked,
        "text": text,
        "ids": list(done.ids),
        "prompt_tokens": done.prompt_tokens,
        "tokens": len(done.ids),
        "finish": done.finish,
    }


@contextmanager
def _bar(output: Output, reached: Callable[[], ThroughputStatistics]) -> Iterator[None]:
    """How far the run is, on a terminal only."""
    if not output.notes.is_terminal:
        yield
        return

    class Bar(Progress):
        def get_renderables(self) -> Iterator[Any]:
            for task in self.tasks:
                now = reached()
                task.description = f"{now.finished}/{now.prompts} prompts, sweep {now.sweeps}"
                self.update(task.id, completed=now.share)
            yield from super().get_renderables()

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=output.notes, transient=True, speed_estimate_period=600) as bar:
        bar.add_task("", total=1.0)
        yield


def _told(statistics: ThroughputStatistics, *, streams: bool) -> Text:
    choice = statistics.schedule
    rows = max(len(batch.indices) for batch in choice.batches)
    text = f"{statistics.prompts} prompts in {len(choice.batches)} micro-batches of up to {rows}, {choice.lanes} at "
    text += f"once: up to {format_size(choice.nbytes)} for keys, values and activations"
    if streams:
        text += f", about {choice.sweeps} sweeps"
    if choice.cpu_share:
        text += f"; two processors alternate: the CPU computes {choice.cpu_share:.0%} of what it can"
    return Text(text)


def _pace(handle: Handle, reached: ThroughputStatistics, seconds: float, waited_s: float) -> dict[str, Any]:
    """What was reached. Times in seconds; what needs sweeps is None where nothing is streamed."""
    sweeps = reached.sweeps
    pace: dict[str, Any] = {
        "prompts": reached.finished,
        "tokens": reached.tokens,
        "seconds": seconds,
        "tokens_per_s": reached.tokens / seconds,
        "sweeps": sweeps,
        "micro_batches": len(reached.schedule.batches),
        "lanes": reached.schedule.lanes,
        "cpu_share": reached.cpu_share,
        "s_per_sweep": None,
        "bound_s_per_sweep": None,
        "bound_by": None,
        "distance": None,
    }
    if sweeps:
        computing = max(seconds - waited_s, 0.0) / sweeps
        plan = handle.plan.with_all_copied(1 - reached.schedule.cpu_share)
        bound = plan.bound_s(computing)
        pace |= {
            "s_per_sweep": seconds / sweeps,
            "bound_s_per_sweep": bound,
            "bound_by": plan.binds(computing),
            "distance": seconds / sweeps / bound,
        }
    return pace


def _summary(pace: dict[str, Any]) -> Text:
    head = f"{pace['prompts']} prompts, {pace['tokens']} tokens in {pace['seconds']:.2f} s = "
    head += f"{pace['tokens_per_s']:.2f} tokens/s"
    if not pace["sweeps"]:
        return Text(head)
    return Text.assemble(
        head + f"; {pace['sweeps']} sweeps of {pace['s_per_sweep']:.3f} s, bound {pace['bound_s_per_sweep']:.3f} s by "
        f"the {pace['bound_by']}; achieved/bound ",
        (f"{pace['distance']:.2f}", "bold"),
    )
