"""What a reader must know to trust the numbers of a report: foot notes, in words."""

from __future__ import annotations

from collections.abc import Iterator

from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.events import EVENTS, Side
from aihwkit_lora.metering.pricing import Status
from aihwkit_lora.reporting.formatting import format_number
from aihwkit_lora.reporting.records import StageRecord
from aihwkit_lora.reporting.run_report import RunReport

_SIDES = {Side.ANALOG: "analogue", Side.DIGITAL: "digital", Side.MEMORY: "memory"}
_UNCERTAIN = (Status.ASSUMED, Status.DERIVED)


def notes(report: RunReport) -> list[str]:
    """Say how sure the counts and prices of a report are, and what they leave out.

    Args:
        report: A run.
    Returns:
        Sentences, one note each.

    Example:
        >>> empty = RunReport(
        ...     recipe="face_recognition",
        ...     chip="mine",
        ...     seed=0,
        ...     config={},
        ...     environment={},
        ...     arms={},
        ...     ratios=(),
        ... )
        >>> notes(empty)[0]
        'Counts: exact.'
    """
    stages = [stage for arm in report.arms.values() for stage in arm]
    return [
        _levels(stages),
        _prices(report.chip, stages),
        "Ranges in brackets are those of the prices alone, not of the counts.",
        *_unpriced(stages),
        *_interrupted(report),
        *_fingerprints(report),
        f"Simulated in {format_number(sum(stage.wall_s for stage in stages))} s, which says "
        "nothing about the chip.",
    ]


def _levels(stages: list[StageRecord]) -> str:
    total = Counts.sum(stage.counts for stage in stages)
    unsure = []
    for level in Level:
        events = sorted(event for event in total if total.level_of(event) is level)
        if events and level is not Level.EXACT:
            unsure.append(f"{', '.join(events)}: {level}")
    return "Counts: exact" + (f", except {'; '.join(unsure)}." if unsure else ".")


def _prices(chip: str, stages: list[StageRecord]) -> str:
    # Imported here because chips bring aihwkit along, which a report from disk can do without.
    from aihwkit_lora.chips import chips

    if chip not in chips:
        return f"Prices: of '{chip}', a chip that is not registered here; sources not known."
    prices = chips.get(chip).prices
    used = [prices.energy[e] for e in _paid(stages, "energy_by_event") if e in prices.energy]
    used += [prices.latency[e] for e in _paid(stages, "latency_by_event") if e in prices.latency]
    uncertain = sum(quantity.status in _UNCERTAIN for quantity in used)
    return (
        f"Prices: {uncertain} of the {len(used)} used are assumed or derived; their sources: "
        f"aihwkit-lora chips {chip}"
    )


def _paid(stages: list[StageRecord], bill: str) -> set[str]:
    return {event for stage in stages for event in getattr(stage.energy, bill)}


def _unpriced(stages: list[StageRecord]) -> Iterator[str]:
    for what, events in (
        ("Energy", {e for stage in stages for e in stage.energy.unpriced_energy}),
        ("Latency", {e for stage in stages for e in stage.energy.unpriced_latency}),
    ):
        if events:
            yield f"{what} leaves out what the chip has no price for: {_by_side(events)}."


def _by_side(events: set[str]) -> str:
    sides = {
        name: sorted(event for event in events if EVENTS.get(event).side is side)
        for side, name in _SIDES.items()
    }
    return "; ".join(f"{name} ({', '.join(found)})" for name, found in sides.items() if found)


def _interrupted(report: RunReport) -> Iterator[str]:
    for arm, stages in report.arms.items():
        for stage in stages:
            if stage.interrupted:
                yield f"Stage '{stage.name}' of '{arm}' is UNFINISHED: {stage.interrupted}."


def _fingerprints(report: RunReport) -> Iterator[str]:
    for arm, stages in report.arms.items():
        frozen = [stage for stage in stages if stage.fingerprint]
        if len(frozen) < 2:
            continue
        first, last = frozen[0], frozen[-1]
        same = len({stage.fingerprint for stage in frozen}) == 1
        span = f"from '{first.name}' to '{last.name}'"
        if same:
            yield (
                f"Frozen conductances of '{arm}' unchanged {span} (fingerprint "
                f"{first.fingerprint[:12]})."
            )
        else:
            yield (
                f"Frozen conductances of '{arm}' REWRITTEN {span} (fingerprints "
                f"{first.fingerprint[:12]} and {last.fingerprint[:12]})."
            )
