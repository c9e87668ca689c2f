"""Lightning callbacks that count pulses and energy, and guard what is frozen."""

from aihwkit_lora.callbacks.energy_meter import EnergyMeter
from aihwkit_lora.callbacks.frozen_guard import FrozenGuard
from aihwkit_lora.callbacks.pulse_counter import PulseCounter
from aihwkit_lora.callbacks.step_counts import StepCounts

__all__ = ["EnergyMeter", "FrozenGuard", "PulseCounter", "StepCounts"]
