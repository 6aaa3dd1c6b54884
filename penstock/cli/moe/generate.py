"""`penstock moe generate`: a made-up routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...memory.errors import UsageError
from ...sizes import format_size
from ..output import Output
from ..prof.outfile import refuse_existing, write_whole
from .inputs import Force

_MODEL = "The model"
_TEXT = "The text"
_GATE = "What a gate's logits are made of"

_Out = Annotated[Path, typer.Argument(metavar="TRACE", help="The file to write.")]
_Model = Annotated[
    Path | None,
    typer.Option(help="A config.json, or its folder, in the place of the options below.", rich_help_panel=_MODEL),
]
_Layers = Annotated[int, typer.Option(min=1, help="Layers that have experts.", rich_help_panel=_MODEL)]
_Experts = Annotated[int, typer.Option(min=1, help="Experts of a layer.", rich_help_panel=_MODEL)]
_TopK = Annotated[int, typer.Option(min=1, help="Experts that a token uses in a layer.", rich_help_panel=_MODEL)]
_Hidden = Annotated[int, typer.Option(min=1, help="Values of a token.", rich_help_panel=_MODEL)]
_Ffn = Annotated[int, typer.Option(min=1, help="Values between an expert's products.", rich_help_panel=_MODEL)]
_Dtype = Annotated[str, typer.Option(help="Of the experts' weights.", rich_help_panel=_MODEL)]
_Requests = Annotated[int, typer.Option(min=1, help="Sequences.", rich_help_panel=_TEXT)]
_Batch = Annotated[int, typer.Option(min=1, help="Sequences that run together.", rich_help_panel=_TEXT)]
_Prompt = Annotated[int, typer.Option(min=0, help="Tokens of a prompt; they are one step.", rich_help_panel=_TEXT)]
_Generate = Annotated[
    int, typer.Option("--generate", min=0, help="Tokens after it, each a step.", rich_help_panel=_TEXT)
]
_Seed = Annotated[int, typer.Option(min=0, help="The same seed makes the same file.", rich_help_panel=_TEXT)]
_Vocabulary = Annotated[
    int, typer.Option(min=1, help="Words; how often they come follows Zipf's law.", rich_help_panel=_TEXT)
]
_Zipf = Annotated[
    float,
    typer.Option(min=0, help="Skew: −ZIPF · ln(rank), the same for all tokens of a layer.", rich_help_panel=_GATE),
]
_Topic = Annotated[float, typer.Option(min=0, help="Deviation of what a sequence adds.", rich_help_panel=_GATE)]
_Context = Annotated[float, typer.Option(min=0, help="Deviation of what drifts along it.", rich_help_panel=_GATE)]
_Persistence = Annotated[
    float, typer.Option(min=0, max=0.9999, help="What a token keeps of the drift before it.", rich_help_panel=_GATE)
]
_Token = Annotated[
    float, typer.Option(min=0, help="Deviation of what a word adds wherever it comes.", rich_help_panel=_GATE)
]
_GuessNoise = Annotated[
    float,
    typer.Option(min=0, help="Deviation by which a gate that is asked one layer early is off.", rich_help_panel=_GATE),
]


def generate(
    out: _Out,
    model: _Model = None,
    layers: _Layers = 16,
    experts: _Experts = 64,
    top_k: _TopK = 4,
    hidden: _Hidden = 1024,
    ffn: _Ffn = 704,
    dtype: _Dtype = "bfloat16",
    requests: _Requests = 4,
    batch: _Batch = 1,
    prompt: _Prompt = 64,
    tokens: _Generate = 128,
    seed: _Seed = 0,
    vocabulary: _Vocabulary = 1000,
    zipf: _Zipf = 0.6,
    topic: _Topic = 0.4,
    context: _Context = 0.5,
    persistence: _Persistence = 0.9,
    token: _Token = 1.0,
    guess_noise: _GuessNoise = 0.5,
    force: Force = False,
) -> None:
    """Make up a routing trace: which experts each token of some sequences would choose.

    No model runs: a gate's logits are drawn, as a sum of skew, topic, drifting context and the word's own; docs/moe.md
    has the formula. Prints the name of the file.

    Examples:

        penstock moe generate made.moe --zipf 1.2 --context 0

        penstock moe generate mixtral.moe --model ./mixtral --requests 2
    """
    from ...scheduler.experts.generate import generate_trace
    from ...scheduler.experts.recipe import Recipe
    from ...scheduler.experts.shape import ExpertShape, Routing, experts_of
    from ...scheduler.experts.tracefile import encode_trace
    from ...scheduler.modelconfig import read_config

    output = Output()
    refuse_existing(out, force=force)
    if model is not None:
        routing, shape = experts_of(read_config(model))
    else:
        routing = Routing(layers=layers, experts=experts, top_k=top_k)
        shape = ExpertShape(hidden=hidden, ffn=ffn, dtype=dtype)
    recipe = Recipe(
        routing=routing, expert=shape, seed=seed, requests=requests, batch=batch, prompt=prompt, generate=tokens,
        zipf=zipf, topic=topic, context=context, persistence=persistence, token=token, vocabulary=vocabulary,
        guess_noise=guess_noise,
    )  # fmt: skip
    if batch > requests:
        raise UsageError(f"--batch {batch} of --requests {requests}: no more can run together than there are")
    with output.busy("making it up"):
        trace = generate_trace(recipe)
        nbytes = write_whole(out, lambda target: target.writelines(encode_trace(trace)), force=force)
    output.notes.print(
        f"{trace.steps} steps, {trace.tokens} tokens, {routing.layers} layers of {routing.experts} experts, "
        f"{routing.top_k} per token; {format_size(nbytes)}",
        markup=False,
    )
    output.data.print(str(out), markup=False, soft_wrap=True)
