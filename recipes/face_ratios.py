"""Named ratios between the arms of a run: what is above the line, what below, what is included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Counts
from aihwkit_lora.reporting import Ratio, StageRecord, energy_ratio

_ADAPTER_BITS = 16
_UPDATES = ("set_pulses", "reset_pulses", "verify_reads", "optimizer_updates")
_ADAPTATIONS = ("forget", "continue")


def ratios(arms: Mapping[str, Sequence[StageRecord]], chip: Chip) -> tuple[Ratio, ...]:
    """Compare the arms of a run.

    Args:
        arms: Stages by arm; without the arm ``"reprogram"`` only deployment is compared.
        chip: Whose prices to take.
    """
    hybrid = {stage.name: stage for stage in arms["hybrid"]}
    found = [_deployment(hybrid, chip)]
    if "reprogram" in arms:
        full = {stage.name: stage for stage in arms["reprogram"]}
        found += [_parameters(hybrid, full), _adaptation(hybrid, full, chip)]
        found += [_per_image(hybrid, full, chip), _update(hybrid, full, chip)]
    return tuple(found)


def _deployment(hybrid: Mapping[str, StageRecord], chip: Chip) -> Ratio:
    adapter = hybrid["forget"].trainable_parameters
    return energy_ratio(
        "deployment energy",
        hybrid["program"].counts,
        Counts({"sram_write_bits": _ADAPTER_BITS * adapter}),
        chip,
        above="programming all weights once, as counted",
        below=f"writing the forgetting adapter to SRAM, {adapter} × {_ADAPTER_BITS} bit",
        includes="pulses and verify reads; SRAM writes; no transfer from off the chip",
    )


def _parameters(hybrid: Mapping[str, StageRecord], full: Mapping[str, StageRecord]) -> Ratio:
    above, below = full["forget"].trainable_parameters, hybrid["forget"].trainable_parameters
    value = above / below
    return Ratio(
        name="trainable parameters",
        value=value,
        low=value,
        high=value,
        numerator=f"reprogram, forget: {above}",
        denominator=f"hybrid, forget: {below}",
        includes="everything that gets a gradient",
    )


def _adaptation(
    hybrid: Mapping[str, StageRecord], full: Mapping[str, StageRecord], chip: Chip
) -> Ratio:
    return energy_ratio(
        "adaptation energy",
        _adaptations(full),
        _adaptations(hybrid),
        chip,
        above=f"reprogram, forget and continue, {_steps(full)} steps",
        below=f"hybrid, forget and continue, {_steps(hybrid)} steps",
        includes="array reads both ways, digital MACs, optimiser, pulses, verify reads; each arm "
        "with its own schedule",
    )


def _per_image(
    hybrid: Mapping[str, StageRecord], full: Mapping[str, StageRecord], chip: Chip
) -> Ratio:
    # An image takes the same array cycles in both arms, so they stand for images.
    above, below = _adaptations(full), _adaptations(hybrid)
    return energy_ratio(
        "adaptation energy per image",
        above.scaled(below["array_cycles"]),
        below.scaled(above["array_cycles"]),
        chip,
        above="reprogram, forget and continue, per training image",
        below="hybrid, forget and continue, per training image",
        includes="the same, with both schedules divided out",
    )


def _update(
    hybrid: Mapping[str, StageRecord], full: Mapping[str, StageRecord], chip: Chip
) -> Ratio:
    # Scaling both sides by the other's number of steps divides each by its own, in whole numbers.
    return energy_ratio(
        "update energy per step",
        _updates(full).scaled(_steps(hybrid)),
        _updates(hybrid).scaled(_steps(full)),
        chip,
        above="reprogram: optimiser and write–verify",
        below="hybrid: optimiser",
        includes="forget and continue; no forward or backward pass",
    )


def _adaptations(arm: Mapping[str, StageRecord]) -> Counts:
    return Counts.sum(arm[name].counts for name in _ADAPTATIONS)


def _updates(arm: Mapping[str, StageRecord]) -> Counts:
    return _adaptations(arm).only(_UPDATES)


def _steps(arm: Mapping[str, StageRecord]) -> int:
    return sum(len(arm[name].steps) for name in _ADAPTATIONS)
