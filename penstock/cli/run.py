"""`penstock run`: continue one prompt, or many, with a checkpoint that may be larger than memory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ..memory.errors import UsageError
from .kv_option import Context, Kv, KvCodec, KvPolicy, read_codec, read_kv, read_policy
from .options import MACHINE, Checkpoint, Device, Disk, Dtype, MaxMemory, TrustRemoteCode
from .output import Output
from .prompt_options import (
    PROMPT,
    Chat,
    MaxNewTokens,
    Prompt,
    PromptFile,
    PromptIds,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from .prompts import ManyRequest, digest, read_prompts
from .request import Request, Sampling, read_prompt
from .results import ResultFile

_MANY = "Many prompts"
_Prompts = Annotated[
    Path | None,
    typer.Option(
        help='File of prompts, one JSON value per line: "a text", or {"prompt": "a text"}; - is stdin.',
        rich_help_panel=PROMPT,
    ),
]
_Results = Annotated[
    Path | None, typer.Option("--output", help="File for the results, one JSON line each.", rich_help_panel=_MANY)
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the results that are there.", rich_help_panel=_MANY)
]
_Force = Annotated[bool, typer.Option("--force", help="Write a file of results anew.", rich_help_panel=_MANY)]
_Plan = Annotated[
    Path | None, typer.Option(help="Carry out this plan (penstock plan --save), as it is.", rich_help_panel=MACHINE)
]
_Exact = Annotated[
    bool, typer.Option("--exact", help="Forbid what is equal to rounding only.", rich_help_panel=MACHINE)
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")]


def run(
    checkpoint: Checkpoint,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    prompt_ids: PromptIds = None,
    prompts: _Prompts = None,
    results: _Results = None,
    resume: _Resume = False,
    force: _Force = False,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    max_memory: MaxMemory = "auto",
    device: Device = "auto",
    disk: Disk = None,
    dtype: Dtype = "auto",
    plan: _Plan = None,
    exact: _Exact = False,
    context: Context = None,
    kv: Kv = None,
    kv_policy: KvPolicy = None,
    kv_codec: KvCodec = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: _AsJson = False,
) -> None:
    """Continue a prompt with a checkpoint that may be larger than memory.

    The text, and nothing else, goes to stdout as it comes; without a tokenizer, the token ids. The plan, progress and
    how close the run came to the machine's limit go to stderr.

    Example: penstock run ./llama --prompt "The sea" --max-memory host=8GiB

    With --prompts, many prompts share every pass over the weights. Their results go to --output, or to stdout, as they
    finish. A run that was interrupted goes on with --resume.
    """
    common: dict[str, Any] = {
        "checkpoint": checkpoint,
        "max_new_tokens": max_new_tokens,
        "sampling": Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        "max_memory": max_memory,
        "device": device,
        "disk": disk,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "as_json": as_json,
    }
    if prompts is not None:
        others = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompt-ids": prompt_ids}
        if given := [name for name, value in others.items() if value is not None]:
            raise UsageError(f"--prompts and {given[0]} exclude each other: give one of them")
        if exact or any(given is not None for given in (plan, context, kv, kv_policy, kv_codec)):
            raise UsageError(
                "--plan, --exact, --context, --kv, --kv-policy and --kv-codec are about one prompt: many are planned "
                "and cut by themselves"
            )
        _run_many(ManyRequest(file=prompts, output=results, resume=resume, force=force, chat=chat, **common))
        return
    if results is not None or resume or force:
        raise UsageError("--output, --resume and --force are about results of many prompts: give those by --prompts")
    if exact and kv is not None:
        raise UsageError("--exact forbids what is equal to rounding only, as attention over tiers is: leave out --kv")
    none = kv is None
    tiers = read_kv(kv, read_policy(kv_policy, needs_tiers=none), read_codec(kv_codec, needs_tiers=none))
    asked = read_prompt(text=prompt, file=prompt_file, ids=prompt_ids, chat=chat)
    request = Request(prompt=asked, plan=plan, exact=exact, context=context, kv=tiers, **common)
    output = Output()
    with output.busy("starting"):
        from .generation import carry_out  # torch and transformers take seconds
    carry_out(request, output)


def _run_many(request: ManyRequest) -> None:
    lines = read_prompts(request.file)
    output = Output()
    with ExitStack() as stack:
        results = None
        if request.output is not None:
            found = ResultFile(
                request.output,
                prompts=len(lines),
                digest=digest(lines, request),
                resume=request.resume,
                force=request.force,
            )
            results = stack.enter_context(found)
        with output.busy("starting"):
            from .batch import carry_out_many  # as above
        carry_out_many(request, lines, results, output)
