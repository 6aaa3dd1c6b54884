"""Runs a contestant in a process of its own and watches its memory from outside."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import msgspec

from ..memory.errors import PenstockError

SAMPLE_S: Final = 0.005


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a contestant is to do."""

    folder: str
    prompt: list[int]
    new_tokens: int
    device: str = "cpu"
    budget: dict[str, int] | None = None
    """None: resident, with transformers alone."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a contestant says."""

    tokens: list[int]
    s_per_token: float
    """Mean over the tokens after the first."""
    best_s: float
    """The fastest of them."""
    plan: str
    """The plan in words; empty for the resident model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A report, and what was seen from outside."""

    report: Report
    peak_nbytes: int
    """The most memory that the process had (RSS, mapped files included) beyond what it had with everything imported."""


def compete(job: Job) -> Outcome:
    """Run one contestant.

    Raises:
        PenstockError: it failed; the message has the last line that it wrote.
    """
    command = [sys.executable, "-m", "penstock.demo.contestant", msgspec.json.encode(job).decode()]
    with tempfile.TemporaryFile("w+") as errors:
        # A session of its own: Ctrl-C comes to us alone, and we end it.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            return _watch(process, errors)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _watch(process: subprocess.Popen[str], errors: IO[str]) -> Outcome:
    assert process.stdin is not None
    assert process.stdout is not None
    if not process.stdout.readline():
        raise _failed(process, errors)
    baseline = resident_nbytes(process.pid)
    sampler = _Sampler(process.pid)
    sampler.start()
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
    finally:
        sampler.stop()
    if not line:
        raise _failed(process, errors)
    process.wait()
    return Outcome(report=msgspec.json.decode(line, type=Report), peak_nbytes=max(0, sampler.peak_nbytes - baseline))


def _failed(process: subprocess.Popen[str], errors: IO[str]) -> PenstockError:
    code = process.wait()
    errors.seek(0)
    last = next((line.strip() for line in reversed(errors.read().splitlines()) if line.strip()), "it wrote nothing")
    hint = "; the system may have run out of memory: try a smaller --size" if code < 0 else ""
    return PenstockError(f"a contestant of the demonstration ended with code {code}: {last}{hint}")


class _Sampler(threading.Thread):
    def __init__(self, pid: int) -> None:
        super().__init__(name="penstock-demo-sampler", daemon=True)
        self.peak_nbytes = 0
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.peak_nbytes = max(self.peak_nbytes, resident_nbytes(self._pid))

    def stop(self) -> None:
        self._done.set()
        self.join()


def resident_nbytes(pid: int) -> int:
    """RAM that a process has now; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields.get("VmRSS", "0 kB").split()[0]) * 1024
