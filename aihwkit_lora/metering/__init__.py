"""Counting what the hardware does, and pricing it afterwards."""

from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.events import EVENTS, Event, Part, Side
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.pricing import EnergyReport, PriceList, Quantity, Status, price
from aihwkit_lora.metering.workload import DigitalExecution, LayerShape, Reuse, Workload

__all__ = [
    "EVENTS",
    "Counts",
    "DigitalExecution",
    "EnergyReport",
    "Event",
    "Interval",
    "LayerShape",
    "Ledger",
    "Level",
    "Part",
    "PriceList",
    "Quantity",
    "Reuse",
    "Side",
    "Status",
    "Workload",
    "price",
]
