"""Named ratios between the arms of the image recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Counts
from aihwkit_lora.reporting import (
    Case,
    Ratio,
    StageRecord,
    deployment_energy_ratio,
    parameter_ratio,
    training_energy_ratio,
)

_ADAPTER_BITS = 16
_ADAPTATIONS = ("forget", "continue")

_Stages = Mapping[str, StageRecord]


def ratios(arms: Mapping[str, Sequence[StageRecord]], chip: Chip) -> tuple[Ratio, ...]:
    """Compare the arms of a run.

    Args:
        arms: Stages by arm; without baselines only deployment is compared.
        chip: Whose prices to take.
    """
    stages = {arm: {stage.name: stage for stage in found} for arm, found in arms.items()}
    hybrid = stages["hybrid"]
    found = [_deployment(hybrid, chip)]
    if "deploy_once" in stages:
        full = stages["deploy_once"]
        trained = (arm["forget"].trainable_parameters for arm in (full, hybrid))
        found.append(parameter_ratio(*trained))
    for arm in ("deploy_once", "digital"):
        if arm in stages:
            cases = _adaptation(arm, stages[arm], chip), _adaptation("hybrid", hybrid, chip)
            found.append(training_energy_ratio(*cases))
    return tuple(found)


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
        detail="forget and continue",
        counts=Counts.sum(stages[name].counts for name in _ADAPTATIONS),
        chip=chip,
    )
