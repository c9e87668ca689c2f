"""The record of a run: what was counted, in which phase, in which layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.events import EVENTS, Side


class Ledger:
    """Counts by phase and layer. Only adding changes it, and it never holds joules.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(Counts({"tile_reads": 2}), phase="unlearn", layer="head")
        >>> before = ledger.total()
        >>> ledger.add(Counts({"tile_reads": 3}), phase="infer", layer="head")
        >>> ledger.total(phase="infer")["tile_reads"], ledger.since(before)["tile_reads"]
        (3, 3)
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Counts] = {}
        self._totals: dict[str | None, Counts] = {}

    def add(self, counts: Counts, *, phase: str, layer: str) -> None:
        """Add counts.

        Args:
            counts: What happened.
            phase: When, for example ``"unlearn"``.
            layer: Where: the layer's full name, ``""`` for the model as a whole.
        """
        # In place, because a training step adds some dozens of times; only copies are handed out.
        self._totals.clear()
        entry = self._entries.get((phase, layer))
        if entry is None:
            entry = self._entries[phase, layer] = Counts()
        entry._take(counts)

    def total(
        self, *, phase: str | None = None, layer: str | None = None, side: Side | None = None
    ) -> Counts:
        """Add up what was counted.

        Args:
            phase: Only this phase; all if None.
            layer: Only this layer; all if None.
            side: Only events on this side of the chip; all if None.
        """
        # Several meters ask for the same totals after each step, and nobody can change them.
        total = self._totals.get(phase) if layer is None else None
        if total is None:
            total = self._sum(phase, layer)
            if layer is None:
                self._totals[phase] = total
        if side is None:
            return total
        return total.only(event for event in total if EVENTS.get(event).side == side)

    def _sum(self, phase: str | None, layer: str | None) -> Counts:
        if phase is None and layer is None:
            return Counts.sum(self.total(phase=each) for each in self.phases())
        return Counts.sum(
            counts
            for (at_phase, at_layer), counts in self._entries.items()
            if phase in (None, at_phase) and layer in (None, at_layer)
        )

    def since(self, snapshot: Counts, *, phase: str | None = None) -> Counts:
        """What was added after ``snapshot = ledger.total(phase=phase)`` was taken.

        Args:
            snapshot: An earlier total.
            phase: The phase that the snapshot was taken of.
        """
        return self.total(phase=phase).minus(snapshot)

    def phases(self) -> tuple[str, ...]:
        """Phases in the order of their first entry."""
        return tuple(dict.fromkeys(phase for phase, _ in self._entries))

    def layers(self) -> tuple[str, ...]:
        """Layers in the order of their first entry."""
        return tuple(dict.fromkeys(layer for _, layer in self._entries))

    def by_layer(self, phase: str | None = None) -> dict[str, Counts]:
        """Totals of each layer.

        Args:
            phase: Only this phase; all if None.
        """
        return {layer: self.total(phase=phase, layer=layer) for layer in self.layers()}

    def state_dict(self) -> dict[str, Any]:
        """Plain strings and whole numbers, for checkpoints."""
        return {
            "entries": [
                {"phase": phase, "layer": layer, "counts": counts.to_dict()}
                for (phase, layer), counts in self._entries.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what :meth:`state_dict` gave.

        Args:
            state: A stored ledger.
        """
        self._totals.clear()
        self._entries = {
            (entry["phase"], entry["layer"]): Counts.from_dict(entry["counts"])
            for entry in state["entries"]
        }
