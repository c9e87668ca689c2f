"""What a run did and what it cost: a record on disk, a table, a picture and named ratios."""

from aihwkit_lora.reporting.breakdown import energy_by_group
from aihwkit_lora.reporting.formatting import format_interval, format_si
from aihwkit_lora.reporting.picture import draw
from aihwkit_lora.reporting.ratios import energy_ratio, price_ratio
from aihwkit_lora.reporting.records import Ratio, StageRecord, StepRecord
from aihwkit_lora.reporting.run_report import SCHEMA, RunReport, environment
from aihwkit_lora.reporting.summary import print_summary

__all__ = [
    "SCHEMA",
    "Ratio",
    "RunReport",
    "StageRecord",
    "StepRecord",
    "draw",
    "energy_by_group",
    "energy_ratio",
    "environment",
    "format_interval",
    "format_si",
    "price_ratio",
    "print_summary",
]
