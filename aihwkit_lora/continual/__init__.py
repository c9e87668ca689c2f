"""Learning task after task: adapters that add up, replay, growing heads, streams of requests."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aihwkit_lora.continual import objectives
from aihwkit_lora.continual.buffer import ReplayBuffer
from aihwkit_lora.continual.head import GrownRows, grow_head_
from aihwkit_lora.continual.streams import Forget, Learn, Phase, TaskStream, parse_request

if TYPE_CHECKING:
    from aihwkit_lora.continual import metrics
    from aihwkit_lora.continual.composition import (
        Composition,
        active_adapters,
        add_adapter_,
        train_only_,
    )

__all__ = [
    "Composition",
    "Forget",
    "GrownRows",
    "Learn",
    "Phase",
    "ReplayBuffer",
    "TaskStream",
    "active_adapters",
    "add_adapter_",
    "grow_head_",
    "metrics",
    "objectives",
    "parse_request",
    "train_only_",
]

_WITH_PEFT = ("Composition", "active_adapters", "add_adapter_", "train_only_")


def __getattr__(name: str) -> Any:
    # Importing PEFT or torchmetrics takes seconds; only whoever needs them shall wait.
    if name in _WITH_PEFT:
        return getattr(import_module(f"{__name__}.composition"), name)
    if name == "metrics":
        return import_module(f"{__name__}.metrics")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
