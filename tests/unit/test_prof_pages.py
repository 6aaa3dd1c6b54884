"""Pages that are mapped more than once are resident once."""

from __future__ import annotations

import torch

from penstock.kernels.linear_rows import _Repeated
from penstock.runtime.profiler.pages import mapped_nbytes, resident_nbytes, status_nbytes

MIB = 1 << 20
MAPS = """\
10000000-10100000 rw-s 00000000 00:01 7 /memfd:probe (deleted)
10100000-10200000 rw-s 00000000 00:01 7 /memfd:probe (deleted)
10200000-10300000 rw-s 00080000 00:01 7 /memfd:probe (deleted)
20000000-20400000 rw-s 00000000 00:01 8 /memfd:once (deleted)
30000000-30400000 r--p 00000000 fe:00 9 /usr/lib/a library.so
40000000-40400000 rw-p 00000000 00:00 0
"""


def test_a_file_counts_once_however_often_it_is_mapped() -> None:
    assert mapped_nbytes(MAPS) == (3 * MIB, MIB + MIB // 2)
    assert mapped_nbytes("") == (0, 0)


def test_sizes_of_a_status_file() -> None:
    text = b"Name:\tpython 3 kB\nVmRSS:\t    1024 kB\nRssShmem:\t       4 kB\nThreads:\t3\n"
    assert status_nbytes(text) == {b"VmRSS": MIB, b"RssShmem": 4096}


def test_memory_that_is_mapped_again_and_again_is_told_once() -> None:
    with _Repeated(MIB, 200) as buffer:
        before = resident_nbytes()
        view = torch.frombuffer(buffer, dtype=torch.uint8)
        view[:MIB].fill_(1)
        assert int(view.view(-1, 4096)[:, 0].sum()) == 200 * MIB // 4096  # all 200 are touched
        grown = resident_nbytes() - before
        del view
    assert grown < 24 * MIB
