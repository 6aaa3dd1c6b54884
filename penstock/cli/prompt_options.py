"""Options of the verbs that continue prompts, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

PROMPT: Final = "Prompt (one of four)"
CHOICE: Final = "Choice of tokens"
"""Titles of panels of the help."""

Prompt = Annotated[str | None, typer.Option(help="Text to continue.", rich_help_panel=PROMPT)]
PromptFile = Annotated[
    Path | None, typer.Option(help="File with the text to continue; - is stdin.", rich_help_panel=PROMPT)
]
PromptIds = Annotated[
    str | None, typer.Option(help="Token ids to continue: 1,2,3.", metavar="IDS", rich_help_panel=PROMPT)
]
Chat = Annotated[bool, typer.Option("--chat", help="Put the text into the chat template.", rich_help_panel=PROMPT)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Stop after so many tokens.", metavar="N")]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="Sample at this temperature. Default: greedy.", rich_help_panel=CHOICE)
]
Seed = Annotated[int | None, typer.Option(help="Make sampling repeatable.", rich_help_panel=CHOICE)]
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Sample from this share of the probability.", rich_help_panel=CHOICE)
]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from so many tokens.", rich_help_panel=CHOICE)]
