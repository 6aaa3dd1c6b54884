"""Simulated runs against schedules worked out on paper, and against bounds that hold for every one."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.contention import Contention, speeds_of
from penstock.scheduler.cost import CostModel
from penstock.scheduler.curves import Curve
from penstock.scheduler.hardware import Drive, Hardware, Link, Processor, Sharing
from penstock.scheduler.operations import Operation
from penstock.scheduler.program import Enter, Event, Leave, Program
from penstock.scheduler.setting import Ring, Setting
from penstock.scheduler.simulated import Moved
from penstock.scheduler.simulator import Prediction, simulate
from penstock.scheduler.virtualtime import DeadlockError, VirtualLoop, run_virtually

MIB = 2**20


def machine(*, disk: float = 100 * MIB, link: float | None = None, sharing: Sharing | None = None) -> Hardware:
    """Products take a second per 1000 MiB of weights, on either processor; nothing has a latency."""

    def processor(name: str) -> Processor:
        return Processor(
            name=name,
            memory_nbytes=2**40,
            memory=Curve.flat(1e12),
            linear={"float32": Curve.flat(1000 * MIB)},
            attention={"float32": Curve.flat(1e12)},
        )

    return Hardware(
        name="paper",
        cpu=processor("cpu"),
        gpu=processor("gpu") if link else None,
        link=Link(h2d=Curve.flat(link), d2h=Curve.flat(link)) if link else None,
        host_nbytes=2**40,
        drives=(Drive(name="disk", read=Curve.flat(disk), write=Curve.flat(disk)),),
        sharing=sharing or Sharing(),
    )


def program(layers: int, nbytes: float, title: str = "decode") -> Program:
    events: list[Event] = [Enter("")]
    for layer in range(layers):
        product = Operation(kind="linear", nbytes=nbytes)
        events += [Enter(f"layers.{layer}"), product, Leave(f"layers.{layer}")]
    return Program(title=title, tokens=1, events=(*events, Leave("")))


def setting(layers: int, nbytes: int, *, ring: int, kept: tuple[int, ...] = (), back: Ring | None = None) -> Setting:
    return Setting(
        moved={i: Moved(read_nbytes=nbytes, copied_nbytes=nbytes if back else 0) for i in range(layers)},
        front=Ring(permanent=dict.fromkeys(kept, nbytes), slots=ring, slot_nbytes=nbytes),
        back=back,
        uses={f"layers.{i}": (i,) for i in range(layers)},
    )


def run(where: Setting, hardware: Hardware, *, layers: int, calls: int, compute_nbytes: float) -> Prediction:
    return simulate(where, [program(layers, compute_nbytes)] * calls, CostModel(hardware=hardware))


def test_a_drive_that_binds_reads_all_the_time() -> None:
    # 10 layers of 10 MiB at 100 MiB/s: 0.1 s each; computing takes 0.01 s each
    found = run(setting(10, 10 * MIB, ring=3), machine(), layers=10, calls=6, compute_nbytes=10 * MIB)
    assert found.seconds("decode") == pytest.approx(1.0, rel=1e-6)
    assert found.turns[-1].end_ns == found.spans[-1].end_ns


def test_a_drive_is_slower_where_few_requests_are_under_way() -> None:
    """Layers of one request each, in a ring of 2 slots: two are under way, which this drive does at half its rate."""
    drive = Drive(
        name="disk",
        read=Curve.flat(100 * MIB),
        write=Curve.flat(100 * MIB),
        read_depth=Curve(x=(1.0, 2.0, 8.0), y=(25.0 * MIB, 50.0 * MIB, 100.0 * MIB)),
    )
    hardware = msgspec.structs.replace(machine(), drives=(drive,))
    two, nine = (run(setting(12, MIB, ring=n), hardware, layers=12, calls=4, compute_nbytes=1) for n in (2, 9))
    assert two.turns[-1].seconds == pytest.approx(12 / 50, rel=0.05)
    assert nine.turns[-1].seconds == pytest.approx(12 / 100, rel=0.05)


def test_a_processor_that_binds_computes_all_the_time() -> None:
    found = run(setting(10, 10 * MIB, ring=3), machine(disk=1e5 * MIB), layers=10, calls=6, compute_nbytes=100 * MIB)
    assert found.seconds("decode") == pytest.approx(1.0, rel=1e-6)


def test_layers_that_stay_are_not_read() -> None:
    found = run(setting(10, 10 * MIB, ring=3, kept=(0, 2, 4, 6, 8)), machine(), layers=10, calls=6, compute_nbytes=MIB)
    assert found.seconds("decode") == pytest.approx(0.5, rel=1e-6)
    assert found.read_nbytes == 5 * 10 * MIB + 6 * 5 * 10 * MIB  # what stays once; the ring is full when it ends


def test_two_that_share_memory_slow_each_other() -> None:
    sharing = Sharing(compute_while_reading=0.5, read_while_computing=0.8)
    # the disk binds: while a layer computes (0.01 s of work at half speed: 0.02 s) reading goes on at 0.8 of its rate
    found = run(setting(10, 10 * MIB, ring=3), machine(sharing=sharing), layers=10, calls=6, compute_nbytes=10 * MIB)
    assert found.seconds("decode") == pytest.approx(10 * (0.02 + (0.1 - 0.02 * 0.8)), rel=1e-6)


def test_three_tiers_overlap_reads_copies_and_computing() -> None:
    back = Ring(permanent={}, slots=3, slot_nbytes=10 * MIB)
    # read 0.1 s, copy 0.05 s, compute 0.01 s per layer
    found = run(
        setting(10, 10 * MIB, ring=3, back=back), machine(link=200 * MIB), layers=10, calls=6, compute_nbytes=10 * MIB
    )
    assert found.seconds("decode") == pytest.approx(1.0, rel=0.01)
    host = Ring(permanent=dict.fromkeys(range(10), 10 * MIB), slots=2, slot_nbytes=10 * MIB)
    found = run(
        setting(10, 10 * MIB, ring=3, back=host), machine(link=200 * MIB), layers=10, calls=6, compute_nbytes=10 * MIB
    )
    assert found.seconds("decode") == pytest.approx(0.5, rel=0.01)


def test_what_the_cpu_computes_is_not_copied() -> None:
    host = Ring(permanent=dict.fromkeys(range(10), 10 * MIB), slots=2, slot_nbytes=10 * MIB)
    where = setting(10, 10 * MIB, ring=3, back=host)
    alone = Setting(
        moved=where.moved, front=where.front, back=host, uses=where.uses, on_cpu=dict.fromkeys(range(1, 10, 2), 8)
    )
    found = run(alone, machine(link=200 * MIB), layers=10, calls=8, compute_nbytes=10 * MIB)
    assert found.seconds("decode") == pytest.approx(5 * 0.05, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(2, 8),
    ring=st.integers(2, 5),
    disk=st.floats(10, 1000),
    compute=st.floats(0.1, 1000),
    kept=st.sets(st.integers(0, 7), max_size=4),
)
def test_no_run_is_faster_than_its_bound_or_slower_than_one_thing_after_another(
    layers: int, ring: int, disk: float, compute: float, kept: set[int]
) -> None:
    stays = tuple(sorted(block for block in kept if block < layers))
    where = setting(layers, 10 * MIB, ring=ring, kept=stays)
    found = run(where, machine(disk=disk * MIB), layers=layers, calls=5, compute_nbytes=compute * MIB)
    computing = layers * compute / 1000
    # a ring that holds everything that is streamed reads nothing any more, and what it holds is not read again
    reading_most = (layers - len(stays)) * 10 / disk
    held = max(0, layers - len(stays) - ring)
    seconds = found.seconds("decode")
    assert seconds >= computing * (1 - 1e-6)
    assert seconds >= min(held * 10 / disk, reading_most) * (1 - 1e-6) or held == 0
    assert seconds <= (computing + reading_most) * (1 + 1e-6) + 1e-6


def test_simulating_takes_no_time() -> None:
    began = time.perf_counter()
    run(setting(10, 10 * MIB, ring=3), machine(disk=MIB), layers=10, calls=3, compute_nbytes=MIB)  # 300 s
    assert time.perf_counter() - began < 30


def test_activities_go_on_at_the_speed_that_the_others_leave_them() -> None:
    loop = VirtualLoop()
    sharing = Sharing(compute_while_reading=0.5, read_while_computing=0.25)
    ends = {}

    async def do(contention: Contention, kind: str, seconds: float) -> None:
        await contention.work(kind, seconds)  # type: ignore[arg-type]
        ends[kind] = loop.time()

    async def both() -> None:
        contention = Contention(loop, speeds_of(sharing))
        await asyncio.gather(do(contention, "compute", 2.0), do(contention, "read", 4.0))

    run_virtually(loop, both())
    assert ends == {"compute": pytest.approx(4.0), "read": pytest.approx(4.0 + 3.0)}


@pytest.mark.parametrize(
    ("crowded", "ends"), [(True, {"serve": 0.6, "compute": 1.3}), (False, {"serve": 0.3, "compute": 1.0})]
)
def test_what_computes_with_all_cores_waits_for_the_executor(crowded: bool, ends: dict[str, float]) -> None:
    """The two share one core, and threads wait for the last of them: what the executor takes is added."""
    loop = VirtualLoop()
    found = {}

    async def do(contention: Contention, kind: str, seconds: float) -> None:
        await contention.work(kind, seconds)  # type: ignore[arg-type]
        found[kind] = loop.time()

    async def both() -> None:
        contention = Contention(loop, speeds_of(Sharing(), crowded=crowded))
        await asyncio.gather(do(contention, "compute", 1.0), do(contention, "serve", 0.3))

    run_virtually(loop, both())
    assert found == {kind: pytest.approx(at) for kind, at in ends.items()}


@pytest.mark.parametrize(("cores", "threads", "seconds"), [(2, 0, 0.3), (2, 2, 0.3), (4, 2, 0.2), (0, 0, 0.2)])
def test_each_block_that_comes_costs_the_executors_python(cores: int, threads: int, seconds: float) -> None:
    """Ten blocks of which the drive brings one in 5 ms, computed in 20 ms each, 10 ms of the executor for each."""
    paper = machine(disk=2000 * MIB, sharing=Sharing(serve_s=0.01))
    hardware = msgspec.structs.replace(paper, cpu=msgspec.structs.replace(paper.cpu, cores=cores))
    plain = setting(10, 10 * MIB, ring=3)
    found = simulate(plain, [program(10, 20 * MIB)] * 4, CostModel(hardware=hardware, threads=threads))
    assert found.turns[-1].seconds == pytest.approx(seconds, rel=0.02)


def test_what_waits_for_itself_is_an_error_at_once() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(DeadlockError, match=r"at 0\.000000 s"):
        run_virtually(VirtualLoop(), never())


def test_clocks_go_on_where_floats_are_coarse() -> None:
    found = run(setting(6, 10 * MIB, ring=3), machine(disk=0.001 * MIB), layers=6, calls=2, compute_nbytes=MIB)
    assert found.turns[-1].end_ns > 100_000 * 1e9  # more than a day, of which a float of seconds has no picoseconds
    assert found.seconds("decode") == pytest.approx(6 * 10_000, rel=1e-3)


def test_a_cold_run_waits_for_what_the_cpu_computes_to_be_on_the_host() -> None:
    host = Ring(permanent=dict.fromkeys(range(10), 10 * MIB), slots=2, slot_nbytes=10 * MIB)
    plain = setting(10, 10 * MIB, ring=3, back=host)
    where = Setting(
        moved=plain.moved, front=plain.front, back=host, uses=plain.uses, on_cpu=dict.fromkeys(range(10), 8)
    )
    cost = CostModel(hardware=machine(link=200 * MIB))
    cold = simulate(where, [program(10, 10 * MIB)] * 2, cost, started=False)
    # every block is read once at 100 MiB/s before it is computed, and never again
    assert cold.turns[0].seconds == pytest.approx(1.01, rel=0.02)
    assert cold.turns[1].seconds == pytest.approx(0.1, rel=0.02)
    assert cold.read_nbytes == 10 * 10 * MIB
