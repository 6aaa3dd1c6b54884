"""MKL's buffers: what of them counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from penstock.runtime.profiler.mathbuffers import MathBuffers, mkl_allocated, watch_math_buffers
from penstock.runtime.profiler.recorder import Recorder
from penstock.runtime.profiler.ring import Ring
from penstock.runtime.profiler.schema import Category, Memory, Tier


@dataclass
class Process:
    """What the meters say; the test sets it."""

    allocated: int = 0
    anonymous: int = 0
    in_files: int = 80
    recorder: Recorder = field(default_factory=lambda: Recorder(Ring(capacity_nbytes=2**20)))

    def __post_init__(self) -> None:
        self.records: list[object] = []
        self.recorder.add = self.records.append
        self.buffers = MathBuffers(
            self.recorder,
            allocated=lambda: self.allocated,
            resident=lambda: self.anonymous + self.in_files,
            anonymous=lambda: self.anonymous,
        )

    def named(self, nbytes: int) -> None:
        """Others have a name: the baseline, tensors."""
        self.recorder.memory(nbytes, Tier.HOST, Category.BASELINE)

    def counted(self, *, freed: int = 0) -> int:
        """What of MKL's buffers counts after a look."""
        self.buffers.looked(freed)
        rows = [r for r in self.records if isinstance(r, Memory) and r.category is Category.ARENA]
        return sum(row.nbytes for row in rows)


def test_buffers_that_were_touched_count_whole() -> None:
    process = Process(anonymous=100)
    process.named(180)  # the baseline: what was in memory, and in files
    process.allocated, process.anonymous = 30, 130
    assert process.counted() == 30
    assert process.recorder.named_on_host() == 210


def test_of_buffers_that_were_touched_in_part_no_more_counts_than_is_there() -> None:
    process = Process(anonymous=100)
    process.named(180)
    process.allocated, process.anonymous, process.in_files = 30, 112, 90  # ten bytes of libraries were touched as well
    assert process.counted() == 12
    assert process.counted(freed=5) == 7
    process.named(40)
    process.anonymous += 20  # a tensor is there in part only
    assert process.counted() == 0


def test_memory_that_nobody_knows_for_a_while_is_not_taken_for_buffers() -> None:
    process = Process(anonymous=100)
    process.named(180)
    process.allocated, process.anonymous = 30, 112
    assert process.counted() == 12
    process.anonymous += 500  # activations of a step that is not looked at
    assert process.counted() == 12
    process.allocated, process.anonymous = 40, 118  # one more buffer, when they are gone
    assert process.counted() == 18


def test_buffers_that_are_given_back_count_no_longer_and_those_from_before_never() -> None:
    process = Process(allocated=50, anonymous=100)
    process.named(180)
    process.allocated, process.anonymous = 80, 130
    assert process.counted() == 30
    process.allocated, process.anonymous = 20, 70
    assert process.counted() == 0


def test_mkl_tells_what_its_products_keep() -> None:
    allocated = mkl_allocated()
    if allocated is None:
        pytest.skip("torch computes without MKL here")
    a = torch.randn(1100, 1300)
    a @ a.T
    nbytes = allocated()
    assert nbytes > 0
    a @ a.T  # what the first product needed is enough for the next one
    assert allocated() == nbytes


def test_where_there_is_no_mkl_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.runtime.profiler.mathbuffers.SYMBOL", "no_such_function")
    recorder = Recorder(Ring(capacity_nbytes=2**20))
    watch_math_buffers(recorder)(7)
    assert recorder.named_on_host() == 0
    assert not recorder.tables["modules"]
