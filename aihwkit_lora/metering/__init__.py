"""Counting what the hardware does, and pricing it afterwards."""

from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.events import EVENTS, Event, Side
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.pricing import EnergyReport, PriceList, Quantity, Status, price

__all__ = [
    "EVENTS",
    "Counts",
    "EnergyReport",
    "Event",
    "Interval",
    "Ledger",
    "Level",
    "PriceList",
    "Quantity",
    "Side",
    "Status",
    "price",
]
