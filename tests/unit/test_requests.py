"""How reads are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.arena import PAGE
from penstock.memory.requests import CHUNK, FINEST, THREADS, request_nbytes


@given(pages=st.integers(1, 2**16), threads=st.integers(1, 16))
def test_a_read_has_a_request_for_every_thread_unless_they_would_be_too_small(pages: int, threads: int) -> None:
    nbytes = pages * PAGE
    step = request_nbytes(nbytes, threads=threads)
    assert step % PAGE == 0
    assert FINEST <= step <= CHUNK
    if nbytes >= FINEST * threads:
        assert -(-nbytes // step) >= threads - threads * PAGE * threads // nbytes  # rounding to pages may lose some
    else:
        assert step == FINEST


def test_sizes_of_a_layer_and_of_its_parts() -> None:
    mib = 2**20
    assert [request_nbytes(n * mib) // mib for n in (1, 4, 8, 16, 32, 151)] == [1, 1, 1, 2, 4, 4]
    assert request_nbytes(4 * mib, threads=THREADS, chunk_nbytes=16 * PAGE) == 16 * PAGE
