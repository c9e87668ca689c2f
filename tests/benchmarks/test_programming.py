"""The benchmark of programming: each subject programs what it says, its record is consistent."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from aihwkit.simulator.configs.devices import ConstantStepDevice

FILE = Path(__file__).parents[2] / "benchmarks" / "programming.py"
WAYS = [
    "write_verify, 3 × 1000",
    "write_verify, 8 × 8",
    "aihwkit, 2 iterations, 8 × 8",
    "aihwkit, 5 iterations, 8 × 8",
]


@pytest.fixture(scope="module")
def programming() -> ModuleType:
    # benchmarks/ is a folder of scripts, not a package. Dataclasses look their module up by name.
    spec = importlib.util.spec_from_file_location("benchmarks_programming", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(programming: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file, threads = tmp_path_factory.mktemp("programming") / "p.json", torch.get_num_threads()
    programming.main(["--quick", "--json", str(file)])
    torch.set_num_threads(threads)
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_device_has_every_subject(programming: ModuleType, result: dict[str, Any]) -> None:
    assert list(result) == ["machine", "settings", "devices"]
    assert list(result["devices"]) == list(programming.DEVICES)
    for of in result["devices"].values():
        assert list(of["subjects"]) == WAYS
        for name, entry in of["subjects"].items():
            assert entry["cells"] == (3000 if "1000" in name else 64)
            assert 0 <= entry["cells_in_tolerance"] <= entry["cells"]
            seconds = entry["seconds"]
            assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
            assert entry["cells_per_second"] == entry["cells"] / seconds["median"]
            assert (entry["pulses_per_cell"] is None) == name.startswith("aihwkit")
        assert of["memory"]["peak_mib"] >= of["memory"]["imports_mib"] - 4  # kernel's lagging sum


def test_ratios_are_quotients_of_the_speeds_they_name(result: dict[str, Any]) -> None:
    for of in result["devices"].values():
        found = {(r["numerator"], r["denominator"], r["measure"]): r["value"] for r in of["ratios"]}
        assert len(found) == len(of["ratios"]) == 2 * 2 * 2
        for (above, below, quantity), value in found.items():
            assert above.startswith("write_verify")
            assert below.startswith("aihwkit")
            assert value == of["subjects"][above][quantity] / of["subjects"][below][quantity]


@pytest.mark.parametrize("iterations", [0, 500])
def test_both_ways_program_an_ideal_array(programming: ModuleType, iterations: int) -> None:
    device = ConstantStepDevice(dw_min=0.01, w_max=1.0, w_max_dtod=0.0, w_min=-1.0, w_min_dtod=0.0)
    done = programming.program(programming.Subject((6, 7), iterations), device, 0.1, seed=0)
    assert done.seconds > 0
    assert done.in_tolerance == 42
    assert (done.pulses is None) == bool(iterations)


def test_the_large_array_has_the_cells_that_were_asked_for(programming: ModuleType) -> None:
    assert programming.large(1_000_000) == (1000, 1000)
    assert programming.large(3000) == (3, 1000)
    assert programming.large(20) == (1, 20)


def test_targets_say_by_how_much_they_are_met_or_missed(programming: ModuleType) -> None:
    name = "write_verify, 1000 × 1000"
    of = {"subjects": {name: {"seconds": {"median": 1.5}}}, "memory": {"increase_mib": 1124.0}}
    devices = dict.fromkeys(programming.TARGET_DEVICES, of)
    found = list(programming.met({"settings": {"cells": 1_000_000}, "devices": devices}))
    assert [(value, margin) for _, value, margin in found] == 2 * [(1.5, 3.5), (1124.0, -100.0)]
    assert found[0][0] == f"OM ReRAM array: {name} ≤ 5.0 s"
    assert not list(programming.met({"settings": {"cells": 999}, "devices": devices}))


def test_report_names_machine_subjects_and_ratios(
    programming: ModuleType, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    programming.print_report(result)
    printed = capsys.readouterr().out
    for word in ("cpu", "cores", "ram_gib", "python", "torch", "aihwkit", "threads"):
        assert f"{word} {result['machine'][word]}" in printed
    for device, of in result["devices"].items():
        assert f"## {device}\n" in printed
        near = of["subjects"][WAYS[0]]["cells_in_tolerance"]
        assert f" {near:,.0f} ({near / 30:.1f} %) |" in printed
    assert all(printed.count(f"| {name} |") == len(result["devices"]) for name in WAYS)
    assert f"| {WAYS[1]} ÷ {WAYS[3]} |" in printed


@pytest.mark.slow
def test_a_fresh_process_measures_the_memory_of_programming(programming: ModuleType) -> None:
    arguments = ["--memory-of", "OM ReRAM array", "--cells", "1000000"]
    done = subprocess.run(
        [sys.executable, str(FILE), *arguments], check=True, capture_output=True, text=True
    )
    increase = json.loads(done.stdout)["increase_mib"]
    assert 20 < increase <= programming.MEMORY_TARGET_MIB
