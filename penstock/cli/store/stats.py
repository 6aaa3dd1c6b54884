"""`penstock store stats`: what a run keeps on disk, and how far it is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ...sizes import format_size
from ..options import Json
from ..output import Output
from ..prof.plain import plain
from .inputs import Drives, Kept, refuse_drives, store_folders
from .prefixes import is_prefixes, show_stats

if TYPE_CHECKING:
    from ...memory.store import StoreStats


def stats(run: Kept, drives: Drives = None, as_json: Json = False) -> None:
    """Tell what a run keeps on disk: its last commit, what it trains, bytes taken and bytes written so far.

    Of a prefix store: how much of how many prompts is in it, and how much there may be. Reads no block and takes no
    lock: the run may be going on meanwhile. With --json sizes are in bytes.
    """
    from ...memory.store import stats as store_stats

    output = Output()
    if is_prefixes(run):
        refuse_drives(run, drives)
        show_stats(run, output, as_json=as_json)
        return
    found = store_stats(store_folders(run, drives))
    training = _training(found)
    if as_json:
        plain_fields = {name: value for name, value in _fields(found).items() if name != "metadata"}
        output.write_json({**plain_fields, "training": training})
        return
    rows = _rows(found, training)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        output.data.print(plain(f"{name.ljust(width)}  {value}"), markup=False, soft_wrap=True)


def _fields(found: StoreStats) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


def _training(found: StoreStats) -> dict[str, Any] | None:
    """What the commit says of the run; None before the first."""
    if not found.commit:
        return None
    from ...runtime.training.run import decode

    state = decode(found.metadata)
    return {
        "optimizer": state.mathematics,
        "steps": max(state.steps, default=0),
        "parameters": len(state.names),
        "source": state.source,
        "dtype": state.dtype,
        "max_grad_norm": state.max_grad_norm,
        "learning_rates": [group.get("lr") for group in state.groups],
    }


def _rows(found: StoreStats, training: dict[str, Any] | None) -> list[tuple[str, str]]:
    rows = [("folder", folder) for folder in found.folders]
    rows.append(("commit", f"{found.commit}" if found.commit else "none yet"))
    if training is not None:
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(training["learning_rates"]) if rate is not None)
        rows += [
            ("steps", f"{training['steps']}"),
            ("optimizer", f"{training['optimizer']}, lr {rates}"),
            ("trains", f"{training['parameters']} parameters of {training['source'] or 'a module'}"),
        ]
    kinds = ", ".join(f"{kind} {format_size(nbytes)}" for kind, nbytes in sorted(found.nbytes_by_kind.items()))
    return [
        *rows,
        ("blocks", f"{found.blocks} ({kinds}), {found.changed_blocks} written by the last commit"),
        (
            "on disk",
            f"{format_size(found.allocated_nbytes)}, in {found.slots} slots; manifest "
            f"{format_size(found.manifest_nbytes)}",
        ),
        ("written", f"{format_size(found.written_nbytes)} since the run began"),
    ]
