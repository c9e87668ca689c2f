"""What training the adapter of a new task minimises: one small object each, found by name."""

from aihwkit_lora.continual.objectives import (
    distillation,
    ewc,
    inflora,
    o_lora,
    replay,
    sd_lora,
)
from aihwkit_lora.continual.objectives.catalogue import get, names, register, table
from aihwkit_lora.continual.objectives.objective import Batch, ContinualObjective, Data

DEFAULT = "replay"
"""Name of the objective to take if nothing speaks for another."""

__all__ = [
    "DEFAULT",
    "Batch",
    "ContinualObjective",
    "Data",
    "distillation",
    "ewc",
    "get",
    "inflora",
    "names",
    "o_lora",
    "register",
    "replay",
    "sd_lora",
    "table",
]
