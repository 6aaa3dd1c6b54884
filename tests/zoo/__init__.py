"""Small random models of every shape that must stream exactly: `ZOO`, by name."""

from .decoders import DECODERS, greedy, llama_config, logits, prompt, token_ids
from .encoder_decoders import ENCODER_DECODERS
from .entry import Entry, Inputs, Outputs, differences, load_resident
from .outside import used_outside
from .plain import PLAIN
from .vision import VISION

ZOO: dict[str, Entry] = {entry.name: entry for entry in (*DECODERS, *ENCODER_DECODERS, *VISION, *PLAIN)}

__all__ = [
    "ZOO",
    "Entry",
    "Inputs",
    "Outputs",
    "differences",
    "greedy",
    "llama_config",
    "load_resident",
    "logits",
    "prompt",
    "token_ids",
    "used_outside",
]
