"""The steps of a run for TensorBoard, where that is installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .metrics import StepRecord


class Board:
    """Writes steps as TensorBoard's scalars.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, record: StepRecord) -> None:
        """One step."""
        named: dict[str, float | None] = {
            "loss/train": record.loss,
            "loss/eval": record.eval_loss,
            "lr": record.lr,
            "gradient norm": record.gradient_norm,
            "pace/tokens per s": record.tokens_per_s,
            "pace/s per step": record.seconds,
        }
        for name, value in named.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """No more steps."""
        self._writer.close()


def open_board(folder: Path, *, after: int) -> Board | None:
    """A board in a folder; None where TensorBoard is not installed.

    Args:
        folder: Made where it is missing.
        after: The last step that stays: those behind it will be taken again.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return Board(SummaryWriter(log_dir=str(folder), purge_step=after + 1))
