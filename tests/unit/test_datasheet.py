from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.hardware import load, names
from penstock.memory.errors import UsageError
from penstock.scheduler.curves import Curve
from penstock.scheduler.datasheet import parse_hardware, read_hardware, roofline

PLAIN: dict[str, Any] = {
    "name": "box",
    "gpu": {"name": "G", "memory_gb": 24, "bandwidth_gb_per_s": 1000, "tflops": {"float16": 100}},
    "link": {"h2d_gb_per_s": 25},
    "cpu": {"name": "C", "cores": 8, "memory_gb": 64, "bandwidth_gb_per_s": 80, "tflops": {"float32": 1}},
    "drives": [{"name": "D", "count": 2, "read_gb_per_s": 7, "write_gb_per_s": 5}],
    "price_usd": 3000,
}


def parse(data: Any) -> Any:
    return parse_hardware(json.dumps(data), where="box.json")


def changed(way: str, value: Any) -> dict[str, Any]:
    """PLAIN with one place changed; None takes it out."""
    data = copy.deepcopy(PLAIN)
    place: Any = data
    *before, last = (int(each) if each.isdecimal() else each for each in way.split("."))
    for each in before:
        place = place[each]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return data


def test_a_machine() -> None:
    machine = parse(PLAIN)
    assert machine.gpu.memory_nbytes == 24e9
    assert machine.link.h2d.best == machine.link.d2h.best == 25e9
    assert machine.disk_read == 14e9
    assert machine.drives[0].name == "2 × D"
    assert machine.host_nbytes == 64e9
    assert machine.price_usd == 3000


@pytest.mark.parametrize("name", names())
def test_shipped_machines_are_whole_and_say_where_their_figures_are_from(name: str) -> None:
    machine = load(name)
    assert len(machine.sources) >= 2
    assert machine.price_usd
    assert machine.disk_read > machine.disk_write > 0 or machine.disk_read == machine.disk_write
    assert machine.cpu.cores
    if machine.gpu is not None:
        few, many = machine.gpu.linear_rate("float16", 1), machine.gpu.linear_rate("float16", 1e6)
        assert few / machine.gpu.memory.best == pytest.approx(1)
        assert many < few / 100


def test_there_are_a_dozen() -> None:
    assert len(names()) >= 12


def test_an_unknown_machine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'nosuch' is no file .*t4-gcp"):
        load("nosuch")


def test_a_roofline_is_memory_then_arithmetic() -> None:
    curve = roofline(1e12, Curve.flat(1e14), 2)
    assert curve.at(1) == pytest.approx(1e12)
    assert curve.at(99) == pytest.approx(1e12)
    assert curve.at(1e4) == pytest.approx(1e14 * 2 / (2 * 1e4))


def test_rates_by_rows() -> None:
    machine = parse(changed("gpu.tflops.float16", {"at": [64, 1024], "rate": [10, 100]}))
    curve = machine.gpu.linear["float16"]
    assert curve.at(1) == pytest.approx(1e12)
    assert curve.at(64) == pytest.approx(1e13 / 64)
    assert curve.at(1024) == pytest.approx(1e14 / 1024)


def test_what_calibrate_writes_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_bytes(msgspec.json.encode(parse(PLAIN)))
    assert read_hardware(file) == parse(PLAIN)


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        ("cpu", None, r"box.json: cpu is missing"),
        ("cpu.memory_gb", None, r"cpu.memory_gb is missing"),
        ("link", None, r"link is missing"),
        ("gpu.memory_gb", 10**400, r"gpu.memory_gb is 1000"),
        ("gpu.memory_gb", float("nan"), r"gpu.memory_gb is nan"),
        ("name", "", r"name is '': write a text"),
        ("link.h2d_gb_per_s", -3, r"link.h2d_gb_per_s is -3: write a number from 0.1 to 2000 GB/s"),
        ("link.h2d_gb_per_s", 1e12, r"link.h2d_gb_per_s .*from 0.1 to 2000 GB/s.*was it in bytes\?"),
        ("gpu.memory_gb", 25769803776, r"gpu.memory_gb .*was it in bytes\?"),
        ("gpu.tflops.float16", "fast", r"gpu.tflops.float16 is 'fast': write a number"),
        ("gpu.tflops.float17", 3, r"float17"),
        ("gpu.tflops", {}, r"gpu.tflops is \{\}: write at least"),
        ("drives.0.read_gb_per_s", True, r"drives\[0\].read_gb_per_s is True"),
        ("drives.0.count", 1.5, r"drives\[0\].count is 1.5: write a whole number"),
        ("drives", {"name": "D"}, r"drives is .*write a list of objects"),
        ("cpu", 3, r"cpu is 3: an object is needed"),
        ("cpu.bandwidth_gb_per_s", {"at": [2, 1], "rate": [1, 2]}, r"cpu.bandwidth_gb_per_s.at .*ascending"),
        ("cpu.bandwidth_gb_per_s", {"at": [1], "rate": []}, r"at and rate as lists of the same length"),
        ("drives.0.red_gb_per_s", 3, r"red_gb_per_s is not known: did you mean read_gb_per_s\?"),
        ("sources", "a book", r"sources is 'a book': write a list of texts"),
    ],
)
def test_errors_name_the_key_the_value_and_what_to_write(way: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(changed(way, value))


def test_files_that_are_no_hardware_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_hardware(tmp_path / "none.json")
    with pytest.raises(UsageError, match="is not JSON"):
        parse_hardware("{", where="x")
    with pytest.raises(UsageError, match="holds a list"):
        parse_hardware("[]", where="x")
    with pytest.raises(UsageError, match="no calibration of this version"):
        parse_hardware('{"host_nbytes": 3}', where="x")


def test_what_calibrate_keeps_is_a_machine_too() -> None:
    made = parse(PLAIN)
    kept = msgspec.json.encode({"device": "cpu", "hardware": msgspec.to_builtins(made), "notes": []}).decode()
    assert parse_hardware(kept, where="445-cpu.json") == made
