"""Options of the image recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.canvas import Pixels
from aihwkit_lora.recipes.diffusers_dit import load_dit
from aihwkit_lora.recipes.diffusion import DiffusionShape, DiffusionTransformer
from aihwkit_lora.recipes.image_data import ImageData, ImageDataConfig

_OBJECTIVES = ("gaussian_target", "pseudo_class")
_QUICK: dict[str, Any] = {
    "copies": 5,
    "width": 16,
    "depth": 1,
    "judge_steps": 3,
    "learn_steps": 3,
    "forget_steps": 2,
    "continue_steps": 2,
    "restore_steps": 2,
    "per_cell": 1,
    "euler_steps": 1,
    "noise_chips": 1,
}


@dataclass(frozen=True, kw_only=True)
class ImageGeneration(ImageDataConfig):
    """Options of the recipe; those of the data come first.

    Args:
        chip: Name of the chip to program and to price for, or a YAML file that describes one.
        baseline: Whether to run the arms without arrays and with a full update, too.
        quick: Whether to take few steps with a tiny model, to see that everything works. It draws
            rubbish.
        vae: Folder, or name on the Hugging Face hub, of an ``AutoencoderKL`` of diffusers whose
            latents are drawn; empty for pixels.
        dit: The same of a ``DiTTransformer2DModel`` of diffusers to start from, in place of a fresh
            network; block, width and depth play no role then.
        block: How blocks mix patches: ``"attention"``, or ``"convnext"`` as in the paper.
        width: Features of a patch.
        depth: Number of blocks.
        judge_steps: Steps of the judge, in torch.
        learn_steps: Steps of learning the first styles, in torch.
        learn_batch_size: Images per step of it.
        weight_noise: Weight noise while learning, as a fraction of the largest weight.
        weight_clip: Largest weight of a layer while learning, in its standard deviations.
        weight_decay: Weight decay while learning, of AdamW; 0 or more.
        objective: How to forget: ``"pseudo_class"`` (the style becomes the first of the kept
            ones), or ``"gaussian_target"`` (it becomes a blank).
        forget_rank: Rank of the adapter that forgets.
        continue_rank: Rank of those that learn the new style and that restore.
        lora_scale: Factor on the adapters' output; ``lora_alpha`` is this times the rank.
        batch_size: Images per step of the adapters. A quarter is of the style to forget; half is
            of the new one.
        forget_steps: Steps of forgetting.
        continue_steps: Steps of learning the new style.
        restore_steps: Steps of restoring a chip with errors.
        learning_rate: Of learning.
        forget_rate: Learning rate of forgetting.
        continue_rate: Learning rate of the new style, and of restoring.
        per_cell: Generated images of each style and object that are judged.
        euler_steps: Evaluations of the model for each generated image.
        noise_microsiemens: Standard deviations of the write noise that is looked at, in µS.
        noise_chips: Simulated chips with such noise, for each of them; and fates of cells that
            drift, where the chip's source says how.
        restore_microsiemens: Write noise of the chip that is restored, in µS.
    Raises:
        ConfigurationError: A number is too small, or there is no such objective.

    Example:
        >>> ImageGeneration(seed=1, block="convnext").forgotten
        'fraktur'
    """

    chip: str = "rm-180nm"
    baseline: bool = True
    quick: bool = False
    vae: str = ""
    dit: str = ""
    block: str = "attention"
    width: int = 96
    depth: int = 4
    judge_steps: int = 1000
    learn_steps: int = 5000
    learn_batch_size: int = 64
    weight_noise: float = 0.03
    weight_clip: float = 3.0
    weight_decay: float = 0.3
    objective: str = "pseudo_class"
    forget_rank: int = 4
    continue_rank: int = 8
    lora_scale: float = 2.0
    batch_size: int = 64
    forget_steps: int = 450
    continue_steps: int = 600
    restore_steps: int = 300
    learning_rate: float = 2e-3
    forget_rate: float = 1e-2
    continue_rate: float = 2e-2
    per_cell: int = 4
    euler_steps: int = 10
    noise_microsiemens: tuple[int, ...] = (1, 2, 3, 5, 7, 10)
    noise_chips: int = 2
    restore_microsiemens: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        al.chips.find(self.chip)
        for name in (field.name for field in dataclasses.fields(self)):
            counted = name.endswith(("_steps", "_size", "_rank", "_cell", "_chips"))
            if counted and getattr(self, name) < 1:
                raise ConfigurationError(
                    f"expected {name} of at least 1, found {getattr(self, name)}."
                )
        # Its own checks refuse an unknown kind of block, or sizes that do not fit.
        DiffusionShape(width=self.width, depth=self.depth, block=self.block)  # type: ignore[arg-type]
        if self.weight_clip <= 0:
            raise ConfigurationError(f"expected weight_clip above 0, found {self.weight_clip}.")
        if self.weight_decay < 0:
            raise ConfigurationError(
                f"expected weight_decay of 0 or more, found {self.weight_decay}."
            )
        if not self.noise_microsiemens or min(self.noise_microsiemens) < 1:
            raise ConfigurationError(
                "expected noise_microsiemens with at least one error, each of at least 1 µS, "
                f"found {self.noise_microsiemens}."
            )
        if self.restore_microsiemens < 0:
            raise ConfigurationError(
                f"expected restore_microsiemens of 0 or more, found {self.restore_microsiemens}."
            )
        if self.objective not in _OBJECTIVES:
            raise ConfigurationError(
                f"expected objective {' or '.join(map(repr, _OBJECTIVES))}, found "
                f"{self.objective!r}."
            )

    def network(self, data: ImageData, canvas: Pixels) -> nn.Module:
        """Make the model for some images.

        Args:
            data: Names styles and objects.
            canvas: What the model draws on.
        Raises:
            ConfigurationError: Patches do not tile the canvas, or see :func:`load_dit`.
        """
        labels = {"styles": len(data.styles), "objects": len(data.objects)}
        if self.dit:
            return load_dit(self.dit, canvas, **labels)
        channels, side, _ = canvas.shape
        shape = DiffusionShape(
            image_size=side,
            channels=channels,
            patch_size=canvas.patch_size,
            width=self.width,
            depth=self.depth,
            block=self.block,  # type: ignore[arg-type]
            object_maps=True,
            **labels,
        )
        return DiffusionTransformer(shape)

    def shortened(self) -> ImageGeneration:
        """These options with a tiny model and few steps, for a run that draws rubbish."""
        return dataclasses.replace(self, **_QUICK)
