"""What holds for every test: debug mode is on, a hang shows its stacks, and no thread outlives its test."""

import os

os.environ["PENSTOCK_DEBUG"] = "1"  # before anything of penstock is imported: arenas are poisoned from the start
# Tiny models on two threads spend a third of their time on waking them; what several may change asks for `every_core`.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faulthandler
import gc
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

_GRACE_S = 5.0

# Deadlines per example measure the machine of the day; pytest's own time limit catches what hangs.
settings.register_profile("penstock", deadline=None, print_blob=True)
settings.load_profile("penstock")
faulthandler.enable()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells do for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands that tests start would ignore it as well


def _offending(before: set[threading.Thread]) -> list[threading.Thread]:
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and thread.is_alive() and (not thread.daemon or thread.name.startswith("penstock"))
    ]


@pytest.fixture(scope="module")
def every_core() -> Iterator[None]:
    """Operations are computed on as many threads as there are cores, as programs do by default."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Fail a test that leaves a thread behind: one that is not a daemon, or any of penstock's."""
    before = set(threading.enumerate())
    yield
    if not _offending(before):
        return
    gc.collect()  # thread pools that are only garbage stop their threads when they are collected
    deadline = time.monotonic() + _GRACE_S
    while (left := _offending(before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left:
        pytest.fail(f"threads left running: {', '.join(sorted(thread.name for thread in left))}")
