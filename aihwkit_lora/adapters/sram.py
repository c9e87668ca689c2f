"""The SRAM of a digital unit: which adapters it holds now, and which it has to fetch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from aihwkit_lora.adapters.budget import Footprint, largest_rank, largest_width
from aihwkit_lora.adapters.digital_unit import DigitalUnit, kib
from aihwkit_lora.errors import ConfigurationError


@dataclass(eq=False)
class Slot:
    """Room for one adapter of one layer.

    Args:
        layer: Full name.
        adapter: Name of the adapter.
        footprint: What is stored there.
        resident: Whether it is stored there now.
    """

    layer: str
    adapter: str
    footprint: Footprint
    resident: bool = False


class Sram:
    """Memory that all adapted layers of a model share.

    An adapter has room in all of its layers or in none. Whoever was used longest ago makes room.

    Args:
        unit: Whose memory it is.
        slots: What may be stored.
    """

    def __init__(self, unit: DigitalUnit, slots: Iterable[Slot] = ()) -> None:
        self.unit = unit
        self._slots = list(slots)
        self._held: list[str] = []  # adapters with room, last used last
        self._settled: tuple[str, ...] | None = None

    def add(self, slot: Slot) -> None:
        """Provide for an adapter of a layer; it is not loaded yet.

        Args:
            slot: New to this memory.
        """
        self._slots.append(slot)
        self._settled = None

    def remove(self, slot: Slot) -> None:
        """Forget an adapter of a layer.

        Args:
            slot: One that was added.
        """
        self._slots.remove(slot)
        self._settled = None

    def lose_power(self) -> None:
        """Forget what is stored: everything has to be loaded again."""
        for slot in self._slots:
            slot.resident = False
        self._held, self._settled = [], None

    def require(self, adapters: tuple[str, ...]) -> None:
        """Make room for adapters that run together.

        Args:
            adapters: Names; unknown ones take no room.
        Raises:
            ConfigurationError: They do not fit together.
        """
        if adapters == self._settled:  # as in every layer after the first
            return
        if self._bits(adapters) > self.unit.capacity_bits:
            raise ConfigurationError(self._too_big(adapters))
        held = [adapter for adapter in self._held if adapter not in adapters]
        while self._bits([*held, *adapters]) > self.unit.capacity_bits:
            self._evict(held.pop(0))
        self._held = [*held, *adapters]
        self._settled = adapters

    def _evict(self, adapter: str) -> None:
        for slot in self._of([adapter]):
            slot.resident = False

    def _of(self, adapters: Collection[str]) -> list[Slot]:
        return [slot for slot in self._slots if slot.adapter in adapters]

    def _bits(self, adapters: Collection[str]) -> int:
        return sum(self.bits(slot) for slot in self._of(adapters))

    def bits(self, slot: Slot) -> int:
        """Bits that a slot takes.

        Args:
            slot: An adapter of a layer.
        """
        return slot.footprint.bits(self.unit.stored_bits)

    def _too_big(self, adapters: tuple[str, ...]) -> str:
        unit, parts = self.unit, [slot.footprint for slot in self._of(adapters)]
        each = ", ".join(f"'{name}' {kib(self._bits([name]))}" for name in adapters)
        rank = largest_rank(parts, unit.capacity_bits, unit.stored_bits)
        width = largest_width(parts, unit.capacity_bits)
        ways = [f"rank {rank} in every layer"] * (rank > 0) + [f"{width} bits"] * (width > 0)
        fits = f"What would fit is {' or '.join(ways)}." if ways else "No rank or width would fit."
        return (
            f"digital unit: expected active adapters that fit {unit.sram_kib:g} KiB of SRAM, got "
            f"{kib(self._bits(adapters))} at {unit.stored_bits} bits ({each}). {fits}"
        )
