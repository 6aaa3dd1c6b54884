"""`penstock run`: continue a prompt with a checkpoint that may be larger than memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MACHINE, Disk, Dtype, MaxMemory, TrustRemoteCode
from .output import Output
from .request import Request, Sampling, read_prompt

_PROMPT = "Prompt (one of three)"
_CHOICE = "Choice of tokens"


def run(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Folder of a safetensors checkpoint, or a Hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", rich_help_panel=_PROMPT)] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the text to continue; - is stdin.", rich_help_panel=_PROMPT)
    ] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(help="Token ids to continue: 1,2,3.", metavar="IDS", rich_help_panel=_PROMPT)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the chat template.", rich_help_panel=_PROMPT)
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.", metavar="N")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sample at this temperature. Default: greedy.", rich_help_panel=_CHOICE),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from this share of the probability.", rich_help_panel=_CHOICE),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from so many tokens.", rich_help_panel=_CHOICE)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Make sampling repeatable.", rich_help_panel=_CHOICE)] = None,
    max_memory: MaxMemory = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:N, or emulated:h2d=1GiB/s.", rich_help_panel=MACHINE)
    ] = "auto",
    disk: Disk = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
) -> None:
    """Continue a prompt with a checkpoint that may be larger than memory.

    The text, and nothing else, goes to stdout as it comes; without a tokenizer, the token ids. The plan, progress and
    how close the run came to the machine's limit go to stderr.

    Example: penstock run ./llama --prompt "The sea" --max-memory host=8GiB
    """
    request = Request(
        checkpoint=checkpoint,
        prompt=read_prompt(text=prompt, file=prompt_file, ids=prompt_ids, chat=chat),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        max_memory=max_memory,
        device=device,
        disk=disk,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        as_json=as_json,
    )
    output = Output()
    with output.busy("starting"):
        from .generation import carry_out  # torch and transformers take seconds
    carry_out(request, output)
