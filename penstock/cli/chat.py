"""`penstock chat`: talk with a checkpoint that may be larger than memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..memory.errors import UsageError
from ..scheduler.kv.choice import PolicyChoice
from ..sizes import parse_size
from .kv_option import PANEL, Kv, KvCodec, KvOption, KvPolicy, read_codec, read_kv, read_policy
from .options import Checkpoint, Device, Disk, Dtype, MaxMemory, TrustRemoteCode
from .output import Output
from .prompt_options import Seed, Temperature, TopK, TopP
from .request import Sampling

_DEFAULT_CONTEXT = 4096

_System = Annotated[str | None, typer.Option(help="A first message that says how to answer.")]
_MaxNewTokens = Annotated[int, typer.Option(min=1, help="Of a reply, at most.", metavar="N")]
_Context = Annotated[
    int, typer.Option(min=1, metavar="N", help="Tokens of the whole conversation, at most.", rich_help_panel=PANEL)
]
_Store = Annotated[
    Path | None,
    typer.Option(help="Folder of a prefix store. Default: one in the user's cache.", rich_help_panel=PANEL),
]
_Capacity = Annotated[
    str | None,
    typer.Option("--store-capacity", metavar="SIZE", help="Of that store. Default: 4GiB for a new one.",
                 rich_help_panel=PANEL),
]  # fmt: skip
_NoStore = Annotated[bool, typer.Option("--no-store", help="Keep nothing of it on disk.", rich_help_panel=PANEL)]
_AlwaysRead = Annotated[
    bool,
    typer.Option(
        "--always-read", help="Read what is stored, even where computing it again is faster.", rich_help_panel=PANEL
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """One `penstock chat`."""

    checkpoint: str
    system: str | None
    max_new_tokens: int
    sampling: Sampling
    context: int
    kv: KvOption | None
    """Budgets of keys and values; None for host memory alone, as much as the context takes."""
    policy: PolicyChoice
    """Of selection."""
    codec: str | None
    """Of full blocks."""
    store: Path | None
    """Folder of the prefix store; None for the default one."""
    capacity_nbytes: int | None
    use_store: bool
    always_read: bool
    """What is stored, whatever it takes."""
    max_memory: str
    device: str
    disk: Path | None
    dtype: str
    trust_remote_code: bool


def chat(
    checkpoint: Checkpoint,
    system: _System = None,
    max_new_tokens: _MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    context: _Context = _DEFAULT_CONTEXT,
    kv: Kv = None,
    kv_policy: KvPolicy = None,
    kv_codec: KvCodec = None,
    store: _Store = None,
    store_capacity: _Capacity = None,
    no_store: _NoStore = False,
    always_read: _AlwaysRead = False,
    max_memory: MaxMemory = "auto",
    device: Device = "auto",
    disk: Disk = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a checkpoint that may be larger than memory.

    Replies, and nothing else, go to stdout as they come. Each line of stdin is a message; an empty end (Ctrl-D) ends
    the conversation. Ctrl-C stops a reply, and what was said of it stays; between replies it ends the conversation.

    What was computed of a conversation is kept for the next message, and in a prefix store for the next conversation
    that begins like it. `penstock store stats` and `prune` know that store.

    Example: penstock chat ./llama --system "Answer in one sentence."
    """
    if no_store and (store is not None or store_capacity is not None or always_read):
        raise UsageError(
            "--no-store keeps nothing: leave out --store, --store-capacity and --always-read, or --no-store"
        )
    policy, codec = read_policy(kv_policy), read_codec(kv_codec)
    if codec is not None and (store is not None or store_capacity is not None or always_read):
        raise UsageError(
            f"--kv-codec {codec}: a prefix store has keys and values as they were made; leave out --store, "
            "--store-capacity and --always-read, or the codec"
        )
    request = ChatRequest(
        checkpoint=checkpoint,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        context=context,
        kv=read_kv(kv, policy, codec),
        policy=policy,
        codec=codec,
        store=store,
        capacity_nbytes=None if store_capacity is None else parse_size(store_capacity),
        use_store=not no_store,
        always_read=always_read,
        max_memory=max_memory,
        device=device,
        disk=disk,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    output = Output()
    with output.busy("starting"):
        from .conversation import carry_out  # torch and transformers take seconds
    carry_out(request, output)
