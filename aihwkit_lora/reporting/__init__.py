"""What a run did and what it cost: a record on disk, a table, a picture and named ratios."""

from aihwkit_lora.reporting.arithmetic import (
    FACES,
    PUBLISHED,
    SPEAKERS,
    PublishedWorkload,
    print_published_ratios,
    published_ratios,
)
from aihwkit_lora.reporting.baselines import Case, Gpu, Schedule, rtx_4090
from aihwkit_lora.reporting.breakdown import energy_by_group
from aihwkit_lora.reporting.comparison import (
    ComparedValue,
    Comparison,
    RunGroup,
    compare,
    print_comparison,
)
from aihwkit_lora.reporting.energy_chart import draw_energies
from aihwkit_lora.reporting.formatting import format_interval, format_si
from aihwkit_lora.reporting.overview import Overview, Workload, overview
from aihwkit_lora.reporting.page import page, write_page
from aihwkit_lora.reporting.picture import draw
from aihwkit_lora.reporting.ratios import (
    case_ratio,
    deployment_energy_ratio,
    deployment_time_ratio,
    energy_ratio,
    inference_energy_ratio,
    parameter_ratio,
    price_ratio,
    training_energy_ratio,
    update_count_ratio,
    update_energy_ratio,
)
from aihwkit_lora.reporting.records import Ratio, StageRecord, StepRecord
from aihwkit_lora.reporting.run_report import SCHEMA, RunReport, environment
from aihwkit_lora.reporting.summary import print_summary

__all__ = [
    "FACES",
    "PUBLISHED",
    "SCHEMA",
    "SPEAKERS",
    "Case",
    "ComparedValue",
    "Comparison",
    "Gpu",
    "Overview",
    "PublishedWorkload",
    "Ratio",
    "RunGroup",
    "RunReport",
    "Schedule",
    "StageRecord",
    "StepRecord",
    "Workload",
    "case_ratio",
    "compare",
    "deployment_energy_ratio",
    "deployment_time_ratio",
    "draw",
    "draw_energies",
    "energy_by_group",
    "energy_ratio",
    "environment",
    "format_interval",
    "format_si",
    "inference_energy_ratio",
    "overview",
    "page",
    "parameter_ratio",
    "price_ratio",
    "print_comparison",
    "print_published_ratios",
    "print_summary",
    "published_ratios",
    "rtx_4090",
    "training_energy_ratio",
    "update_count_ratio",
    "update_energy_ratio",
    "write_page",
]
