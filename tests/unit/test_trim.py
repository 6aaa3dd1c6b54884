"""What the C allocator keeps of memory that is free, in a process of its own: it is a setting of the whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, torch
from penstock.memory.capacity import process_memory
from penstock.memory.trim import map_alone

if sys.argv[1] == "alone":
    assert map_alone(1 << 20)
for _ in range(3):  # the first that is freed teaches malloc to keep as large ones
    kept, gone = [], []
    for _ in range(64):
        gone.append(torch.ones(2 << 20, dtype=torch.uint8))
        kept.append(torch.ones(4 << 10, dtype=torch.uint8))
    before = process_memory().anonymous_nbytes
    gone.clear()
print((before - process_memory().anonymous_nbytes) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_what_is_mapped_alone_goes_back_when_it_is_freed() -> None:
    def given_back(how: str) -> int:
        found = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        return int(found.stdout)

    assert given_back("alone") >= 120
    assert given_back("as it is") < 120
