"""How much of the forgotten data is left, each as a function and as a ``torchmetrics.Metric``.

Functions need torch alone; the classes import torchmetrics, and the attacks scikit-learn, when they
are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aihwkit_lora.unlearning.metrics.accuracy import (
        accuracy_gap,
        average_gap,
        forget_retain_accuracy,
        tug_of_war,
    )
    from aihwkit_lora.unlearning.metrics.adapters import adapter_off_accuracy, layer_distance
    from aihwkit_lora.unlearning.metrics.divergence import (
        activation_distance,
        completeness,
        divergence_floor,
        js_divergence,
        kl_divergence,
        zrf,
    )
    from aihwkit_lora.unlearning.metrics.evaluation import model_accuracy
    from aihwkit_lora.unlearning.metrics.lira import Lira, scaled_confidence, u_lira
    from aihwkit_lora.unlearning.metrics.membership import (
        Membership,
        auc,
        loss_membership,
        svc_membership,
        true_class_confidence,
    )
    from aihwkit_lora.unlearning.metrics.modular import (
        ActivationDistance,
        Completeness,
        ForgetRetainAccuracy,
        JsToRetrained,
        KlToRetrained,
        TugOfWar,
        ZeroRetrainForgetting,
    )
    from aihwkit_lora.unlearning.metrics.modular_attacks import (
        LinearProbe,
        LossMembership,
        SvcMembership,
        ULira,
    )
    from aihwkit_lora.unlearning.metrics.probe import collect_features, linear_probe
    from aihwkit_lora.unlearning.metrics.relearning import (
        RelearnCurve,
        relearn_curve,
        relearn_time_ratio,
    )

_NAMES = {
    "accuracy": ("accuracy_gap", "average_gap", "forget_retain_accuracy", "tug_of_war"),
    "adapters": ("adapter_off_accuracy", "layer_distance"),
    "divergence": (
        *("activation_distance", "completeness", "divergence_floor", "js_divergence"),
        *("kl_divergence", "zrf"),
    ),
    "evaluation": ("model_accuracy",),
    "lira": ("Lira", "scaled_confidence", "u_lira"),
    "membership": (
        *("Membership", "auc", "loss_membership", "svc_membership", "true_class_confidence"),
    ),
    "modular": (
        *("ActivationDistance", "Completeness", "ForgetRetainAccuracy", "JsToRetrained"),
        *("KlToRetrained", "TugOfWar", "ZeroRetrainForgetting"),
    ),
    "modular_attacks": ("LinearProbe", "LossMembership", "SvcMembership", "ULira"),
    "probe": ("collect_features", "linear_probe"),
    "relearning": ("RelearnCurve", "relearn_curve", "relearn_time_ratio"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ActivationDistance",
    "Completeness",
    "ForgetRetainAccuracy",
    "JsToRetrained",
    "KlToRetrained",
    "LinearProbe",
    "Lira",
    "LossMembership",
    "Membership",
    "RelearnCurve",
    "SvcMembership",
    "TugOfWar",
    "ULira",
    "ZeroRetrainForgetting",
    "accuracy_gap",
    "activation_distance",
    "adapter_off_accuracy",
    "auc",
    "average_gap",
    "collect_features",
    "completeness",
    "divergence_floor",
    "forget_retain_accuracy",
    "js_divergence",
    "kl_divergence",
    "layer_distance",
    "linear_probe",
    "loss_membership",
    "model_accuracy",
    "relearn_curve",
    "relearn_time_ratio",
    "scaled_confidence",
    "svc_membership",
    "true_class_confidence",
    "tug_of_war",
    "u_lira",
    "zrf",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
