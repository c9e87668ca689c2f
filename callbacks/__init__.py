"""Lightning callbacks: what each step cost, and whether what was frozen and forgotten stays so.

``aihwkit_lora.callbacks.hf`` has the same meters for the Trainer of transformers.
"""

from aihwkit_lora.callbacks.continual_module import ContinualModule
from aihwkit_lora.callbacks.drift_sweep import DriftSweep, drift_key
from aihwkit_lora.callbacks.energy_meter import EnergyMeter
from aihwkit_lora.callbacks.evaluation import predict_batch
from aihwkit_lora.callbacks.forgetting_stopper import ForgettingStopper
from aihwkit_lora.callbacks.frozen_guard import FrozenGuard
from aihwkit_lora.callbacks.pulse_counter import PulseCounter
from aihwkit_lora.callbacks.relapse_guard import RelapseGuard, relapse_key
from aihwkit_lora.callbacks.run_reporter import RunReporter
from aihwkit_lora.callbacks.unlearning_module import UnlearningModule
from aihwkit_lora.metering.step_meter import StepCounts

__all__ = [
    "ContinualModule",
    "DriftSweep",
    "EnergyMeter",
    "ForgettingStopper",
    "FrozenGuard",
    "PulseCounter",
    "RelapseGuard",
    "RunReporter",
    "StepCounts",
    "UnlearningModule",
    "drift_key",
    "predict_batch",
    "relapse_key",
]
