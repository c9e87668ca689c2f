"""Options of the face recipe, and what they are checked for before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aihwkit_lora as al
from aihwkit_lora.recipes.arm_options import ArmOptions
from aihwkit_lora.recipes.face_baselines import BASELINES
from aihwkit_lora.recipes.face_data import FaceDataConfig
from aihwkit_lora.recipes.face_models import MODELS
from aihwkit_lora.recipes.face_objectives import OWN, require_usable
from aihwkit_lora.recipes.in_situ import device_of


@dataclass(frozen=True, kw_only=True)
class FaceRecognition(ArmOptions, FaceDataConfig):
    """Options of the recipe; those of the data come first.

    Args:
        chip: Name of the chip to program and to price for, or a YAML file that describes one.
        model: ``"mixer"`` or ``"vit"``; both have a size for ``image_size`` 16 and one for faces of
            64 pixels.
        baseline: Whether to run baselines at all.
        baselines: Names of the arms to run beside the hybrid one, with commas between them:
            ``reprogram``, ``deploy_once``, ``digital``, ``in_situ``.
        quick: Few epochs, photos and chips, to see that everything works. Results mean nothing.
        learn_epochs: Epochs of learning the first people, in torch.
        learn_rate: Learning rate of that, at its peak.
        weight_noise: Weight noise while learning, as a fraction of the largest weight.
        objective: Name of the objective that forgets; any one for classifiers. Baselines without a
            branch forget by the default one if it needs a branch that can be left out.
        forget_rank: Rank of the adapter that forgets.
        forget_epochs: Its epochs.
        continue_rank: Rank of the adapter that learns the new person.
        continue_epochs: Its epochs.
        lora_scale: Factor on the adapters' output; ``lora_alpha`` is this times the rank.
        margin: Logits by which the forgotten output shall stay below the winner.
        batch_size: Images per step of the adapters.
        noise_microsiemens: Standard deviations of the write noise of a cell, in µS.
        noise_chips: Simulated chips at each of them.
        noise_images: Test images of each person, at most, that they are shown.
        drift_repeats: How often the fate of all cells is drawn, on a chip with a drift model.
        restore_microsiemens: Standard deviation of the write noise of the chip that is restored.
        restore_rank: Rank of the adapter that restores.
        restore_epochs: Its epochs.
        reprogram_forget_epochs: Steps in which the baselines that train all weights for the arrays
            forget, each on all images.
        reprogram_continue_epochs: Steps in which they learn the new person.
        in_situ_device: Preset of aihwkit whose device the arm ``in_situ`` is trained on.
        in_situ_forget_epochs: Epochs of forgetting in place.
        in_situ_continue_epochs: Epochs of learning the new person in place.
        verify: How many models to train from scratch without the forgotten person, to verify the
            forgetting against; 0 for no verification.
    Raises:
        ConfigurationError: A number is out of its range, or an objective or device does not fit.
        UnknownNameError: There is no such chip, model, objective or baseline.

    Example:
        >>> FaceRecognition(data="digits", seed=1).forgotten
        2
        >>> FaceRecognition(baselines="digital, in_situ").arms
        ('digital', 'in_situ')
    """

    chip: str = "rm-180nm"
    model: str = "mixer"
    baseline: bool = True
    baselines: str = "reprogram, deploy_once, digital"
    quick: bool = False
    learn_epochs: int = 150
    learn_rate: float = 5e-3
    weight_noise: float = 0.03
    objective: str = OWN
    forget_rank: int = 6
    forget_epochs: int = 30
    continue_rank: int = 8
    continue_epochs: int = 100
    lora_scale: float = 4.0
    margin: float = 5.0
    batch_size: int = 128
    noise_microsiemens: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    noise_chips: int = 100
    noise_images: int = 20
    drift_repeats: int = 10
    restore_microsiemens: float = 5.0
    restore_rank: int = 8
    restore_epochs: int = 10
    reprogram_forget_epochs: int = 30
    reprogram_continue_epochs: int = 60
    in_situ_device: str = "EcRamPreset"
    in_situ_forget_epochs: int = 10
    in_situ_continue_epochs: int = 30
    verify: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        al.chips.find(self.chip)
        MODELS.get(self.model)
        require_usable(self.objective)
        device_of(self.in_situ_device)
        for arm in self.arms:
            BASELINES.get(arm)
        least_one = ("_epochs", "_rank", "_size", "_chips", "_images", "_repeats")
        for name in (field.name for field in dataclasses.fields(self)):
            if name.endswith(least_one):
                self._require(name, "of at least 1", getattr(self, name) >= 1)
        self._require("learn_rate", "above 0", self.learn_rate > 0.0)
        self._require("restore_microsiemens", "of 0 or more", self.restore_microsiemens >= 0.0)
        self._require("verify", "of 0 or more", self.verify >= 0)
        self._require_sigmas()

    @property
    def resolved(self) -> FaceRecognition:
        """What is run: the options, or the smaller ones of a quick run."""
        if not self.quick:
            return self
        photos = min(self.photos_per_person or _QUICK_PHOTOS, _QUICK_PHOTOS)
        limits = {name: min(getattr(self, name), most) for name, most in _QUICK.items()}
        sigmas = self.noise_microsiemens[:2]
        return dataclasses.replace(
            self, quick=False, photos_per_person=photos, noise_microsiemens=sigmas, **limits
        )


_QUICK_PHOTOS = 20
_QUICK: Mapping[str, Any] = {
    "learn_epochs": 10,
    "forget_epochs": 2,
    "continue_epochs": 4,
    "noise_chips": 5,
    "drift_repeats": 2,
    "restore_epochs": 1,
    "reprogram_forget_epochs": 2,
    "reprogram_continue_epochs": 2,
    "in_situ_forget_epochs": 1,
    "in_situ_continue_epochs": 1,
}
