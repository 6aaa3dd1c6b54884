"""Below how many rows the CPU is chosen: against brute force, and what the answer must depend on."""

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Hardware, Link, Processor, Sharing
from penstock.scheduler.operations import Operation
from penstock.scheduler.processors import ALWAYS, GAIN, Candidate, Traffic, at_rows, choose, rows_below, saves

GB = 1e9
MOST = 600


def processor(name: str, memory: float, peak: float, launch_s: float) -> Processor:
    """Products read `memory` bytes per second until arithmetic binds, at a row count that `peak` gives."""
    knee = max(peak / memory, 1.0)
    points = [(1.0, memory)] + ([(knee, memory)] if knee > 1 else []) + [(knee * 4096, memory / 4096)]
    return Processor(
        name=name,
        memory_nbytes=2**36,
        memory=Curve.flat(memory),
        linear={"bfloat16": Curve.through(points)},
        attention={"bfloat16": Curve.flat(memory)},
        launch_s=launch_s,
    )


def machine(
    *,
    cpu: float = 40 * GB,
    cpu_peak: float = 400 * GB,
    link: float = 12 * GB,
    latency_s: float = 2e-5,
    sharing: Sharing | None = None,
) -> CostModel:
    return CostModel(
        hardware=Hardware(
            name="test",
            cpu=processor("cpu", cpu, cpu_peak, 2e-6),
            gpu=processor("gpu", 900 * GB, 90_000 * GB, 5e-6),
            host_nbytes=2**36,
            drives=(),
            link=Link(h2d=Curve.flat(link), d2h=Curve.flat(link), latency_s=latency_s),
            sharing=sharing or Sharing(),
        )
    )


def layer(nbytes: float = 400e6, **changes: object) -> Candidate:
    operation = Operation(kind="linear", nbytes=nbytes, dtype="bfloat16", launches=7)
    made: dict[str, object] = {"block": 3, "operations": (operation,), "nbytes": nbytes, "row_nbytes": 16_384.0}
    return Candidate(**{**made, **changes})  # type: ignore[arg-type]


@settings(max_examples=200)
@given(
    cpu=st.floats(1, 400),
    peak=st.floats(1, 100),
    link=st.floats(1, 400),
    latency=st.floats(0, 1e-3),
    nbytes=st.floats(1e3, 1e9),
    shares=st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)),
    copying=st.booleans(),
    reading=st.booleans(),
    attention=st.floats(0, 1e6),
)
def test_the_threshold_is_that_of_trying_every_number_of_rows(
    cpu: float,
    peak: float,
    link: float,
    latency: float,
    nbytes: float,
    shares: tuple[float, float],
    copying: bool,
    reading: bool,
    attention: float,
) -> None:
    left, held_up = shares
    sharing = Sharing(
        compute_while_copying=left,
        copy_while_computing=held_up,
        compute_while_reading=held_up,
        read_while_computing=left,
    )
    costs = machine(cpu=cpu * GB, cpu_peak=cpu * peak * GB, link=link * GB, latency_s=latency, sharing=sharing)
    operations = (
        Operation(kind="linear", nbytes=nbytes, dtype="bfloat16"),
        Operation(kind="attention", nbytes=attention, dtype="bfloat16", rows=4),
        Operation(kind="memory", nbytes=1000),
    )
    candidate = layer(nbytes, operations=operations)
    traffic = Traffic(copying=copying, reading=reading)
    found = rows_below(candidate, costs, traffic=traffic, most_rows=MOST)
    wins = [saves(candidate, costs, rows, traffic) for rows in range(1, MOST + 1)]
    first_loss = next((rows for rows, won in enumerate(wins, start=1) if not won), None)
    if found == ALWAYS:
        assert all(wins[2**power - 1] for power in range(10))
    elif found == 0:
        assert not wins[0]
    else:
        assert wins[found - 2]
        assert not wins[found - 1]
    if sorted(wins, reverse=True) == wins:  # no number of rows above the first loss wins again
        assert found == (ALWAYS if first_loss is None else first_loss if first_loss > 1 else 0)


def test_a_fast_cpu_takes_tokens_and_leaves_prompts() -> None:
    found = rows_below(layer(), machine())
    assert 4 < found < 200
    assert saves(layer(), machine(), found - 1, Traffic())
    assert not saves(layer(), machine(), found, Traffic())


def test_what_moves_the_threshold() -> None:
    base = rows_below(layer(), machine())
    assert rows_below(layer(), machine(link=25 * GB)) < base, "a faster link"
    assert rows_below(layer(), machine(cpu_peak=800 * GB)) > base, "a faster CPU"
    assert rows_below(layer(), machine(latency_s=5e-3)) < base, "slower crossings"
    shared = machine(sharing=Sharing(compute_while_copying=0.6, copy_while_computing=0.8))
    assert rows_below(layer(), shared) < base, "memory that both share"
    assert rows_below(layer(), shared, traffic=Traffic(copying=False)) == base
    assert rows_below(layer(row_nbytes=2e6), machine()) < base, "wide activations"


def test_never_and_always() -> None:
    assert rows_below(layer(), machine(cpu=8 * GB)) == 0
    assert rows_below(layer(4096, crossings=0.0, row_nbytes=0.0), machine(link=0.001 * GB), most_rows=64) == ALWAYS
    alone = CostModel(hardware=Hardware(name="cpu", cpu=processor("cpu", GB, GB, 0), host_nbytes=1, drives=()))
    assert rows_below(layer(), alone) == ALWAYS


def test_less_than_five_percent_are_no_reason() -> None:
    """The CPU takes as long as copy and device together, or a little less."""

    def saves_with(cpu: float) -> bool:
        costs = machine(cpu=cpu * GB, link=10 * GB, latency_s=0)
        return saves(layer(crossings=0.0, row_nbytes=0.0), costs, 1, Traffic())

    together = 1 / (1 / 10 + 1 / 900)
    assert not saves_with(together)
    assert not saves_with(together * 1.04)
    assert saves_with(together / (1 - GAIN) * 1.01)


def test_choose_leaves_out_what_the_device_computes() -> None:
    small = layer(1e3, block=1)
    big = layer(block=2)
    assert set(choose([small, big], machine())) == {2}


def test_rows_multiply_tokens_and_not_weights() -> None:
    linear = Operation(kind="linear", nbytes=100, rows=2)
    assert at_rows(linear, 8) == Operation(kind="linear", nbytes=100, rows=16)
    attention = Operation(kind="attention", nbytes=100, rows=4)
    assert at_rows(attention, 8) == Operation(kind="attention", nbytes=800, rows=4)
    adam = Operation(kind="adam", nbytes=100)
    assert at_rows(adam, 8) == adam
