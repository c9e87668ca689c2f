"""Forgetting on frozen arrays: objectives, seals, the request log, metrics and verification."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aihwkit_lora.unlearning import objectives
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.reference import reference
from aihwkit_lora.unlearning.request_log import RequestLog

if TYPE_CHECKING:
    from aihwkit_lora.unlearning import metrics
    from aihwkit_lora.unlearning.auditing import audit
    from aihwkit_lora.unlearning.exact import Destruction, destroy_
    from aihwkit_lora.unlearning.manifest import load_sealed, save_sealed
    from aihwkit_lora.unlearning.seal import Seal, seal_, seals, verify_seals
    from aihwkit_lora.unlearning.verification import (
        Criteria,
        ForgettingReport,
        RelearnAttack,
        Retrained,
        RetrainedReferences,
        print_verdict,
        verify_forgetting,
    )

__all__ = [
    "Criteria",
    "Destruction",
    "ForgettingLevel",
    "ForgettingReport",
    "RelearnAttack",
    "RequestLog",
    "Retrained",
    "RetrainedReferences",
    "Seal",
    "audit",
    "destroy_",
    "load_sealed",
    "metrics",
    "objectives",
    "print_verdict",
    "reference",
    "save_sealed",
    "seal_",
    "seals",
    "verify_forgetting",
    "verify_seals",
]

_NAMES = {
    "auditing": ("audit",),
    "exact": ("Destruction", "destroy_"),
    "manifest": ("load_sealed", "save_sealed"),
    "seal": ("Seal", "seal_", "seals", "verify_seals"),
    "verification": (
        *("Criteria", "ForgettingReport", "RelearnAttack", "Retrained", "RetrainedReferences"),
        *("print_verdict", "verify_forgetting"),
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Importing PEFT or scikit-learn takes seconds; only whoever needs them shall wait.
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name == "metrics":
        return import_module(f"{__name__}.metrics")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
