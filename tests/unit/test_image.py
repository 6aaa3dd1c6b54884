"""Images of blocks, filled by the real engine, against plain reads of the same files."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.memory.arena import PAGE, HostArena
from penstock.memory.casting import castable
from penstock.memory.disk import DiskEngine
from penstock.memory.image import ALIGN, SMALL, Image, build_image, device_image, packed_image, source_skew
from penstock.memory.layout import ITEMSIZE, FileSpan, TensorSource

FILE_NBYTES = 300_000
TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    for number in range(3):
        (made / str(number)).write_bytes(os.urandom(FILE_NBYTES))
    return made


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[list[tuple[int, int, int]], str, str, int | None]]:
    """Of each tensor: spans (file, offset, elements), stored dtype, dtype used, stated skew."""
    found = []
    at = [draw(st.integers(0, 5000)) for _ in range(3)]
    for _ in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(["F16", "BF16", "F32", "F64", "U8", "I64"]))
        target = draw(st.sampled_from([dtype, dtype, *TORCH]))
        if not castable(dtype, target):
            target = dtype
        size = ITEMSIZE[dtype]
        spans = []
        for _ in range(draw(st.sampled_from([1, 1, 1, 0, 2, 3]))):
            file = draw(st.integers(0, 2))
            count = draw(st.integers(1, 64) | st.integers(SMALL // size - 3, SMALL // size + 3000))
            start = at[file] + draw(st.sampled_from([0, 0, 0, 1, 2, 7, 64, 4096, 5003]))
            if start + count * size > FILE_NBYTES:
                continue
            spans.append((file, start, count))
            at[file] = start + count * size
        found.append((spans, dtype, target, draw(st.sampled_from([None, None, 0, 16, 48]))))
    return found


def sources(folder: Path, drawn: Any) -> list[tuple[str, TensorSource, str]]:
    made = []
    for number, (spans, dtype, target, skew) in enumerate(drawn):
        size = ITEMSIZE[dtype]
        source = TensorSource(
            shape=(sum(count for *_, count in spans),),
            dtype=dtype,
            spans=tuple(FileSpan(path=str(folder / str(f)), offset=at, nbytes=n * size) for f, at, n in spans),
            skew=skew,
        )
        made.append((f"t{number}", source, target))
    return made


def plain(source: TensorSource, target: str) -> bytes:
    raw = b""
    for span in source.spans:
        with open(span.path, "rb") as opened:
            opened.seek(span.offset)
            raw += opened.read(span.nbytes)
    if source.dtype == target or not raw:
        return raw
    values = torch.frombuffer(bytearray(raw), dtype=TORCH[source.dtype]).to(TORCH[target])
    return values.view(torch.uint8).numpy().tobytes()


def same(got: bytes, expected: bytes, source: str, target: str) -> bool:
    if got == expected or source == target:
        return got == expected
    a, b = (torch.frombuffer(bytearray(x), dtype=TORCH[target]) for x in (got, expected))
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_layout(image: Image, items: list[tuple[str, TensorSource, str]], *, move: bool) -> None:
    taken = sorted((place.offset, place.offset + place.nbytes) for place in image.places.values() if place.nbytes)
    assert all(before[1] <= after[0] for before, after in pairwise(taken)), "places overlap"
    assert all(start >= 0 and stop <= image.nbytes for start, stop in taken)
    windows = [(w.offset, w.offset + w.nbytes) for w in image.windows]
    assert all(before[1] <= after[0] for before, after in pairwise(windows)), "windows overlap"
    outputs = [
        (b.offset, b.offset + b.nbytes // ITEMSIZE[b.source_dtype] * ITEMSIZE[b.target_dtype]) for b in image.bounces
    ]
    finals = [(w.final_offset, w.final_offset + w.data_nbytes) for w in image.windows]
    extents = sorted([*outputs, *((min(a, c), max(b, d)) for (a, b), (c, d) in zip(windows, finals, strict=True))])
    assert all(before[1] <= after[0] for before, after in pairwise(extents)), "a read or a move hits another tensor"
    assert all(stop <= image.nbytes for _, stop in extents)
    for w in image.windows:
        assert w.offset % PAGE == w.file_offset % PAGE == w.nbytes % PAGE == 0
    assert image.data_nbytes == sum(source.nbytes // ITEMSIZE[source.dtype] * ITEMSIZE[to] for _, source, to in items)
    if move:
        for name, source, dtype in items:
            if source.nbytes:
                assert image.places[name].offset % ALIGN == source_skew(source, dtype)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=tensors(), chunk=st.sampled_from([PAGE, 4 * PAGE, 1 << 20]), move=st.booleans(), keep=st.booleans())
def test_every_tensor_is_where_its_place_says(folder: Path, drawn: Any, chunk: int, move: bool, keep: bool) -> None:
    items = sources(folder, drawn)
    image = build_image(items, move=move)
    check_layout(image, items, move=move)
    arena = HostArena(image.nbytes + PAGE)
    arena.cut(PAGE)
    slot = arena.cut(image.nbytes)
    arena.poison(slot)
    engine = DiskEngine(threads=2, chunk_nbytes=chunk)
    told: list[tuple[int, int]] = []
    view = arena.view(slot.offset, slot.nbytes)
    try:
        transfer = engine.read(image.windows, image.bounces, view, on_data=lambda a, b: told.append((a, b)))
        assert transfer.wait(20)
        assert engine.statistics().read_nbytes == image.read_nbytes
    finally:
        engine.close()
    for name, source, dtype in items:
        place = image.places[name]
        got = bytes(view[place.offset : place.offset + place.nbytes])
        assert same(got, plain(source, dtype), source.dtype, dtype), name
    assert not any(arena.view(0, PAGE))
    if not move:
        check_device(image, items, told, view, keep=keep)
    arena.close()


def check_device(image: Image, items: Any, told: list[tuple[int, int]], view: memoryview, *, keep: bool) -> None:
    """Copy the parts as they were told, in that order, and look at each tensor on the device."""
    on_device = device_image(image, keep_skew=keep)
    memory, written = bytearray(on_device.nbytes), bytearray(on_device.nbytes)
    for start, stop in told:
        for source, target, nbytes in on_device.parts(start, stop):
            memory[target : target + nbytes] = view[source : source + nbytes]
            for at in range(target, target + nbytes):
                written[at] += 1
    assert max(written) <= 1, "a byte was copied twice"
    for name, source, dtype in items:
        place = on_device.places[name]
        assert place.shape == source.shape
        assert bytes(memory[place.offset : place.offset + place.nbytes]) == bytes(
            view[image.places[name].offset : image.places[name].offset + place.nbytes]
        )
        assert all(written[place.offset : place.offset + place.nbytes])
        if keep and source.nbytes:
            assert place.offset % ALIGN == source_skew(source, dtype)
        if source.nbytes:
            assert place.offset % ITEMSIZE[dtype] == 0


def span(nbytes: int, offset: int, path: str = "f") -> tuple[FileSpan, ...]:
    return (FileSpan(path=path, offset=offset, nbytes=nbytes),)


def test_neighbours_share_one_window() -> None:
    first = TensorSource(shape=(8192,), dtype="F32", spans=span(32768, 4160))
    second = TensorSource(shape=(8192,), dtype="F32", spans=span(32768, 4160 + 32768))
    image = build_image([("b", second, "F32"), ("a", first, "F32")])
    (window,) = image.windows
    assert (window.file_offset, window.nbytes, window.needed_nbytes) == (4096, 17 * 4096, 64 + 65536)
    assert image.places["a"].offset == 64
    assert image.places["b"].offset == 64 + 32768
    assert not image.bounces


def test_small_converted_and_assembled_tensors_bounce() -> None:
    small = TensorSource(shape=(4,), dtype="F32", spans=span(16, 100))
    converted = TensorSource(shape=(8192,), dtype="F32", spans=span(32768, 4096))
    pieces = TensorSource(shape=(16384,), dtype="F32", spans=span(32768, 0) + span(32768, 0, "g"))
    image = build_image([("s", small, "F32"), ("c", converted, "BF16"), ("p", pieces, "F32")])
    assert not image.windows
    assert [(b.path, b.offset) for b in image.bounces][2:] == [
        ("f", image.places["p"].offset),
        ("g", image.places["p"].offset + 32768),
    ]
    assert image.places["s"].offset % ALIGN == 100 % ALIGN
    assert image.places["c"].offset % ALIGN == image.places["p"].offset % ALIGN == 0


def test_a_block_of_nothing_takes_a_page() -> None:
    empty = TensorSource(shape=(0, 5), dtype="F32", spans=())
    for image in (build_image([]), build_image([("e", empty, "F32")])):
        assert (image.nbytes, image.windows, image.bounces, image.read_nbytes) == (PAGE, (), (), 0)
        assert device_image(image, keep_skew=True).nbytes == PAGE


@example(shapes=[(0, "F32", 4), (601, "F32", 32), (721, "BF16", 32), (0, "F32", 0)], keep=False)
@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 3000), st.sampled_from(["F32", "BF16", "U8"]), st.sampled_from([0, 4, 32]))
    ),
    keep=st.booleans(),
)
def test_packed_images(shapes: list[tuple[int, str, int]], keep: bool) -> None:
    image = packed_image((f"t{i}", (n,), dtype, skew) for i, (n, dtype, skew) in enumerate(shapes))
    (window,) = image.windows
    assert window.nbytes == image.nbytes == image.read_nbytes
    taken = sorted((p.offset, p.offset + p.nbytes) for p in image.places.values())
    assert all(before[1] <= after[0] for before, after in pairwise(taken))
    for index, (count, dtype, skew) in enumerate(shapes):
        place = image.places[f"t{index}"]
        assert (place.offset % ALIGN, place.shape, place.dtype) == (skew, (count,), dtype)
    on_device = device_image(image, keep_skew=keep)
    assert list(on_device.parts(0, image.nbytes)) == [(0, 0, image.nbytes)]
    assert {n: p for n, p in on_device.places.items() if p.nbytes} == {
        n: p for n, p in image.places.items() if p.nbytes
    }
    assert all(
        (p.shape, p.dtype) == (image.places[n].shape, image.places[n].dtype) for n, p in on_device.places.items()
    )


@given(rows=st.integers(1, 12), parts=st.lists(st.integers(1, 12), min_size=1, max_size=4), data=st.data())
def test_slices_of_rows(rows: int, parts: list[int], data: st.DataObject) -> None:
    width = 24
    total = rows * width
    bounds = sorted({0, total, *(part * total // 13 // 4 * 4 for part in parts)})
    spans = tuple(FileSpan(path="f", offset=1000 * i + a, nbytes=b - a) for i, (a, b) in enumerate(pairwise(bounds)))
    source = TensorSource(shape=(rows, 3, 2), dtype="F32", spans=spans, skew=8)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    every = [(s.path, s.offset + i) for s in spans for i in range(s.nbytes)]
    part = source.slice_rows(start, stop)
    assert part.shape == (stop - start, 3, 2)
    assert [(s.path, s.offset + i) for s in part.spans for i in range(s.nbytes)] == every[start * width : stop * width]
    assert part.skew == (8 + start * width) % 64
