"""What tells a source file, and a tokenizer, from others without reading or trying all of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final

from .sources import open_file

_END_NBYTES: Final = 2**16

_PROBE: Final = "The sluice held 1234 m³; Ünïcödé, 中文, 🙂\n\n\tif x == 'y':  # it's\r\n"
"""A text over which tokenizers differ: spaces, digits, accents, scripts, line ends."""


def source_fingerprint(path: Path) -> dict[str, int | str]:
    """The file's kind, size, time of change (ns) and a digest of its first and last 64 KiB.

    Raises:
        UsageError: the file cannot be opened.
        DiskError: it cannot be read.
    """
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        ends = hashlib.blake2b(file.read(_END_NBYTES), digest_size=16)
        file.seek(max(status.st_size - _END_NBYTES, 0))
        ends.update(file.read(_END_NBYTES))
    return {
        "suffix": path.suffix.lower(),
        "nbytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ends": ends.hexdigest(),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of all that decides which tokens it makes: vocabulary, rules, special tokens, chat template."""
    known: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "probe": list(tokenizer(_PROBE, padding=False, truncation=False, verbose=False)["input_ids"]),
    }
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from whoever called it last, and not used here.
        known["rules"] = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    text = json.dumps(known, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
