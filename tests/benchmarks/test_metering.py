"""The benchmark of metering: its ways differ in callbacks only, and its record is consistent."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "metering.py"


@pytest.fixture(scope="module")
def metering() -> ModuleType:
    # benchmarks/ is a folder of scripts, not a package; a script finds its neighbours.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FILE.parent))
        spec = importlib.util.spec_from_file_location("benchmarks_metering", FILE)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def result(metering: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file, threads = tmp_path_factory.mktemp("metering") / "out.json", torch.get_num_threads()
    level = logging.getLogger("pytorch_lightning").level
    metering.main(["--quick", "--json", str(file)])
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(level)
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_way_has_times_on_both_clocks(metering: ModuleType, result: dict[str, Any]) -> None:
    assert list(result) == ["machine", "settings", "ways"]
    assert list(result["ways"]) == ["16 × 16", "rm-180nm"]
    for ways in result["ways"].values():
        assert set(ways) == set(metering.WAYS)
        for clocks in ways.values():
            assert list(clocks) == ["wall", "cpu"]
            for found in clocks.values():
                assert found["median_s"] > 0
                assert 0 < found["q1"] <= found["ratio"] <= found["q3"]
        assert ways[metering.BARE]["cpu"]["ratio"] == 1.0


def test_ratios_are_medians_over_rounds_of_neighbours_in_time(metering: ModuleType) -> None:
    seconds = {
        metering.BARE: {"cpu": [1.0, 2.0, 4.0]},
        metering.BOTH: {"cpu": [2.0, 3.0, 5.0]},
    }
    found = metering.summary(seconds)[metering.BOTH]["cpu"]
    assert found == {"median_s": 3.0, "ratio": 1.5, "q1": 1.375, "q3": 1.75}


def test_a_clock_leaves_the_first_steps_out(metering: ModuleType) -> None:
    clock = metering.Clock()
    clock.starts["cpu"] = [0.0, 50.0, 90.0, 91.0, 93.0, 96.0]
    assert clock.median("cpu") == 2.0


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("tiles", ["16 × 16", "rm-180nm"])
def test_ways_train_alike_and_leave_nothing_behind(
    metering: ModuleType, tmp_path: Path, tiles: str
) -> None:
    trained, work = {}, metering.QUICK_WORK
    for way, callbacks in metering.WAYS.items():
        model = metering.for_chip(work) if tiles == "rm-180nm" else metering.tiled(16, work)
        trainee, ledger = metering.Trainee(model, work), metering.al.Ledger()
        torch.manual_seed(3)
        metering.fit(trainee, callbacks(ledger), tmp_path / way, steps=3)
        trained[way] = torch.cat([p.detach().flatten() for p in trainee.parameters()])
        counted = ledger.total()["tile_reads"]
        assert (counted > 0) == (way in ("EnergyMeter", metering.BOTH))
        assert not any(module._forward_hooks for module in trainee.modules())
        assert not any(
            layer.analog_module.probes for _, layer in metering.al.frozen_layers(trainee)
        )
    assert all(torch.equal(found, trained[metering.BARE]) for found in trained.values())


def test_report_says_what_was_met_and_by_how_much_not(
    metering: ModuleType, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"cpu": {"median_s": 0.1, "ratio": 1.25, "q1": 1.2, "q3": 1.3}}
    met = {"cpu": both["cpu"] | {"ratio": 1.03}}
    ways = {"128 × 128": {metering.BOTH: both}, "512 × 512": {metering.BOTH: met}}
    metering.print_report(result | {"ways": ways})
    printed = capsys.readouterr().out
    assert (
        "| 128 × 128: both meters ÷ bare, processor, ≤ 1.03 | 1.250 | missed by 0.220 |" in printed
    )
    assert "| 512 × 512: both meters ÷ bare, processor, ≤ 1.03 | 1.030 | met |" in printed
    assert "| 128 × 128 | both meters | 100.0 | 1.250 | 1.200 – 1.300 |" in printed
