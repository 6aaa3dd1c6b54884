"""What integration tests share."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from penstock.runtime.profiler import tensors


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A profiler records models that were there before it, as it should; those of other tests are none of a test's."""
    gc.collect()
    others = [o for o in gc.get_objects() if issubclass(type(o), nn.Module | torch.optim.Optimizer)]
    known = {id(other) for other in others}  # kept alive meanwhile, so that no id comes again
    monkeypatch.setattr(tensors, "objects_alive", lambda: [o for o in gc.get_objects() if id(o) not in known])
    yield
    others.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny operations spend their time on waking threads, all the more where others use the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
