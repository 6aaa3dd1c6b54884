"""Routing traces: what goes into a file comes out of it, and what is damaged is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_traces import plain_trace, recipe

from penstock.memory.errors import DiskError, TraceError, UsageError
from penstock.scheduler.experts.generate import generate_trace
from penstock.scheduler.experts.shape import Routing
from penstock.scheduler.experts.trace import Step, Trace, TraceHeader, steps_of, trace_of
from penstock.scheduler.experts.tracefile import MAGIC, TraceWriter, encode_trace, read_trace


def same(one: Trace, other: Trace) -> bool:
    arrays = ("phases", "begins", "requests", "experts", "scores", "guesses")
    pairs = [(getattr(one, name), getattr(other, name)) for name in arrays]
    return one.header == other.header and all(
        a is b if a is None or b is None else a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs
    )


def written(path: Path, trace: Trace, *, segment_nbytes: int = 2**20) -> Path:
    path.write_bytes(b"".join(encode_trace(trace, segment_nbytes=segment_nbytes)))
    return path


@settings(max_examples=40)
@given(
    layers=st.integers(1, 3),
    experts=st.sampled_from([1, 2, 8, 255, 256, 300]),
    k=st.integers(1, 8),
    scored=st.booleans(),
    guessed=st.booleans(),
    lengths=st.lists(st.integers(1, 5), max_size=6),
    segment=st.sampled_from([1, 100, 2**20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_trace_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory,
    layers: int, experts: int, k: int, scored: bool, guessed: bool, lengths: list[int], segment: int, seed: int,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    k = min(k, experts)
    width = int(random.integers(k, experts + 1))
    header = TraceHeader(
        routing=Routing(layers=layers, experts=experts, top_k=k),
        width=width,
        source="x",
        scored=scored,
        guessed=guessed,
    )

    def ids(tokens: int, count: int) -> Any:
        return np.argsort(random.random((layers, tokens, experts)), axis=2)[..., :count].astype(np.uint16)

    steps = [
        Step(
            phase="prefill" if random.integers(2) else "decode",
            requests=random.integers(0, 2**32, tokens, dtype=np.uint32),
            experts=ids(tokens, width),
            scores=random.random((layers, tokens, width)).astype(np.float16) if scored else None,
            guesses=np.where(random.random((layers, tokens, k)) < 0.3, experts, ids(tokens, k)).astype(np.uint16)
            if guessed
            else None,
        )
        for tokens in lengths
    ]
    trace = trace_of(header, steps)
    path = tmp_path_factory.mktemp("trace") / "a.moe"
    assert same(read_trace(written(path, trace, segment_nbytes=segment)), trace)
    other = path.with_name("b.moe")
    with TraceWriter(other, header, segment_nbytes=segment) as writer:
        for step in steps:
            writer.add(step)
    if steps:  # without any, a writer has nothing to write
        assert same(read_trace(other), trace)


def test_steps_make_the_trace_again() -> None:
    trace = generate_trace(recipe())
    assert same(trace_of(trace.header, steps_of(trace)), trace)
    part = trace.between(3, 7)
    assert part.steps == 4
    assert same(part, trace_of(trace.header, list(steps_of(trace))[3:7]))


def test_a_file_is_compact(tmp_path: Path) -> None:
    trace = generate_trace(recipe(generate=400))
    nbytes = written(tmp_path / "a.moe", trace).stat().st_size
    routing = trace.header.routing
    kept = trace.tokens * routing.layers * (trace.header.width * 3 + routing.top_k)  # a byte an expert, two a score
    assert nbytes < 0.9 * kept


def test_an_end_that_is_cut_off_is_told_and_the_rest_is_read(tmp_path: Path) -> None:
    trace = generate_trace(recipe())
    path = written(tmp_path / "a.moe", trace, segment_nbytes=1)  # a segment for each step
    data = path.read_bytes()
    last = data.rindex(MAGIC)
    for length in (last + 1, last + 20, last + 40, len(data) - 1):
        path.write_bytes(data[:length])
        found = read_trace(path)
        assert found.steps == trace.steps - 1
        assert f"after {trace.steps - 1} whole steps" in found.problems[0]
    path.write_bytes(data[:last])
    assert read_trace(path).problems == ()
    path.write_bytes(data[:30])
    with pytest.raises(TraceError, match="nothing that could be read"):
        read_trace(path)


def test_a_length_that_reaches_over_segments_behind_it_is_no_end(tmp_path: Path) -> None:
    trace = generate_trace(recipe())
    path = written(tmp_path / "a.moe", trace, segment_nbytes=1)
    data = bytearray(path.read_bytes())
    second = data.index(MAGIC, 1)
    data[second + 14] |= 0x01  # 64 KiB more
    assert len(data) < 1 << 16
    path.write_bytes(data)
    with pytest.raises(TraceError, match=rf"the segment at byte {second} claims .* and others follow"):
        read_trace(path)


def test_damage_anywhere_is_found(tmp_path: Path) -> None:
    trace = generate_trace(recipe(generate=3))
    path = written(tmp_path / "a.moe", trace, segment_nbytes=400)
    data = path.read_bytes()
    for place in range(0, len(data), max(len(data) // 150, 1)):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            found = read_trace(path)
        except TraceError:
            continue
        # A length that reaches beyond the end looks as one that was cut off.
        assert found.problems
        assert found.steps < trace.steps


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    def refused(data: bytes | None, why: str) -> None:
        path = tmp_path / "x.moe"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(TraceError, match=why):
            read_trace(path)

    refused(None, "cannot read .*No such file")
    refused(b"", "is empty")
    refused(b"PK\x03\x04 something else", "no routing trace")
    data = b"".join(encode_trace(generate_trace(recipe(generate=2, requests=1)), segment_nbytes=1))
    first = data.index(MAGIC, 1)
    refused(data[:8] + b"\x02" + data[9:], "of version 2, and this penstock reads up to 1")
    refused(data[first:], "begins with step 1 and 0 come before it")
    refused(data + data[first:], "a segment is missing, or is there twice")
    other = b"".join(encode_trace(generate_trace(recipe(seed=1, requests=1))))
    refused(data + other, "of another trace")
    refused(data[:first] + b"junk" + data[first:], f"no segment begins at byte {first}")


def test_a_trace_that_cannot_be_is_refused() -> None:
    with pytest.raises(TraceError, match="names expert 16: there are 16"):
        plain_trace([[[16, 1]]])
    with pytest.raises(TraceError, match="one expert twice"):
        plain_trace([[[3, 3]]])
    with pytest.raises(TraceError, match="between 2, which a token uses"):
        TraceHeader(routing=Routing(layers=1, experts=8, top_k=2), width=9, source="")
    with pytest.raises(TraceError, match="names 2 layers and has 1"):
        TraceHeader(routing=Routing(layers=1, experts=8, top_k=2), width=2, source="", paths=("a", "b"))
    with pytest.raises(UsageError, match="a token can use 1 to all"):
        Routing(layers=1, experts=8, top_k=9)
    trace = plain_trace([[[3, 4]]])
    with pytest.raises(TraceError, match="step 0 has experts of shape"):
        trace_of(trace.header, [Step(phase="decode", requests=np.zeros(2, np.uint32), experts=trace.experts)])


def test_a_writer_overwrites_nothing_and_says_what_it_cannot_write(tmp_path: Path) -> None:
    trace = plain_trace([[[3, 4]], [[1, 2]]])
    path = tmp_path / "a.moe"
    path.write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        TraceWriter(path, trace.header)
    with pytest.raises(DiskError, match=r"cannot make .*No such file"):
        TraceWriter(tmp_path / "no" / "a.moe", trace.header)
    with TraceWriter(tmp_path / "b.moe", trace.header) as writer:
        first, second = steps_of(trace)
        writer.add(first)
        writer.flush()
        assert read_trace(tmp_path / "b.moe").steps == 1  # before it is closed
        writer.add(second)
        with pytest.raises(TraceError, match="against what the trace says"):
            writer.add(Step(phase="decode", requests=first.requests, experts=first.experts, guesses=first.experts))
        writer.close()
    assert same(read_trace(tmp_path / "b.moe"), trace)
