"""Accuracy of face_recognition over seeds: mean and worst. Prints a Markdown table.

Usage: python benchmarks/face_seeds.py [--data olivetti] [--split reference] [--seeds 0 1 2]

Olivetti faces are downloaded once, or read from the folder that AIHWKIT_LORA_DATA names.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from aihwkit_lora.recipes import RECIPES, FaceRecognition, run_recipe
from aihwkit_lora.reporting import RunReport

METRICS = (
    ("learn", "learnt_accuracy", "learnt"),
    ("program", "learnt_accuracy", "programmed"),
    ("forget", "forget_accuracy", "forgotten"),
    ("forget", "retain_accuracy", "kept"),
    ("continue", "new_accuracy", "new, after continuing"),
    ("continue", "retain_accuracy", "kept, after continuing"),
    ("continue", "forget_accuracy", "forgotten, after continuing"),
    ("continue", "adapter_off_forget_accuracy", "forgotten, adapters off"),
    ("restore", "noisy_retain_accuracy", "kept, noisy chip"),
    ("restore", "retain_accuracy", "kept, restored"),
    ("restore", "forget_accuracy", "forgotten, restored"),
)


def main() -> None:
    """Run every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="olivetti")
    parser.add_argument("--split", default="reference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    reports = [_run(options.data, options.split, seed) for seed in options.seeds]
    print(f"\n{options.data}, split {options.split}, seeds {options.seeds}\n")
    for arm in reports[0].arms:
        _print_table(arm, reports)
    pulses = [_pulses_after_programming(report) for report in reports]
    print(f"pulses after programming, hybrid: {pulses}")


def _run(data: str, split: str, seed: int) -> RunReport:
    config = FaceRecognition(data=data, split=split, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        say = lambda text: print(f"seed {seed}, {text}", flush=True)  # noqa: E731
        return run_recipe(RECIPES.get("face_recognition"), config, Path(folder), say=say)


def _print_table(arm: str, reports: list[RunReport]) -> None:
    print(f"| {arm} | mean | worst |\n|---|---|---|")
    for stage, metric, title in METRICS:
        stages = [each for report in reports for each in report.arms[arm] if each.name == stage]
        values = [each.metrics[metric] for each in stages if metric in each.metrics]
        if values:
            worst = max(values) if title.startswith("forgotten") else min(values)
            print(f"| {title} | {100 * statistics.mean(values):.1f} % | {100 * worst:.1f} % |")
    print()


def _pulses_after_programming(report: RunReport) -> int:
    return sum(report.stage("hybrid", stage).pulses for stage in ("forget", "continue"))


if __name__ == "__main__":
    main()
