"""Where probes send what they count."""

from __future__ import annotations

from typing import Protocol

from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.ledger import Ledger


class Sink(Protocol):
    """Takes counts."""

    @property
    def ledger(self) -> Ledger:
        """Where counts end up."""

    def add(self, layer: str, counts: Counts) -> None:
        """Take the counts of a layer."""
