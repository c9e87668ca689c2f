"""Named ratios between the arms of a run: what is above the line, what below, what is included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Counts
from aihwkit_lora.reporting import (
    Case,
    Ratio,
    StageRecord,
    deployment_energy_ratio,
    parameter_ratio,
    training_energy_ratio,
    update_count_ratio,
    update_energy_ratio,
)

_ADAPTER_BITS = 16
_ADAPTATIONS = ("forget", "continue")

_Stages = Mapping[str, StageRecord]

# Of training in place only pulses are counted. They are all that its updates take, but not all
# that its training takes, so its training has no ratio.
_COMPARED: Mapping[str, Sequence[Callable[[Case, Case], Ratio]]] = {
    "deploy_once": (update_energy_ratio, training_energy_ratio),
    "digital": (training_energy_ratio,),
    "in_situ": (update_energy_ratio,),
}


def ratios(
    arms: Mapping[str, Sequence[StageRecord]], chip: Chip, *, sample: str = "image"
) -> tuple[Ratio, ...]:
    """Compare the arms of a run.

    Args:
        arms: Stages by arm; without baselines only deployment is compared.
        chip: Whose prices to take.
        sample: What the recipe calls one input.
    """
    stages = {arm: {stage.name: stage for stage in found} for arm, found in arms.items()}
    hybrid = stages["hybrid"]
    found = [_deployment(hybrid, chip)]
    full = stages.get("reprogram", stages.get("deploy_once"))
    if full is not None:
        found.append(
            parameter_ratio(*(arm["forget"].trainable_parameters for arm in (full, hybrid)))
        )
    if "reprogram" in stages:
        found += _reprogramming(stages["reprogram"], hybrid, chip, sample)
    for arm in ("deploy_once", "digital", "in_situ"):
        if arm in stages:
            cases = _adaptation(arm, stages[arm], chip), _adaptation("hybrid", hybrid, chip)
            found += [compare(*cases) for compare in _COMPARED[arm]]
    return tuple(found)


def _reprogramming(full: _Stages, hybrid: _Stages, chip: Chip, sample: str) -> list[Ratio]:
    above, below = _adaptation("reprogram", full, chip), _adaptation("hybrid", hybrid, chip)
    # A sample takes the same array cycles in both arms, so they stand for samples.
    samples = [case.counts["array_cycles"] for case in (above, below)]
    steps = [_steps(stages) for stages in (full, hybrid)]
    return [
        update_count_ratio(above, below),
        update_energy_ratio(*_each("step", above, below, steps)),
        training_energy_ratio(*_each(sample, above, below, samples)),
        training_energy_ratio(above, below),
    ]


def _deployment(hybrid: _Stages, chip: Chip) -> Ratio:
    adapter = hybrid["forget"].trainable_parameters
    written = Case(
        name="all weights", detail="as counted", counts=hybrid["program"].counts, chip=chip
    )
    loaded = Case(
        name="adapter",
        detail=f"of forgetting, {adapter:,} × {_ADAPTER_BITS} bit",
        counts=Counts({"sram_write_bits": _ADAPTER_BITS * adapter}),
        chip=chip,
    )
    return deployment_energy_ratio(written, loaded)


def _adaptation(arm: str, stages: _Stages, chip: Chip) -> Case:
    return Case(
        name=arm,
        detail=f"forget and continue, {_steps(stages):,} steps",
        counts=Counts.sum(stages[name].counts for name in _ADAPTATIONS),
        chip=chip,
    )


def _steps(stages: _Stages) -> int:
    return sum(len(stages[name].steps) for name in _ADAPTATIONS)


def _each(what: str, above: Case, below: Case, numbers: Sequence[int]) -> tuple[Case, Case]:
    """Both cases per step or per sample, with their schedules divided out."""
    # Scaling both by the other's number divides each by its own, in whole numbers.
    first, second = (
        replace(case, name=f"{case.name} per {what}", counts=case.counts.scaled(other))
        for case, other in zip((above, below), reversed(numbers), strict=True)
    )
    return first, second
