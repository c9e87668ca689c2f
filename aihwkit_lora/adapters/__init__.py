"""The digital unit beside the arrays: what runs the adapters, and whether they fit its SRAM.

Importing this package is cheap; PEFT is imported when something that needs it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aihwkit_lora.adapters.digital_unit import DigitalUnit
from aihwkit_lora.adapters.pipeline import LayerTime, PipelineReport, pipeline

if TYPE_CHECKING:
    from aihwkit_lora.adapters.analog_lora import AnalogLoraConfig
    from aihwkit_lora.adapters.digitize import digitize_, power_cycle_, undigitize_

__all__ = [
    "AnalogLoraConfig",
    "DigitalUnit",
    "LayerTime",
    "PipelineReport",
    "digitize_",
    "pipeline",
    "power_cycle_",
    "undigitize_",
]

_WITH_PEFT = {
    "AnalogLoraConfig": "analog_lora",
    "digitize_": "digitize",
    "power_cycle_": "digitize",
    "undigitize_": "digitize",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_PEFT:
        return getattr(import_module(f"{__name__}.{_WITH_PEFT[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
