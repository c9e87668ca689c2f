"""Options of the speaker recipe, and what they are checked for before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aihwkit_lora as al
from aihwkit_lora.recipes.arm_options import ArmOptions
from aihwkit_lora.recipes.speaker_baselines import BASELINES
from aihwkit_lora.recipes.speaker_data import SpeakerDataConfig
from aihwkit_lora.recipes.spiking import NEURONS


@dataclass(frozen=True, kw_only=True)
class SpeakerAuthentication(ArmOptions, SpeakerDataConfig):
    """Options of the recipe; those of the data come first.

    Args:
        chip: Name of the chip to program and to price for, or a YAML file that describes one.
        baseline: Whether to run baselines at all.
        baselines: Names of the arms to run beside the hybrid one, with commas between them:
            ``reprogram``, ``deploy_once``, ``digital``.
        quick: Few epochs, clips and chips, to see that everything works. Results mean nothing.
        neuron: Who computes the neurons: ``"torch"``, or ``"snntorch"`` where it is installed.
        hidden: Neurons.
        learn_epochs: Epochs of learning the first speakers, in torch.
        weight_noise: Weight noise while learning, as a fraction of the largest weight.
        rank: Rank of every adapter.
        lora_alpha: Their ``lora_alpha``; divided by the rank it is the factor on their output.
        forget_epochs: Epochs of the adapter that forgets.
        continue_epochs: Epochs of the adapter and the row that learn the new speaker.
        replay: Part of the kept speakers' clips that is still there when the new one joins.
        noise_microsiemens: Standard deviations of the write noise of a cell, in µS.
        noise_chips: Simulated chips at each of them.
        noise_clips: Test clips of each speaker, at most, that they hear.
        drift_repeats: How often the fate of all cells is drawn, on a chip with a drift model.
        restore_microsiemens: Standard deviation of the write noise of the chip that is restored.
        restore_epochs: Epochs of the adapter that restores.
        batch_size: Clips per step.
        reprogram_forget_steps: Steps in which ``reprogram`` forgets; whole epochs are made of them.
        reprogram_continue_steps: Steps in which it learns the new speaker.
        reprogram_batch_size: Clips per step of it, each of which writes all arrays.
    Raises:
        ConfigurationError: A number is out of its range, or the speakers do not fit together.
        UnknownNameError: There is no such chip, neuron, data set or baseline.

    Example:
        >>> SpeakerAuthentication(data="voices", seed=1).forgotten
        1
        >>> SpeakerAuthentication(baselines="digital, reprogram").arms
        ('digital', 'reprogram')
    """

    chip: str = "rm-180nm"
    baseline: bool = True
    baselines: str = "reprogram, deploy_once, digital"
    quick: bool = False
    neuron: str = "torch"
    hidden: int = 512
    learn_epochs: int = 30
    weight_noise: float = 0.0
    rank: int = 8
    lora_alpha: float = 16.0
    forget_epochs: int = 8
    continue_epochs: int = 20
    replay: float = 0.3
    noise_microsiemens: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    noise_chips: int = 100
    noise_clips: int = 24
    drift_repeats: int = 10
    restore_microsiemens: float = 1.0
    restore_epochs: int = 8
    batch_size: int = 128
    reprogram_forget_steps: int = 24
    reprogram_continue_steps: int = 64
    reprogram_batch_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        al.chips.find(self.chip)
        NEURONS.get(self.neuron)
        for arm in self.arms:
            BASELINES.get(arm)
        counts = ("_epochs", "_steps", "_size", "_chips", "_clips", "_repeats")
        for name in (field.name for field in dataclasses.fields(self)):
            if name.endswith(counts) or name in ("rank", "hidden"):
                self._require(name, "of at least 1", getattr(self, name) >= 1)
        for name in ("weight_noise", "restore_microsiemens"):
            self._require(name, "of 0 or more", getattr(self, name) >= 0.0)
        self._require("replay", "above 0, up to 1", 0.0 < self.replay <= 1.0)
        self._require_sigmas()

    @property
    def sigmas_microsiemens(self) -> tuple[float, ...]:
        """Write noise that is looked at: the options' own, and that of the restored chip."""
        return tuple(sorted({*map(float, self.noise_microsiemens), self.restore_microsiemens}))

    @property
    def resolved(self) -> SpeakerAuthentication:
        """What is run: the options, or the smaller ones of a quick run."""
        if not self.quick:
            return self
        clips = min(self.clips_per_speaker or _QUICK_CLIPS, _QUICK_CLIPS)
        limits = {name: min(getattr(self, name), most) for name, most in _QUICK.items()}
        sigmas = self.noise_microsiemens[:2]
        return dataclasses.replace(
            self, quick=False, clips_per_speaker=clips, noise_microsiemens=sigmas, **limits
        )


_QUICK_CLIPS = 30
_QUICK: Mapping[str, Any] = {
    "learn_epochs": 10,
    "forget_epochs": 4,
    "continue_epochs": 6,
    "restore_epochs": 2,
    "noise_chips": 2,
    "drift_repeats": 2,
    "reprogram_forget_steps": 4,
    "reprogram_continue_steps": 4,
}
