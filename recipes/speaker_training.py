"""How a stage of the speaker recipe is trained: objectives, Adam on one cycle, the best epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from aihwkit_lora.chips import Chip
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.speaker_data import SpeakerClips
from aihwkit_lora.recipes.speaker_features import varied
from aihwkit_lora.recipes.stage_training import BestEpoch, shaken, train
from aihwkit_lora.unlearning.objectives.relabelling import KLUniform

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a model, what it sees of clips ``(n, windows, bands)`` and labels ``(n,)`` to a loss."""


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """How long and how fast a stage trains.

    Args:
        epochs: Passes over the clips, at least 1.
        learning_rate: At its peak, above 0.
        batch_size: Clips per step, at least 1.
    Raises:
        ConfigurationError: A value is out of its range.

    Example:
        >>> OneCycle(epochs=30, learning_rate=2e-3).batch_size
        128
    """

    epochs: int
    learning_rate: float
    batch_size: int = 128

    @classmethod
    def of_steps(cls, steps: int, *, clips: int, learning_rate: float, batch_size: int) -> OneCycle:
        """Take as many whole epochs as it takes to get at least this number of steps.

        Args:
            steps: At least 1.
            clips: In an epoch.
            learning_rate: At its peak, above 0.
            batch_size: Clips per step, at least 1.

        Example:
            >>> OneCycle.of_steps(24, clips=1800, learning_rate=1e-3, batch_size=512).epochs
            6
        """
        epochs = math.ceil(steps / math.ceil(clips / batch_size))
        return cls(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"schedule: expected {name} of 1 or more, got {getattr(self, name)}."
                )
        if not self.learning_rate > 0.0:
            raise ConfigurationError(
                f"schedule: expected learning_rate above 0, got {self.learning_rate}."
            )


def naming(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy: each clip shall be given its speaker's name.

    Args:
        model: Gives logits.
        clips: Shape ``(n, windows, bands)``.
        labels: Shape ``(n,)``.

    Example:
        >>> naming(nn.Flatten(), torch.zeros(2, 1, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    return F.cross_entropy(model(clips), labels)


def noisy_naming(weight_noise: float) -> Loss:
    """Cross-entropy under random weights around the present ones, so that write errors matter less.

    Args:
        weight_noise: Standard deviation of each linear layer's weights, as a fraction of the
            layer's largest magnitude; 0 for none. Cells are programmed to ±1/30 of that.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> noisy_naming(0.1)(net, torch.ones(3, 1, 4), torch.tensor([0, 1, 1])).shape
        torch.Size([])
    """

    def loss(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
        noisy = shaken(model, weight_noise)
        return F.cross_entropy(torch.func.functional_call(model, noisy, (clips,)), labels)

    return loss if weight_noise else naming


def forgetting(*, forgotten: int, kept: Sequence[int]) -> Loss:
    """Clips of one speaker shall sound like anybody else's equally; the others keep their names.

    Args:
        forgotten: Output of the speaker to forget.
        kept: Outputs of everybody else who was learnt.

    Example:
        >>> loss = forgetting(forgotten=1, kept=(0, 2))
        >>> loss(nn.Flatten(), torch.zeros(2, 1, 3), torch.tensor([0, 1]))
        tensor(0.7520)
    """
    objective = KLUniform(outputs=tuple(kept), pooled=True)

    def loss(model: nn.Module, clips: Tensor, labels: Tensor) -> Tensor:
        own = labels == forgotten
        parts = {"forget": (clips[own], labels[own]), "retain": (clips[~own], labels[~own])}
        return objective.loss(model, parts)

    return loss


@contextmanager
def saturating(model: nn.Module, chip: Chip) -> Iterator[nn.Module]:
    """Let the linear layers of a torch model clip, in the block, as the ADCs of a chip will.

    Each layer is read in parts of at most ``chip.rows`` inputs. A column's sum over one part ends
    where the ADC does: at ``adc_full_scale`` times the part's largest input times the tile's
    largest weight; beyond it no gradient flows. A network that has never met that end may lose
    several points of accuracy to it once it is programmed. What converters round is left out.

    Args:
        model: Its ``nn.Linear`` layers are read differently; their weights are as they were.
        chip: Tells how large tiles are, and where their ADCs end.
    Yields:
        The model itself.

    Example:
        >>> from dataclasses import replace
        >>> import aihwkit_lora as al
        >>> chip = replace(al.chips.get("rm-180nm"), rows=4, adc_full_scale=2.0)
        >>> layer = nn.Linear(8, 1, bias=False)
        >>> _ = layer.weight.data.fill_(0.5)
        >>> with saturating(layer, chip):
        ...     print(layer(torch.ones(1, 8)).item(), layer(torch.eye(8)[:1]).item())
        2.0 0.5
        >>> layer(torch.ones(1, 8)).item()
        4.0
    """
    read = partial(_read_within, chip)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(read) for layer in layers]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _read_within(chip: Chip, layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """What a layer gives if each of its tiles clips."""
    linear, (x,) = cast(nn.Linear, layer), args
    out_size, in_size = linear.weight.shape
    across, along = -(-out_size // chip.columns), -(-in_size // chip.rows)
    total: Tensor = output.new_zeros(()) if linear.bias is None else linear.bias
    parts = zip(x.tensor_split(along, -1), linear.weight.tensor_split(along, 1), strict=True)
    for inputs, weight in parts:
        tiles = weight.detach().tensor_split(across, 0)
        largest = torch.cat([tile.abs().max().expand(len(tile)) for tile in tiles])
        end = chip.adc_full_scale * inputs.detach().abs().amax(-1, keepdim=True) * largest
        total = total + (inputs @ weight.T).clamp(-end, end)
    return total


class SpeakerTrainee(BestEpoch):
    """A network in one stage of the speaker recipe.

    Args:
        model: Its parameters that want a gradient are trained.
        loss: What to minimise.
        schedule: Steps and rates.
        options: Of :class:`BestEpoch`.
    """

    def __init__(self, model: nn.Module, loss: Loss, schedule: OneCycle, **options: Any) -> None:
        super().__init__(model, **options)
        self._loss, self._schedule = loss, schedule

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of a batch of spike counts, varied anew each time, and labels."""
        spikes, labels = batch
        return self._loss(self.model, varied(spikes), labels)

    def configure_optimizers(self) -> Any:
        """Adam over what wants a gradient, its rate on one cycle."""
        optimizer = Adam(self._trained(), lr=self._schedule.learning_rate)
        cycle = OneCycleLR(
            optimizer,
            self._schedule.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


def fit(
    trainee: SpeakerTrainee,
    clips: SpeakerClips,
    validation: SpeakerClips,
    schedule: OneCycle,
    *,
    log: Path,
    callbacks: list[pl.Callback],
) -> None:
    """Train a stage with Lightning, and go back to its best epoch.

    Args:
        trainee: What to train.
        clips: What to train on.
        validation: What to pick the best epoch on.
        schedule: Epochs and batch size.
        log: Folder for the values of each step, as CSV.
        callbacks: Lightning callbacks.
    """
    data = TensorDataset(clips.spikes, clips.labels)
    held = TensorDataset(validation.inputs, validation.labels)
    train(
        trainee,
        DataLoader(data, batch_size=min(schedule.batch_size, len(clips)), shuffle=True),
        DataLoader(held, batch_size=len(validation)),
        log=log,
        callbacks=callbacks,
        max_epochs=schedule.epochs,
    )
