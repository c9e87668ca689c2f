"""What is logged of a training step: one table of keys, and pure functions that fill it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.events import EVENTS, Part, Side
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.pricing import Priced, best_values, unpriced_events
from aihwkit_lora.tiles.freeze import frozen_layers
from aihwkit_lora.tiles.layers import FrozenLayer
from aihwkit_lora.tiles.record import Cells


@dataclass(frozen=True, kw_only=True)
class Logged:
    """A value of a training step.

    Args:
        key: Name in loggers.
        unit: SI unit, or what is counted.
        meaning: What the number is.
        source: Which callback logs it.
    """

    key: str
    unit: str
    meaning: str
    source: str


_OF_PART = {
    Part.WRITE: "writing arrays: pulses, verification, selecting rows",
    Part.FORWARD: "forward passes",
    Part.BACKWARD: "backward passes",
    Part.OPTIMIZER: "optimiser updates",
    Part.TRANSFER: "bits on their way in and out of memory",
}
_ON_SIDE = {
    Side.ANALOG: "in and around the arrays",
    Side.DIGITAL: "in the digital unit",
    Side.MEMORY: "in SRAM and off-chip memory",
}
_MEANINGS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "PulseCounter, EnergyMeter": (
        ("optimizer_steps", "steps", "optimiser steps that the row adds up"),
    ),
    "PulseCounter": (
        ("pulses", "pulses", "SET and RESET pulses"),
        ("set_pulses", "pulses", "SET pulses"),
        ("reset_pulses", "pulses", "RESET pulses"),
        ("verify_reads", "reads", "cells read by verifications; n-fold averaging counts n"),
        ("pulsed_cells", "cells", "cells that took a pulse, summed over write–verify calls"),
        ("failed_cells", "cells", "cells left off their target, summed over write–verify calls"),
        ("pulses_total", "pulses", "SET and RESET pulses of the whole ledger, all phases"),
        ("most_worn", "pulses", "what the most worn frozen cell has taken so far, if known"),
    ),
    "EnergyMeter": (
        ("energy_j", "J", "energy of the step"),
        *((f"energy_j/{part}", "J", f"of it, {of}") for part, of in _OF_PART.items()),
        *((f"energy_j/{side}", "J", f"of it, {on}") for side, on in _ON_SIDE.items()),
        ("latency_s", "s", "time of the step, if nothing overlaps across layers"),
        *((f"latency_s/{part}", "s", f"of it, {of}") for part, of in _OF_PART.items()),
        ("energy_total_j", "J", "energy of the whole ledger, all phases, validation included"),
        ("unpriced_events", "kinds", "kinds of events in the step that have no price; above 0, "
         "energy or time is a lower bound"),
        ("energy_uj", "µJ", "energy of the step; in the progress bar only"),
    ),
}  # fmt: skip

LOGGED: tuple[Logged, ...] = tuple(
    Logged(key=key, unit=unit, meaning=meaning, source=source)
    for source, rows in _MEANINGS.items()
    for key, unit, meaning in rows
)
"""Everything that is logged of a step, in order."""


def key_table() -> str:
    """Write the table of keys in Markdown, as the documentation has it.

    Example:
        >>> print(key_table().splitlines()[3])
        | `pulses` | pulses | SET and RESET pulses | PulseCounter |
    """
    rows = (
        f"| `{value.key}` | {value.unit} | {value.meaning} | {value.source} |" for value in LOGGED
    )
    return "\n".join(("| key | unit | meaning | logged by |", "|---|---|---|---|", *rows)) + "\n"


def writes(counts: Counts) -> Counts:
    """Leave out all that is not part of writing arrays.

    Args:
        counts: What happened.

    Example:
        >>> dict(writes(Counts({"set_pulses": 2, "tile_reads": 3})))
        {'set_pulses': 2}
    """
    return counts.only(event for event in counts if EVENTS.get(event).part is Part.WRITE)


def of_phase(ledger: Ledger, phase: str, total: Counts | None = None) -> Counts:
    """What belongs to a phase of training: all of its own, and writing arrays under any phase.

    Args:
        ledger: The record of the run.
        phase: Name of the phase.
        total: Total of the ledger, where somebody has it already.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(Counts({"set_pulses": 2, "tile_reads": 3}), phase="program", layer="fc")
        >>> ledger.add(Counts({"tile_reads": 5}), phase="train", layer="fc")
        >>> dict(of_phase(ledger, "train"))
        {'set_pulses': 2, 'tile_reads': 5}
    """
    own = ledger.total(phase=phase)
    reads = own.only(event for event in own if EVENTS.get(event).part is not Part.WRITE)
    return writes(ledger.total() if total is None else total) + reads


def pulse_values(
    step: Counts, total: Counts, *, optimizer_steps: int = 1, most_worn: int | None = None
) -> dict[str, float]:
    """Values of a step that are about writing arrays.

    Args:
        step: What the step added.
        total: The whole ledger.
        optimizer_steps: Optimiser steps that ``step`` adds up, at least 1.
        most_worn: Pulses that the most worn frozen cell has taken; None if unknown.
    Returns:
        Values by key, in the order of :data:`LOGGED`. Floats, as loggers want them: counts of
        2⁵³ and more are rounded.

    Example:
        >>> step, total = Counts({"set_pulses": 3, "reset_pulses": 1}), Counts({"set_pulses": 9})
        >>> values = pulse_values(step, total)
        >>> values["pulses"], values["pulses_total"], "most_worn" in values
        (4.0, 9.0, False)
    """
    counted = ("set_pulses", "reset_pulses", "verify_reads", "pulsed_cells", "failed_cells")
    values = {
        "optimizer_steps": float(optimizer_steps),
        "pulses": float(step.pulses),
        **{event: float(step[event]) for event in counted},
        "pulses_total": float(total.pulses),
    }
    return values if most_worn is None else values | {"most_worn": float(most_worn)}


def energy_values(
    step: Counts, total: Counts, chip: Priced, *, optimizer_steps: int = 1
) -> dict[str, float]:
    """Values of a step that are about energy and time.

    Args:
        step: What the step added.
        total: The whole ledger.
        chip: Whose prices to use.
        optimizer_steps: Optimiser steps that ``step`` adds up, at least 1.
    Returns:
        Values by key, in the order of :data:`LOGGED`, without ``energy_uj``.

    Example:
        >>> from aihwkit_lora import chips
        >>> step = Counts({"set_pulses": 2})
        >>> values = energy_values(step, step, chips.get("rm-180nm"))
        >>> values["energy_j"] == values["energy_j/write"] == values["energy_j/analog"] > 0
        True
    """
    energy = best_values(step, chip.prices.energy)
    latency = best_values(step, chip.prices.latency)
    return {
        "optimizer_steps": float(optimizer_steps),
        "energy_j": float(sum(energy.values())),
        **_by_part("energy_j", energy),
        **_by_side("energy_j", energy),
        "latency_s": float(sum(latency.values())),
        **_by_part("latency_s", latency),
        "energy_total_j": float(sum(best_values(total, chip.prices.energy).values())),
        "unpriced_events": float(len(unpriced_events(step, chip))),
    }


def _by_part(what: str, bill: Mapping[str, float]) -> dict[str, float]:
    sums = dict.fromkeys(Part, 0.0)
    for event, cost in bill.items():
        sums[EVENTS.get(event).part] += cost
    return {f"{what}/{part}": value for part, value in sums.items()}


def _by_side(what: str, bill: Mapping[str, float]) -> dict[str, float]:
    sums = dict.fromkeys(Side, 0.0)
    for event, cost in bill.items():
        sums[EVENTS.get(event).side] += cost
    return {f"{what}/{side}": value for side, value in sums.items()}


class Wear:
    """Finds the most worn frozen cell of a model, and looks again only at arrays written since.

    Args:
        model: A model; its frozen layers are found once.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> report = al.program_(model, chip, seed=0)
        >>> Wear(al.freeze_(model)).most() == report.layers[0].most_worn > 0
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[FrozenLayer] = [layer for _, layer in frozen_layers(model)]
        self._seen: list[tuple[Cells, ...]] = [()] * len(self._layers)
        self._worst: list[int | None] = [None] * len(self._layers)

    def most(self) -> int | None:
        """Pulses that the most worn cell has taken; None if no frozen layer knows its cells."""
        for index, layer in enumerate(self._layers):
            cells = layer.analog_module.programming.cells
            if cells is not self._seen[index]:  # every writing makes new records
                self._seen[index] = cells
                self._worst[index] = max((int(tile.wear.max()) for tile in cells), default=None)
        return max((worst for worst in self._worst if worst is not None), default=None)
