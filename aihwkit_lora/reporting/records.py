"""What is written down while a recipe runs: steps, stages and ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.pricing import EnergyReport


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimiser step of a stage.

    Args:
        step: Counted from 1 within its stage.
        energy_j: Energy of this step, in joules.
        pulses: SET and RESET pulses of this step.
        metrics: Metrics by name, if they were evaluated after this step.
    Raises:
        ConfigurationError: A number is negative or not finite, or the step is below 1.

    Example:
        >>> StepRecord(step=1, energy_j=2e-9, pulses=0, metrics={"retain_accuracy": 0.95}).pulses
        0
    """

    step: int
    energy_j: float
    pulses: int
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        where = f"step {self.step}"
        _require(where, "step", self.step, 1)
        _require(where, "energy_j", self.energy_j)
        _require(where, "pulses", self.pulses)
        object.__setattr__(self, "metrics", _finite(where, self.metrics))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> StepRecord:
        """Undo :meth:`to_dict`.

        Args:
            stored: What :meth:`to_dict` gave.
        """
        return cls(**{key: stored[key] for key in ("step", "energy_j", "pulses", "metrics")})


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of one arm of a run, such as ``forget``: what came out and what it took.

    Args:
        name: Of the stage: ``learn``, ``program``, ``forget``, ``continue``, …
        metrics: Metrics at the end of the stage; accuracies are fractions. What does not exist
            yet, such as the accuracy on a class still to come, is absent.
        counts: What happened in this stage.
        energy: What that cost.
        trainable_parameters: Scalars that the optimiser of this stage could change.
        fingerprint: Of the conductances at the end of the stage; empty while they are not frozen.
        steps: The optimiser steps, in order; none for a stage without training.
        wall_s: Time that the simulation took, in seconds. Says nothing about the chip.
        interrupted: What ended the stage before it was finished; empty if nothing did.
    Raises:
        ConfigurationError: A number is negative or not finite.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.metering import price
        >>> counts = Counts({"set_pulses": 40}, level=Level.SIMULATED)
        >>> stage = StageRecord(
        ...     name="program",
        ...     metrics={"learnt_accuracy": 0.97},
        ...     counts=counts,
        ...     energy=price(counts, chips.get("rm-180nm")),
        ...     trainable_parameters=0,
        ...     fingerprint="",
        ...     wall_s=0.5,
        ... )
        >>> stage.to_dict()["counts"], StageRecord.from_dict(stage.to_dict()) == stage
        ({'set_pulses': 40}, True)
    """

    name: str
    metrics: Mapping[str, float]
    counts: Counts
    energy: EnergyReport
    trainable_parameters: int
    fingerprint: str
    steps: tuple[StepRecord, ...] = ()
    wall_s: float
    interrupted: str = ""

    def __post_init__(self) -> None:
        where = f"stage '{self.name}'"
        _require(where, "trainable_parameters", self.trainable_parameters)
        _require(where, "wall_s", self.wall_s)
        object.__setattr__(self, "metrics", _finite(where, self.metrics))
        object.__setattr__(self, "steps", tuple(self.steps))

    @property
    def pulses(self) -> int:
        """SET and RESET pulses of the stage."""
        return self.counts.pulses

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        events = sorted(self.counts)
        energy = self.energy
        stored = {
            "name": self.name,
            "metrics": dict(self.metrics),
            "counts": {event: self.counts[event] for event in events},
            "levels": {event: str(self.counts.level_of(event)) for event in events},
            "level": str(self.counts.level),
            "chip": energy.chip,
            "energy_j": energy.energy_j.to_dict(),
            "latency_s": energy.latency_s.to_dict(),
            "energy_by_event": {k: v.to_dict() for k, v in energy.energy_by_event.items()},
            "latency_by_event": {k: v.to_dict() for k, v in energy.latency_by_event.items()},
            "unpriced_energy": list(energy.unpriced_energy),
            "unpriced_latency": list(energy.unpriced_latency),
            "trainable_parameters": self.trainable_parameters,
            "fingerprint": self.fingerprint,
            "wall_s": self.wall_s,
            "steps": [step.to_dict() for step in self.steps],
        }
        return stored | ({"interrupted": self.interrupted} if self.interrupted else {})

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> StageRecord:
        """Undo :meth:`to_dict`.

        Args:
            stored: What :meth:`to_dict` gave.
        """
        levels = stored["levels"]
        counts = {k: {"count": n, "level": levels[k]} for k, n in stored["counts"].items()}
        return cls(
            name=stored["name"],
            metrics=stored["metrics"],
            counts=Counts.from_dict(counts),
            energy=_stored_energy(stored),
            trainable_parameters=stored["trainable_parameters"],
            fingerprint=stored["fingerprint"],
            steps=tuple(StepRecord.from_dict(step) for step in stored["steps"]),
            wall_s=stored["wall_s"],
            interrupted=stored.get("interrupted", ""),
        )


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio that says what stands above and below the line.

    Args:
        name: Of the ratio.
        value: At the best known prices.
        low: Smallest value that the ranges of the prices allow.
        high: Largest value that the ranges of the prices allow.
        numerator: What stands above the line.
        denominator: What stands below the line.
        includes: What was counted on both sides.
    Raises:
        ConfigurationError: The ends are not in order.

    Example:
        >>> ratio = Ratio(
        ...     name="trainable parameters",
        ...     value=3.6,
        ...     low=3.6,
        ...     high=3.6,
        ...     numerator="all weights",
        ...     denominator="LoRA",
        ...     includes="trainable scalars",
        ... )
        >>> Ratio.from_dict(ratio.to_dict()) == ratio
        True
    """

    name: str
    value: float
    low: float
    high: float
    numerator: str
    denominator: str
    includes: str

    def __post_init__(self) -> None:
        _ = self.interval

    @property
    def interval(self) -> Interval:
        """Value and range."""
        return Interval(self.value, self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Ratio:
        """Undo :meth:`to_dict`.

        Args:
            stored: What :meth:`to_dict` gave.
        """
        return cls(**{key: stored[key] for key in cls.__dataclass_fields__})


def _stored_energy(stage: Mapping[str, Any]) -> EnergyReport:
    return EnergyReport(
        chip=stage["chip"],
        energy_by_event={k: Interval(**v) for k, v in stage["energy_by_event"].items()},
        latency_by_event={k: Interval(**v) for k, v in stage["latency_by_event"].items()},
        unpriced_energy=tuple(stage["unpriced_energy"]),
        unpriced_latency=tuple(stage["unpriced_latency"]),
        level=Level(stage["level"]),
    )


def _require(where: str, name: str, value: float, least: int = 0) -> None:
    if not least <= value < math.inf:
        raise ConfigurationError(f"{where}: expected {name} of {least} or more, got {value!r}.")


def _finite(where: str, metrics: Mapping[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ConfigurationError(
                f"{where}: expected a finite metric '{name}', got {value!r}. Leave out a metric "
                "that does not exist."
            )
    return dict(metrics)
