"""What the GPU tests need of CUDA: results that depend neither on the stream nor on which algorithm was tried first."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts

from collections.abc import Iterator

import pytest
import torch
from zoo.budgets import DEVICES


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuDNN keeps to deterministic algorithms, and the zoo's budgets know the device."""
    monkeypatch.setitem(DEVICES, "cuda", "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a failed kernel belongs to the test that launched it
