"""Counting what the hardware does, and pricing it afterwards."""

from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.events import EVENTS, Event, Side
from aihwkit_lora.metering.ledger import Ledger

__all__ = ["EVENTS", "Counts", "Event", "Ledger", "Level", "Side"]
