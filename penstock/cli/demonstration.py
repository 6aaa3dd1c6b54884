"""Carries out `penstock demo`. Imported late: torch takes seconds."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from ..demo.checkpoint import DemoCheckpoint, DemoShape, write
from ..demo.contest import Job, Outcome, compete
from ..demo.table import Row, show
from ..devices import open_device
from ..memory.capacity import disk_capacity, host_capacity
from ..memory.errors import DiskError, DoesNotFitError
from ..memory.scratch import process_scratch
from ..runtime.links import LinkCache, disk_read_rate
from ..sizes import format_size
from .output import Output

PROMPT: Final = "def power(water, height):\n    "
NEW_TOKENS: Final = 16
SHARE: Final = 3
"""The budget is the weights divided by this."""
H2D: Final = 2 * 2**30
"""Rate of the emulated link, bytes per second."""
FRAMEWORK_NBYTES: Final = 768 * 2**20
"""What interpreter, torch and transformers take."""
WIDTH: Final = 88
"""Columns of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """A contestant that streams, and what its budget makes it move per sweep."""

    name: str
    device: str
    budget: dict[str, int]
    disk_nbytes: int
    """The least that it must read per sweep under its budget, however it plans."""
    link_nbytes: int


def demonstrate(
    output: Output, *, nbytes: int, disk: Path | None, keep: Path | None, svg: Path | None, as_json: bool
) -> int:
    """Write, run, compare, print; 0 where all tokens are equal, else 1."""
    _check_memory(nbytes)
    with _folder(nbytes, disk, keep) as folder:
        with output.busy(f"writing a random checkpoint of {format_size(nbytes)}"):
            checkpoint = write(folder, DemoShape.of(nbytes))
        rows, rates = _contest(output, checkpoint)
    equal = all(row.equal for row in rows)
    title = (
        f"penstock demo: {checkpoint.parameters / 1e6:.0f} million parameters in bf16, "
        f"{format_size(checkpoint.weights_nbytes)}, {checkpoint.layers} layers"
    )
    if as_json:
        output.write_json({"weights_nbytes": checkpoint.weights_nbytes, "disk_nbytes_per_s": rates, "runs": rows})
    else:
        commands = _commands(keep, checkpoint.weights_nbytes // SHARE)
        show(output.data, title, rows, _footnotes(rates), commands)
        if svg is not None:
            canvas = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
            show(canvas, title, rows, _footnotes(rates), commands)
            svg.write_text(canvas.export_svg(title="penstock demo", unique_id="penstock-demo"))
    return 0 if equal else 1


def _contest(output: Output, checkpoint: DemoCheckpoint) -> tuple[list[Row], list[float]]:
    """The rows, and every raw rate that the disk was measured at, in bytes per second."""
    prompt = checkpoint.encode(PROMPT)

    def run(name: str, device: str = "cpu", budget: dict[str, int] | None = None) -> Outcome:
        checkpoint.drop_cache()
        with output.busy(f"running {name}".replace("\n", " ")):
            return compete(
                Job(folder=str(checkpoint.folder), prompt=prompt, new_tokens=NEW_TOKENS, device=device, budget=budget)
            )

    resident = run("the resident model")
    rows = [
        Row(
            name="resident,\ntransformers",
            budget="",
            peak_nbytes=resident.peak_nbytes,
            s_per_token=resident.report.s_per_token,
            bound_s=None,
            bound_by=None,
            equal=True,
        )
    ]
    rates = [_raw_rate(checkpoint)]
    for each in _streamed(checkpoint):
        outcome = run(each.name, each.device, each.budget)
        rates.append(_raw_rate(checkpoint))
        terms = {
            "compute": resident.report.best_s,
            "disk": each.disk_nbytes / max(rates[-2:]),
            "link": each.link_nbytes / H2D,
        }
        binds = max(terms, key=lambda name: terms[name])
        rows.append(
            Row(
                name=each.name,
                budget="\n".join(f"{tier} {format_size(size)}" for tier, size in each.budget.items()),
                peak_nbytes=outcome.peak_nbytes,
                s_per_token=outcome.report.s_per_token,
                bound_s=terms[binds],
                bound_by=binds,
                equal=outcome.report.tokens == resident.report.tokens,
            )
        )
    return rows, rates


def _streamed(checkpoint: DemoCheckpoint) -> tuple[Streamed, ...]:
    third = checkpoint.weights_nbytes // SHARE
    swept = checkpoint.swept_nbytes
    return (
        Streamed(name="penstock,\nCPU", device="cpu", budget={"host": third}, disk_nbytes=swept - third, link_nbytes=0),
        Streamed(
            name="penstock,\nemulated device",
            device=f"emulated:h2d={H2D}B/s",
            budget={"device": third, "host": third},
            disk_nbytes=swept - 2 * third,
            link_nbytes=swept - third,
        ),
    )


def _raw_rate(checkpoint: DemoCheckpoint) -> float:
    """Bytes per second of reading these files past the page cache, now."""
    nowhere = LinkCache(Path(os.devnull, "links"))  # neither a rate of another day nor one to keep
    rate = disk_read_rate([str(file) for file in checkpoint.files], nowhere, open_device("cpu"))
    assert rate is not None, "the checkpoint has no bytes"
    return rate


def _footnotes(rates: list[float]) -> list[str]:
    low, high = min(rates) / 2**30, max(rates) / 2**30
    return [
        "peak memory: beyond what the process had with everything imported.",
        f"bound: the slowest of the disk ({low:.2f} to {high:.2f} GiB/s, read raw from these files beside each run), "
        "the link, and the resident model's fastest token.",
        f"distance: s/token over bound. The emulated device is part of this machine's memory behind a link held to "
        f"{H2D / 2**30:.0f} GiB/s: it shows the logic, not the speed, of a GPU.",
    ]


def _commands(keep: Path | None, budget_nbytes: int) -> list[str]:
    folder = "penstock-demo" if keep is None else str(keep)
    budget = f"{budget_nbytes // 2**20}MiB"
    run = f'penstock run {folder} --prompt "import " --max-memory host={budget}'
    emulated = f"{run.removesuffix(f' --max-memory host={budget}')} --device emulated:h2d=1GiB/s"
    emulated += f" --max-memory device={budget},host={budget}"
    first = [f"penstock demo --keep {folder}"] if keep is None else []
    return [*first, run, *([] if first else [emulated]), "penstock doctor"]


def _check_memory(nbytes: int) -> None:
    needed = nbytes + FRAMEWORK_NBYTES
    available = host_capacity().available_nbytes
    if needed > available:
        raise DoesNotFitError(
            f"the resident run needs about {format_size(needed)} of memory; {format_size(available)} are available: "
            f"choose a smaller --size",
            tier="host",
            needed_nbytes=needed,
            available_nbytes=available,
        )


@contextmanager
def _folder(nbytes: int, disk: Path | None, keep: Path | None) -> Iterator[Path]:
    """Where the checkpoint is written: a folder of its own that is removed at the end, or the one to keep."""
    if keep is None:
        with process_scratch().open(disk) as scratch:
            _check_disk(scratch.path, nbytes)
            yield Path(scratch.path)
        return
    _check_disk(keep, nbytes)
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot make {keep}: {error.strerror}; name another folder with --keep") from error
    yield keep


def _check_disk(folder: Path, nbytes: int) -> None:
    free = disk_capacity(folder).free_nbytes
    if free < nbytes * 1.1:
        raise DiskError(
            f"the checkpoint takes {format_size(nbytes)}; {folder} has {format_size(free)} free: name another folder "
            f"with --disk or --keep, or choose a smaller --size"
        )
