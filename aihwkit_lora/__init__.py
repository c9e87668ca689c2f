"""Frozen analogue weights, digital LoRA adapters, and every pulse and joule counted.

A plug-in for IBM's analogue AI toolkit: models that aihwkit converted are programmed once, by
write-verify, then frozen; later changes happen in LoRA adapters that a digital unit executes.
"""

from typing import TYPE_CHECKING, Any

from aihwkit_lora import chips
from aihwkit_lora._environment import check as _check_environment
from aihwkit_lora.errors import (
    AihwkitLoraError,
    ConductanceWindowError,
    ConfigurationError,
    DataError,
    EnvironmentMismatchError,
    FrozenConductanceError,
    RelapseError,
    SealError,
    StageError,
    UnknownNameError,
    UnsupportedTileError,
)

_check_environment()

from aihwkit_lora.adapters import DigitalUnit, pipeline  # noqa: E402
from aihwkit_lora.metering import Counts, EnergyReport, Ledger, price  # noqa: E402
from aihwkit_lora.metering.observe import Observer, observe  # noqa: E402
from aihwkit_lora.programming.program import program_  # noqa: E402
from aihwkit_lora.programming.report import ProgramReport  # noqa: E402
from aihwkit_lora.programming.reprogram import reprogram_  # noqa: E402
from aihwkit_lora.tiles import (  # noqa: E402
    convert,
    drift_,
    engines,
    evaluate_noisy,
    fingerprint,
    freeze_,
    frozen_layers,
    noisy_chips,
    noisy_outputs,
    target_modules,
    thaw_,
    verify,
)

if TYPE_CHECKING:
    from aihwkit_lora.adapters import AnalogLoraConfig, digitize_, power_cycle_, undigitize_

__version__ = "0.1.0"

__all__ = [
    "AihwkitLoraError",
    "AnalogLoraConfig",
    "ConductanceWindowError",
    "ConfigurationError",
    "Counts",
    "DataError",
    "DigitalUnit",
    "EnergyReport",
    "EnvironmentMismatchError",
    "FrozenConductanceError",
    "Ledger",
    "Observer",
    "ProgramReport",
    "RelapseError",
    "SealError",
    "StageError",
    "UnknownNameError",
    "UnsupportedTileError",
    "chips",
    "convert",
    "digitize_",
    "drift_",
    "engines",
    "evaluate_noisy",
    "fingerprint",
    "freeze_",
    "frozen_layers",
    "noisy_chips",
    "noisy_outputs",
    "observe",
    "pipeline",
    "power_cycle_",
    "price",
    "program_",
    "reprogram_",
    "target_modules",
    "thaw_",
    "undigitize_",
    "verify",
]

_WITH_PEFT = ("AnalogLoraConfig", "digitize_", "power_cycle_", "undigitize_")


def __getattr__(name: str) -> Any:
    # Importing PEFT takes seconds, and only whoever has adapters needs it.
    if name in _WITH_PEFT:
        from aihwkit_lora import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
