"""The benchmark of a training step: its subjects compute the same, its record is consistent."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step() -> ModuleType:
    # benchmarks/ is a folder of scripts, not a package. Dataclasses look their module up by name.
    spec = importlib.util.spec_from_file_location("benchmarks_step", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(step: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file, threads = tmp_path_factory.mktemp("step") / "step.json", torch.get_num_threads()
    gc.freeze()  # as the script does; readings of memory collect garbage, and this makes it quick
    step.main(["--quick", "--json", str(file)])
    gc.unfreeze()
    torch.set_num_threads(threads)
    return json.loads(file.read_text(encoding="utf-8"))


def names(step: ModuleType) -> list[str]:
    kinds = ("ours", "cpp", "torch")
    analogue = [step.Subject(kind, size).name for size in (16, 32, 0) for kind in kinds]
    return ["digital", *analogue]


def test_names(step: ModuleType) -> None:
    assert names(step)[1:3] == ["ours, 16 × 16", "aihwkit C++, 16 × 16"]
    assert names(step)[-1] == "aihwkit torch, untiled"
    assert len(set(names(step))) == 10


def test_every_subject_has_times_and_memory(step: ModuleType, result: dict[str, Any]) -> None:
    assert list(result) == ["machine", "settings", "seconds", "ratios", "memory", "growth_kib"]
    assert list(result["seconds"]) == list(result["memory"]) == names(step)
    assert result["settings"]["rounds"] == 2
    for taken in result["seconds"].values():
        assert 0 < taken["q1"] <= taken["median"] <= taken["q3"]
    for entry in result["memory"].values():
        # The peak is the kernel's lagging sum, so it may be a little below what is resident.
        assert 0 < entry["built_mib"] <= entry["peak_mib"] + 4
        assert entry["increase_mib"] > 0
    assert list(result["growth_kib"]) == [
        "digital",
        "ours, 128 × 128",
        "aihwkit pulsed with plain SGD, 128 × 128",
    ]


def test_ratios_are_quotients_of_the_medians_they_name(
    step: ModuleType, result: dict[str, Any]
) -> None:
    assert len(result["ratios"]) == 9
    for name, ratio in result["ratios"].items():
        above, below = ratio["numerator"], ratio["denominator"]
        assert name == f"{above} ÷ {below}"
        medians = result["seconds"][above]["median"], result["seconds"][below]["median"]
        assert ratio["value"] == medians[0] / medians[1]
    found = {(ratio["numerator"], ratio["denominator"]) for ratio in result["ratios"].values()}
    for size in ("16 × 16", "32 × 32", "untiled"):
        assert (f"aihwkit C++, {size}", f"ours, {size}") in found
        assert (f"aihwkit torch, {size}", f"ours, {size}") in found
        assert (f"ours, {size}", "digital") in found


def test_memory_ratios_are_to_the_digital_subject(result: dict[str, Any]) -> None:
    digital = result["memory"]["digital"]
    assert digital["peak_ratio"] == digital["increase_ratio"] == 1.0
    for entry in result["memory"].values():
        assert entry["peak_ratio"] == entry["peak_mib"] / digital["peak_mib"]
        assert entry["increase_ratio"] == entry["increase_mib"] / digital["increase_mib"]


@pytest.mark.parametrize("tile", [16, 32, 0])
@pytest.mark.parametrize("kind", ["ours", "cpp", "torch"])
def test_without_noise_every_subject_trains_as_the_digital_one(
    step: ModuleType, kind: str, tile: int
) -> None:
    work = step.Workload(48, 64, 8, 2, noise_free=True)
    digital = step.build(step.Subject("digital"), work)
    other = step.build(step.Subject(kind, tile), work)
    inputs = digital.batch[0]
    assert torch.equal(inputs, other.batch[0])
    before = digital.model(inputs)
    torch.testing.assert_close(other.model(inputs), before, rtol=0, atol=1e-5)
    losses = [(digital.step(), other.step()) for _ in range(4)]
    assert losses[-1][0] < losses[0][0]
    after = digital.model(inputs)
    assert not torch.allclose(after, before, rtol=0, atol=1e-3)
    torch.testing.assert_close(other.model(inputs), after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["ours", "cpp", "torch"])
def test_with_noise_tiles_differ_and_only_adapters_train(step: ModuleType, kind: str) -> None:
    work = step.Workload(48, 64, 8, 2)
    training = step.build(step.Subject(kind, 16), work)
    inputs = training.batch[0]
    assert not torch.equal(training.model(inputs), training.model(inputs))
    trainable = [name for name, p in training.model.named_parameters() if p.requires_grad]
    assert len(trainable) == 4
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_targets_say_by_how_much_they_are_met_or_missed(step: ModuleType) -> None:
    medians = {"digital": 1.0, "ours": 2.0, "cpp": 7.0, "torch": 5.0}
    seconds = {step.Subject(kind, 128).name: {"median": median} for kind, median in medians.items()}
    memory = {
        step.Subject("ours", 128).name: {"peak_ratio": 1.25, "increase_ratio": 2.5},
        "digital": {"peak_ratio": 1.0, "increase_ratio": 1.0},
    }
    ratios = step.speed_ratios(seconds, [128])
    found = list(step.targets({"ratios": ratios, "memory": memory}))
    assert [(value, margin) for _, value, margin in found] == [
        (3.5, 0.5),
        (2.5, -0.5),
        (1.25, 0.25),
        (2.5, -1.0),
    ]
    assert found[0][0] == "aihwkit C++, 128 × 128 ÷ ours, 128 × 128 ≥ 3.0"


def test_report_names_machine_targets_and_what_was_missed(
    step: ModuleType, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    slow = next(name for name in result["ratios"] if name.startswith("aihwkit torch, 32"))
    ratios = result["ratios"] | {slow: result["ratios"][slow] | {"value": 0.75}}
    step.print_report(result | {"ratios": ratios})
    printed = capsys.readouterr().out
    for word in ("cpu", "cores", "ram_gib", "python", "torch", "aihwkit", "peft", "threads"):
        assert f"{word} {result['machine'][word]}" in printed
    assert f"| {slow} ≥ 1.0 | 0.75 | missed by 0.25 |" in printed
    assert all(f"| {name} |" in printed for name in names(step))


@pytest.mark.slow
def test_a_fresh_process_sees_a_leaking_queue_and_none_in_ours(step: ModuleType) -> None:
    options = Namespace(quick=False, threads=1)
    growth = {
        kind: step.run_task("growth", step.Subject(kind, 128), options)["growth_kib"]
        for kind in ("ours", "pulsed")
    }
    queued = 900 * 2 * 32 * 96 * 4 / 1024
    assert growth["pulsed"] > queued
    assert growth["ours"] < 0.05 * queued


@pytest.mark.slow
def test_it_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, str(FILE), "--quick"], check=True, capture_output=True, text=True
    )
    assert "| ratio of step times | |" in done.stdout
