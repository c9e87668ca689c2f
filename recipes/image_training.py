"""How a stage of the image recipe is trained: noisy images, Lightning modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from aihwkit_lora.callbacks.objective_module import Loss
from aihwkit_lora.chips import Chip
from aihwkit_lora.recipes.diffusion import draw_times, interpolate
from aihwkit_lora.recipes.image_data import Pictures
from aihwkit_lora.recipes.stage_training import shaken, train

Denoising = tuple[tuple[Tensor, Tensor, Tensor], Tensor]
"""Inputs of the model (noisy images, times, labels), and the images that it shall predict."""

_WARM_UP = 0.05
_AVERAGING = 0.998


class NoisyBatches(IterableDataset[Denoising]):
    """Draw batches of images with noise on them, seeded.

    Args:
        pictures: What to draw from.
        objects: Number of objects; labels are ``style · objects + object``.
        batch_size: Images of a batch, at least 1.
        batches: How many batches.
        seed: Of images, times and noise.

    Example:
        >>> two = torch.tensor([0, 1])
        >>> pictures = Pictures(images=torch.zeros(2, 1, 8, 8), styles=two, objects=two)
        >>> batches = NoisyBatches(pictures, objects=26, batch_size=5, batches=3, seed=0)
        >>> [inputs[0].shape[0] for inputs, images in batches]
        [5, 5, 5]
    """

    def __init__(
        self, pictures: Pictures, *, objects: int, batch_size: int, batches: int, seed: int
    ) -> None:
        self.pictures, self.objects = pictures, objects
        self.batch_size, self.batches, self.seed = batch_size, batches, seed

    def __iter__(self) -> Iterator[Denoising]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            index = torch.randint(len(self.pictures), (self.batch_size,), generator=generator)
            drawn = self.pictures.where(index)
            time = draw_times(self.batch_size, generator)
            noise = torch.randn(drawn.images.shape, generator=generator)
            label = drawn.styles * self.objects + drawn.objects
            yield (interpolate(drawn.images, noise, time), time, label), drawn.images


def loader(batches: NoisyBatches) -> DataLoader[Denoising]:
    """Hand batches to Lightning as they are.

    Args:
        batches: Already made; they are in memory, so there are no workers.
    """
    return DataLoader(batches, batch_size=None)


class Denoiser(pl.LightningModule):
    """A diffusion model that predicts images; AdamW, warm-up, cosine to zero.

    Args:
        model: From noisy images, times and labels to images.
        steps: Optimiser steps of the stage, at least 1.
        learning_rate: At its peak.
        weight_noise: Weights of linear layers are shaken in each step, by a normal error whose
            standard deviation is this times the layer's largest magnitude.
        weight_clip: Weights of linear layers are clipped at this many standard deviations after
            each step; None for never. Errors of cells are fractions of a layer's largest weight.
        weight_decay: Of AdamW.
        chip: Whose ADCs saturate in training, too; None for none. See :func:`saturating`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        learning_rate: float,
        weight_noise: float = 0.0,
        weight_clip: float | None = None,
        weight_decay: float = 0.01,
        chip: Chip | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._steps, self._rate, self._decay = steps, learning_rate, weight_decay
        self._noise, self._clip, self._chip = weight_noise, weight_clip, chip

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Predict clean images."""
        predicted: Tensor = self.model(noisy, time, label)
        return predicted

    def training_step(self, batch: Denoising) -> Tensor:
        """Mean squared error of the predicted images."""
        inputs, images = batch
        with saturating(self.model, self._chip):
            predicted = torch.func.functional_call(self.model, self._shaken(), tuple(inputs))
        loss = F.mse_loss(predicted, images)
        self.log("loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over what wants a gradient."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, lr=self._rate, betas=(0.9, 0.99), weight_decay=self._decay)
        rates = LambdaLR(optimizer, lambda step: _factor(step, self._steps))
        return [optimizer], [{"scheduler": rates, "interval": "step"}]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, then clip."""
        super().optimizer_step(*args, **kwargs)
        if self._clip is not None:
            clip_(self.model, self._clip)

    def _shaken(self) -> dict[str, Tensor]:
        return shaken(self.model, self._noise) if self._noise else {}


@contextmanager
def saturating(model: nn.Module, chip: Chip | None) -> Iterator[None]:
    """Let linear layers saturate as a chip's ADCs do, inside a ``with`` block.

    An array scales inputs to its DACs by their largest magnitude, and weights to its window by
    theirs; its ADCs see sums of up to their full scale in units of both. A network that has never
    met that limit may cross it everywhere. Of layers with more inputs than an array has rows, only
    the sum over all arrays is limited here.

    Args:
        model: In torch.
        chip: Whose ADCs; None for no limit.

    Example:
        >>> import aihwkit_lora as al
        >>> layer = nn.Linear(100, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> with saturating(layer, al.chips.get("rm-180nm")):
        ...     layer(torch.ones(1, 100)).tolist()
        [[8.0]]
    """
    if chip is None:
        yield
        return
    limited = partial(_limited, full_scale=chip.adc_full_scale, rows=chip.rows)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(limited) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _limited(
    layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor, *, full_scale: float, rows: int
) -> Tensor:
    with torch.no_grad():
        units = _largest(inputs[0])
        arrays = math.ceil(layer.in_features / rows)
        limit = full_scale * arrays * units * layer.weight.abs().max()
        bias = torch.zeros(1) if layer.bias is None else layer.bias.detach()
        over = (_largest(output) + bias.abs().max() > limit)[..., 0]
        limit = limit[over]
    # Few rows of outputs get near it, so only they are touched. A bias is added behind the ADC.
    if len(limit):
        output[over] = output[over].clamp(bias - limit, bias + limit)
    return output


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude of each row; as one operation, torch 2.15 takes ten times as long."""
    return torch.maximum(values.amax(-1, keepdim=True), -values.amin(-1, keepdim=True))


@torch.no_grad()
def clip_(model: nn.Module, deviations: float) -> None:
    """Clip the weights of each linear layer, so that no single one sets the scale of an array.

    Args:
        model: Changed.
        deviations: Largest magnitude, in standard deviations of the layer's weights; above 0.

    Example:
        >>> layer = nn.Linear(100, 100)
        >>> _ = nn.init.normal_(layer.weight)
        >>> clip_(layer, 2.0)
        >>> bool(layer.weight.abs().max() < 2.1)
        True
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            limit = float(deviations * layer.weight.std())
            layer.weight.clamp_(-limit, limit)


def _factor(step: int, steps: int) -> float:
    rising = max(1, round(_WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Predict images of several parts of a batch; each part counts by its number of images.

    Args:
        needs: Names of the parts.

    Example:
        >>> Regression(needs=frozenset({"new", "replay"})).bounded
        True
    """

    needs: frozenset[str]
    bounded: ClassVar[bool] = True

    def loss(
        self, model: nn.Module, batch: Mapping[str, Denoising], *, progress: float = 0.0
    ) -> Tensor:
        """Mean squared error over all images.

        Args:
            model: From noisy images, times and labels to images.
            batch: From part to inputs and images.
            progress: Not used.
        """
        parts = [batch[part] for part in sorted(self.needs)]
        inputs = [torch.cat(pieces) for pieces in zip(*(part[0] for part in parts), strict=True)]
        return F.mse_loss(model(*inputs), torch.cat([part[1] for part in parts]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Taught:
    """Forgotten labels get what a teacher predicts for other ones: ``pseudo_class`` for any model.

    Args:
        teacher: The model before; not trained.
        other: Label to predict instead, for each forgotten one.
    """

    teacher: nn.Module
    other: Mapping[int, int]
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})
    bounded: ClassVar[bool] = True

    def loss(
        self, model: nn.Module, batch: Mapping[str, Denoising], *, progress: float = 0.0
    ) -> Tensor:
        """Mean squared errors on both parts, added.

        Args:
            model: From noisy images, times and labels to images.
            batch: Parts ``"forget"`` and ``"retain"``.
            progress: Not used.
        """
        (noisy, time, label), _ = batch["forget"]
        instead = torch.tensor([self.other[each] for each in label.tolist()])
        with torch.no_grad():
            wanted = self.teacher(noisy, time, instead)
        kept, images = batch["retain"]
        return F.mse_loss(model(noisy, time, label), wanted) + F.mse_loss(model(*kept), images)


class Adapting(Denoiser):
    """A diffusion model that is trained by an objective on batches of several parts.

    Args:
        model: See :class:`Denoiser`.
        objective: Of ``unlearning.objectives``, or :class:`Regression`.
        options: Of :class:`Denoiser`.
    """

    def __init__(self, model: nn.Module, objective: Loss, **options: Any) -> None:
        super().__init__(model, **options)
        self._objective = objective

    def training_step(self, batch: Any) -> Tensor:
        """Ask the objective."""
        progress = self.global_step / self._steps
        with saturating(self.model, self._chip):
            loss = self._objective.loss(self.model, batch, progress=progress)
        self.log("loss", loss, prog_bar=True, batch_size=1)
        return loss


def averaging(steps: int) -> EMAWeightAveraging:
    """Average the weights of the last few hundred steps, exponentially.

    Args:
        steps: Of the stage; averaging starts in the middle.
    """
    return EMAWeightAveraging(decay=_AVERAGING, update_starting_at_step=steps // 2)


def fit(
    module: pl.LightningModule,
    batches: Any,
    *,
    steps: int,
    log: Path,
    callbacks: list[pl.Callback],
) -> None:
    """Train a stage with Lightning.

    Args:
        module: What to train.
        batches: A loader.
        steps: Optimiser steps.
        log: Folder for the values of each step, as CSV.
        callbacks: Lightning callbacks.
    """
    train(module, batches, log=log, callbacks=callbacks, max_steps=steps, gradient_clip_val=1.0)
