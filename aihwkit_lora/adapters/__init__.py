"""The digital unit beside the arrays: which adapters there are, and whether they fit its SRAM.

Importing this package is cheap; PEFT is imported when ``AnalogLoraConfig`` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aihwkit_lora.adapters.analog_lora import AnalogLoraConfig

__all__ = ["AnalogLoraConfig"]


def __getattr__(name: str) -> Any:
    if name == "AnalogLoraConfig":
        from aihwkit_lora.adapters.analog_lora import AnalogLoraConfig

        return AnalogLoraConfig
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
