"""`penstock moe record`: the routing trace of a model that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...memory.errors import UsageError
from ..options import Checkpoint, Device, Disk, Dtype, MaxMemory, TrustRemoteCode
from ..output import Output
from ..prof.outfile import refuse_existing
from ..prompt_options import (
    PROMPT,
    Chat,
    MaxNewTokens,
    Prompt,
    PromptFile,
    PromptIds,
    Seed,
    Temperature,
)
from ..prompts import PromptLine, read_prompts
from ..request import Request, Sampling, read_prompt
from .inputs import Force

_Out = Annotated[Path, typer.Argument(metavar="TRACE", help="The file to write.")]
_Prompts = Annotated[
    Path | None,
    typer.Option(help="File of prompts, as of `penstock run --prompts`: one after another.", rich_help_panel=PROMPT),
]


def record(
    checkpoint: Checkpoint,
    out: _Out,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    prompt_ids: PromptIds = None,
    prompts: _Prompts = None,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = None,
    seed: Seed = None,
    max_memory: MaxMemory = "auto",
    device: Device = "auto",
    disk: Disk = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Record which experts each token of a prompt and its continuation chooses.

    The model runs as `penstock run` runs it, streamed where it does not fit. Beside the experts that were chosen, the
    trace has those that came near, what the router thought of them, and what the router of each layer would have said
    one layer earlier, as far as routers are known. Prints the name of the file, which can be read while it grows.

    Examples:

        penstock moe record ./mixtral sea.moe --prompt "The sea" --max-memory host=8GiB

        penstock moe replay sea.moe --capacity 25%
    """
    refuse_existing(out, force=force)
    lines = _lines(prompt, prompt_file, prompt_ids, prompts, chat)
    requests = [
        Request(
            checkpoint=checkpoint,
            prompt=line.prompt(chat=chat),
            max_new_tokens=line.max_new_tokens or max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=None, top_k=None, seed=seed),
            max_memory=max_memory,
            device=device,
            disk=disk,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            as_json=False,
        )
        for line in lines
    ]
    output = Output()
    with output.busy("starting"):
        from .recording import carry_out  # torch and transformers take seconds
    carry_out(requests, out, output, force=force)
    output.data.print(str(out), markup=False, soft_wrap=True)


def _lines(
    prompt: str | None, prompt_file: Path | None, prompt_ids: str | None, prompts: Path | None, chat: bool
) -> list[PromptLine]:
    """The prompts, from the one option that was given."""
    if prompts is None:
        one = read_prompt(text=prompt, file=prompt_file, ids=prompt_ids, chat=chat)
        return [PromptLine(line=1, text=one.text, ids=one.ids, max_new_tokens=None, id=None)]
    others = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompt-ids": prompt_ids}
    if given := [name for name, value in others.items() if value is not None]:
        raise UsageError(f"--prompts and {given[0]} exclude each other: give one of them")
    return read_prompts(prompts)
