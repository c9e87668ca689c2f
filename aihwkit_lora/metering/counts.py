"""Counts of events: exact Python integers that say how they came about."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.events import EVENTS


class Level(StrEnum):
    """How sure a count is, from sure to unsure; a sum is as sure as its least sure part."""

    EXACT = "exact"
    SIMULATED = "simulated"
    SAMPLED = "sampled"
    MEAN = "mean"
    BOUND = "bound"

    @property
    def rank(self) -> int:
        """0 for the surest."""
        return _RANKS[self]

    def or_less_sure(self, other: Level) -> Level:
        """The less sure of two levels."""
        return other if _RANKS[other] > _RANKS[self] else self


_KNOWN = EVENTS.keys()
_RANKS = {level: rank for rank, level in enumerate(Level)}


class Counts(Mapping[str, int]):
    """An immutable mapping from events to how often each happened.

    Events that did not happen read as 0. Counts add up; each event keeps its own level.

    Args:
        values: Counts by event name, whole numbers of 0 or more.
        level: How sure these counts are.
    Raises:
        UnknownNameError: A key is not a registered event.
        ConfigurationError: A value is negative or not a whole number.

    Example:
        >>> step = Counts({"tile_reads": 3}) + Counts({"set_pulses": 7}, level=Level.SIMULATED)
        >>> step["tile_reads"], step["failed_cells"], str(step.level)
        (3, 0, 'simulated')
    """

    __slots__ = ("_levels", "_values")

    def __init__(self, values: Mapping[str, int] | None = None, level: Level = Level.EXACT) -> None:
        whole = {  # most are already, and a training step makes hundreds
            event: n if type(n) is int and n >= 0 and event in _KNOWN else _whole(event, n)
            for event, n in (values or {}).items()
        }
        self._values = {event: n for event, n in whole.items() if n}
        self._levels = dict.fromkeys(self._values, level)

    @classmethod
    def _of(cls, values: dict[str, int], levels: dict[str, Level]) -> Counts:
        counts = cls()
        counts._values, counts._levels = values, levels
        return counts

    @property
    def level(self) -> Level:
        """The least sure level of all events; exact if nothing happened."""
        return max(self._levels.values(), key=_RANKS.__getitem__, default=Level.EXACT)

    @property
    def pulses(self) -> int:
        """SET and RESET pulses together."""
        return self["set_pulses"] + self["reset_pulses"]

    def only(self, events: Iterable[str]) -> Counts:
        """Leave out all other events.

        Args:
            events: What to keep.
        """
        kept = [event for event in events if event in self._values]
        return Counts._of(
            {event: self._values[event] for event in kept},
            {event: self._levels[event] for event in kept},
        )

    def level_of(self, event: str) -> Level:
        """How sure the count of one event is.

        Args:
            event: A registered event.
        """
        return self._levels.get(event, Level.EXACT)

    def __getitem__(self, event: str) -> int:
        found = self._values.get(event)
        if found is None:
            EVENTS.get(event)
            return 0
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __add__(self, other: Counts) -> Counts:
        return Counts.sum((self, other))

    @classmethod
    def sum(cls, parts: Iterable[Counts]) -> Counts:
        """Add up any number of counts.

        Args:
            parts: Counts to add.
        """
        total = cls()
        for part in parts:
            total._take(part)
        return total

    def _take(self, part: Counts) -> None:
        """Add in place; only for counts that nobody else has seen yet."""
        values, levels = self._values, self._levels
        for event, value in part._values.items():
            values[event] = values.get(event, 0) + value
        for event, level in part._levels.items():
            if (known := levels.setdefault(event, level)) is not level:
                levels[event] = known.or_less_sure(level)

    def minus(self, earlier: Counts) -> Counts:
        """What happened after ``earlier``, an older total of the same ledger.

        Args:
            earlier: Counts that this one includes.
        Raises:
            ConfigurationError: ``earlier`` is not part of this.
        """
        own, before = self._values, earlier._values
        values = {k: new for k, v in own.items() if (new := v - before.get(k, 0))}
        behind = sorted({k for k, v in values.items() if v < 0} | (before.keys() - own.keys()))
        if behind:
            raise ConfigurationError(
                f"counts: expected an earlier total, got one with more {', '.join(behind)}. "
                "Take the snapshot from the same ledger."
            )
        return Counts._of(values, {k: self._levels[k] for k in values})

    def scaled(self, factor: int) -> Counts:
        """Repeat everything ``factor`` times.

        Args:
            factor: A whole number of 0 or more.
        """
        factor = _whole("factor", factor)
        values = {k: v * factor for k, v in self._values.items() if factor}
        return Counts._of(values, {k: self._levels[k] for k in values})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain numbers and strings, for JSON and checkpoints."""
        return {k: {"count": self[k], "level": str(self._levels[k])} for k in sorted(self)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Mapping[str, Any]]) -> Counts:
        """Undo :meth:`to_dict`.

        Args:
            stored: What :meth:`to_dict` gave.
        """
        return cls.sum(cls({k: v["count"]}, level=Level(v["level"])) for k, v in stored.items())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Counts):
            return NotImplemented
        return self._values == other._values and self._levels == other._levels

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={self[k]}" for k in sorted(self))
        return f"Counts({inner}; {self.level})"


def _whole(event: str, value: Any) -> int:
    if event != "factor" and event not in EVENTS:
        EVENTS.get(event)
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0 or isinstance(value, bool):
        raise ConfigurationError(
            f"counts: expected a whole number of 0 or more for '{event}', got {value!r}."
        )
    return number
