"""Every conversion against torch, bit by bit, over raw bit patterns."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.memory.casting import cast, castable
from penstock.memory.layout import ITEMSIZE

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
PAIRS = [(source, target) for source in TORCH for target in TORCH]


def check(bits: np.ndarray, source: str, target: str, *, skew: int = 0) -> None:
    """Compare `cast` of these bit patterns with torch; NaNs must be NaNs, with whatever payload."""
    raw = bytes(skew) + bits.tobytes()
    out = bytearray(skew + len(bits) * ITEMSIZE[target])
    cast(memoryview(raw)[skew:], memoryview(out)[skew:], source, target)
    expected = torch.frombuffer(bytearray(bits.tobytes()), dtype=TORCH[source]).to(TORCH[target])
    got = torch.frombuffer(bytearray(out[skew:]), dtype=TORCH[target])
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ITEMSIZE[target]]
    same = (got.view(kind) == expected.view(kind)) | nan
    if not bool(same.all()):
        first = int((~same).nonzero()[0])
        value = torch.frombuffer(bytearray(bits.tobytes()), dtype=TORCH[source])[first]
        pytest.fail(f"{source} {value!r} -> {target}: {got[first]!r}, torch says {expected[first]!r}")


@pytest.mark.parametrize("target", TORCH)
@pytest.mark.parametrize("source", ["F16", "BF16"])
def test_every_half(source: str, target: str) -> None:
    check(np.arange(1 << 16, dtype=np.uint16), source, target)


def around(target: str) -> np.ndarray:
    """Float64 values at, next to and half-way between neighbours of the target, its limits and its denormals."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(TORCH[target]).double().numpy()
    halves = np.sort(halves[np.isfinite(halves)])
    ties = halves[:-1] + (halves[1:] - halves[:-1]) / 2
    beyond = np.float64([65504, 65519.999, 65520, 65520.001, 3.4e38, 3.5e38, 1e39, 1e308, 1e-46, 7e-46, 1e-320, 0.0])
    points = np.concatenate([halves, ties, beyond, -beyond])
    return np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])


@pytest.mark.parametrize("target", ["F16", "BF16"])
@pytest.mark.parametrize("source", ["F32", "F64"])
def test_ties_limits_and_denormals(source: str, target: str) -> None:
    values = around(target)
    if source == "F32":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            single = values.astype(np.float32)
        values = np.concatenate([single, np.nextafter(single, np.float32(np.inf)), np.nextafter(single, -np.inf)])
        check(values.astype(np.float32).view(np.uint32), source, target)
    else:
        check(values.view(np.uint64), source, target)


def test_double_rounding_as_torch_has_it() -> None:
    # torch goes from double to half through float: a value just above a tie first falls onto it
    value = np.float64([1 + 2**-11 + 2**-40, -(1 + 2**-11 + 2**-40), 1 + 2**-8 + 2**-40, 2.0**-24 * (0.5 + 2**-40)])
    check(value.view(np.uint64), "F64", "F16")
    check(value.view(np.uint64), "F64", "BF16")
    check(value.view(np.uint64), "F64", "F32")


SPECIAL = {
    2: [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0x7F80, 0x7F81, 0x0001, 0x03FF, 0x7BFF, 0x7F7F],
    4: [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 1, 0x7F7FFFFF, 0x477FF000, 0x33000000],
    8: [0, 1 << 63, 0x7FF0 << 48, 0xFFF0 << 48, (0x7FF0 << 48) + 1, 0x7FF8 << 48, (1 << 64) - 1, 1, (0x7FF0 << 48) - 1],
}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_special_values(source: str, target: str) -> None:
    size = ITEMSIZE[source]
    check(np.array(SPECIAL[size], dtype=UNSIGNED[size]), source, target)


@settings(max_examples=150)
@given(pair=st.sampled_from(PAIRS), data=st.data(), skew=st.integers(0, 7))
def test_any_bits(pair: tuple[str, str], data: st.DataObject, skew: int) -> None:
    size = ITEMSIZE[pair[0]]
    patterns = st.integers(0, (1 << 8 * size) - 1) | st.sampled_from(SPECIAL[size])
    bits = data.draw(st.lists(patterns, min_size=1, max_size=40))
    check(np.array(bits, dtype=UNSIGNED[size]), *pair, skew=skew)


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 32))
@example(seed=0)
def test_many_random_bits(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for source in ("F32", "F64"):
        size = ITEMSIZE[source]
        bits = generator.integers(0, 1 << 8 * size, 2000, dtype=UNSIGNED[size])
        spread = np.ldexp(generator.standard_normal(2000), generator.integers(-150, 140, 2000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            near = spread.astype(np.float64 if size == 8 else np.float32).view(UNSIGNED[size])
        for target in TORCH:
            check(np.concatenate([bits, near]), source, target)


def test_what_can_be_cast() -> None:
    assert all(castable(source, target) for source, target in PAIRS)
    assert castable("I64", "I64")
    assert castable("C64", "C64")
    assert castable("F8_E4M3", "F8_E4M3")
    assert not castable("I32", "F32")
    assert not castable("F8_E4M3", "BF16")


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_same_dtype_is_a_copy(dtype: str) -> None:
    raw = bytes(range(64))
    out = bytearray(64)
    cast(memoryview(raw), memoryview(out), dtype, dtype)
    assert out == raw
