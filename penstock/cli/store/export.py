"""`penstock store export`: a run's weights as a checkpoint that others load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...memory.errors import CheckpointError, CorruptBlockError, StoreBusyError, StoreError, UsageError
from ...sizes import format_size
from ..options import Json, TrustRemoteCode
from ..output import Output
from ..prof.inputs import Force
from .inputs import Drives, Run, store_folders
from .outfolder import whole_folder

if TYPE_CHECKING:
    from ...memory.store import BlockStore
    from ...runtime.training.exported import Export


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written."""

    folder: str
    commit: int
    """Number of the commit that it shows."""
    steps: int
    """Updates that it has seen."""
    files: tuple[str, ...]
    """With weights."""
    tensors: int
    trained: int
    """Parameters that the run trains."""
    merged: int
    """Parameters of the checkpoint that adapters are merged into."""
    nbytes: int
    """Of all tensors."""
    names: str
    """Whose names they have: "checkpoint", or "model" where there is no way back to those of the checkpoint; "adapter"
    where they are PEFT's."""


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    dtype: Annotated[
        str, typer.Option(help="auto (what the run computed in), bfloat16, float16, float32 (masters as they are).")
    ] = "auto",
    source: Annotated[
        str | None, typer.Option(metavar="CKPT", help="Where the checkpoint is now that the run began with.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Of a run of adapters: the checkpoint with the adapters merged into it.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    drives: Drives = None,
    as_json: Json = False,
) -> None:
    """Write the weights of a run's last commit as a Hugging Face checkpoint: safetensors, config, tokenizer.

    Weights are the run's fp32 masters, rounded; what is not trained comes from the checkpoint that the run began with.
    Of a run of adapters (--lora) it is the folder of the adapters alone, which peft.PeftModel.from_pretrained loads, or
    with --merged the checkpoint itself with the adapters in its weights, one layer in memory at a time.
    There is nothing to import: penstock.prepare takes any checkpoint. Prints the name of the folder.
    """
    from ...memory.store import BlockStore

    output = Output()
    with output.busy(f"writing {out}"), BlockStore.open(store_folders(run, drives), readonly=True) as store:
        report = _export(
            store, out, dtype=dtype, source=source, trust_remote_code=trust_remote_code, merged=merged, force=force
        )
    if as_json:
        output.write_json(report)
        return
    note = {"checkpoint": "", "adapter": " of adapters"}.get(report.names, ", by the model's own names")
    made = f"{report.trained} of them trained for {report.steps} steps"
    if report.merged:
        made = f"adapters of {report.steps} steps merged into {report.merged} of them"
    output.notes.print(
        f"{report.tensors} tensors{note}, {format_size(report.nbytes)}, {made} (commit {report.commit})", markup=False
    )
    output.data.print(str(out), markup=False, soft_wrap=True)


def _export(store: BlockStore, out: Path, *, force: bool, **options: Any) -> ExportReport:
    from ...runtime.training.export import plan_export

    if not store.committed:
        raise StoreError(f"{store.folders[0]} holds no commit yet: there is nothing to export")
    planned = plan_export(store, **options)
    with whole_folder(out, force=force, never=[planned.source]) as folder:
        files = _write(store, planned, folder)
        _check(planned, folder, trust_remote_code=options["trust_remote_code"])
    return ExportReport(
        folder=str(out),
        commit=store.committed,
        steps=planned.steps,
        files=tuple(files),
        tensors=len(planned.tensors),
        trained=planned.trained,
        merged=planned.merged,
        nbytes=sum(tensor.nbytes for tensor in planned.tensors),
        names=planned.names,
    )


def _write(store: BlockStore, planned: Export, folder: Path) -> list[str]:
    from .copying import copy_files, copy_tensor
    from .weightfiles import WeightFiles, write_durably

    if planned.files is not None:
        for name, text in planned.files.items():
            write_durably(str(folder / name), text.encode())
    elif planned.source is not None:
        copy_files(planned.source, str(folder), planned.dtype)
    with WeightFiles(str(folder), planned.tensors, single=planned.weights) as files:
        for tensor in planned.tensors:
            copy_tensor(tensor, files)
        try:
            planned.write_masters(store, files)
        except CorruptBlockError as error:
            _refuse_if_it_went_on(store, error)
            raise
    return files.names


def _refuse_if_it_went_on(store: BlockStore, error: CorruptBlockError) -> None:
    """Say so where a block has other bytes because the run goes on: it is not damaged then."""
    from ...memory.store import stats

    latest = stats(store.folders).commit
    if latest != store.committed:
        raise StoreBusyError(
            f"the run in {store.folders[0]} went on while it was exported, from commit {store.committed} to {latest}: "
            "export it again when it has ended, or from a copy"
        ) from error


def _check(planned: Export, folder: Path, *, trust_remote_code: bool) -> None:
    """Open what was written as `penstock.load` would, before anybody sees it.

    Raises:
        CheckpointError: it could not be loaded.
    """
    from ...memory.layout import TensorSource
    from ...runtime.pretrained import skeleton

    if planned.source is None or planned.names == "adapter":
        return
    try:
        sources = skeleton(folder, trust_remote_code=trust_remote_code).sources
    except (CheckpointError, UsageError) as error:
        raise CheckpointError(f"the exported checkpoint could not be loaded: {error}") from error
    if planned.names == "checkpoint":
        return
    for tensor in planned.tensors:
        found = sources.get(tensor.name)
        if not isinstance(found, TensorSource) or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                f"transformers would not load {tensor.name} by this name as it is, and the way back to the names of "
                f"{planned.source} is not known: resume the run, and use model.save_pretrained"
            )
