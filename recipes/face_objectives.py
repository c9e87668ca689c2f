"""Objectives of the face-recognition stages, and how images vary while training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.stage_training import shaken
from aihwkit_lora.unlearning import objectives
from aihwkit_lora.unlearning.objectives.diffusion import Diffusion
from aihwkit_lora.unlearning.objectives.hidden import RMU
from aihwkit_lora.unlearning.objectives.relabelling import Relabels
from aihwkit_lora.unlearning.objectives.tokens import TokenLevel

OWN = "kl_uniform"
"""Name of what :func:`forgetting` does: the registered objective of that name, in one pass."""


LAST_BLOCK = "blocks.1"
"""Layer of the recipe's mixer that objectives on hidden features look at."""


class Objective(Protocol):
    """From a model, images ``(n, 1, size, size)`` and labels ``(n,)`` to a loss."""

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, progress: float = 0.0
    ) -> Tensor:
        """Compute the loss; ``progress`` is the fraction of the training that is done."""


def learning(*, weight_noise: float, label_smoothing: float = 0.1) -> Objective:
    """Cross-entropy under random weights around the present ones, so that write errors matter less.

    Args:
        weight_noise: Standard deviation of each linear layer's weights, as a fraction of the
            layer's largest magnitude. Cells are programmed to ±1/30 of that.
        label_smoothing: Share of the target spread over all outputs.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor, *, progress: float = 0.0) -> Tensor:
        noisy = shaken(model, weight_noise)
        logits: Tensor = torch.func.functional_call(model, noisy, (varied(images),))
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    return loss


def forgetting(*, forgotten: int, kept: Sequence[int], margin: float) -> Objective:
    """Keep everybody but one, whose images shall look like any of the others equally.

    The loss is bounded, unlike the gradient ascent of arXiv:2601.10037's code: cross-entropy to
    the label for kept people and to a uniform mix of the kept people for the forgotten one, and a
    hinge that keeps the forgotten output below the winner by a margin on every image.

    Args:
        forgotten: Output of the person to forget.
        kept: Outputs of everybody else who was learnt.
        margin: Wanted distance in logits.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor, *, progress: float = 0.0) -> Tensor:
        logits = model(varied(images))
        target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        nobody = torch.zeros_like(target[0])
        nobody[list(kept)] = 1.0 / len(kept)
        target[labels == forgotten] = nobody
        return F.cross_entropy(logits, target) + hinge(logits, forgotten, margin)

    return loss


@dataclass(frozen=True)
class Registered:
    """A registered objective on batches of everybody: who is to be forgotten is picked out.

    Args:
        objective: Takes a forget part, a retain part, or both.
        forgotten: Output of the person to forget.

    Example:
        >>> loss = Registered(objectives.get("bounded_ga")(), forgotten=2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(256, 6))
        >>> loss(model, torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 2])).shape
        torch.Size([])
    """

    objective: objectives.Objective
    forgotten: int

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, progress: float = 0.0
    ) -> Tensor:
        """Compute the loss; 0 for a batch that lacks a part which the objective needs."""
        images, forget = varied(images), labels == self.forgotten
        masks = {"forget": forget, "retain": ~forget}
        batch = {part: (images[m], labels[m]) for part, m in masks.items() if m.any()}
        if self.objective.needs & masks.keys() <= batch.keys():
            return self.objective.loss(model, batch, progress=progress)
        nothing: Tensor = 0.0 * model(images).sum()
        return nothing


def require_usable(name: str) -> None:
    """See that an objective can forget a person.

    Args:
        name: Of a registered objective.
    Raises:
        UnknownNameError: There is none of that name.
        ConfigurationError: It is one for diffusion or for tokens.

    Example:
        >>> require_usable("esd")
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.ConfigurationError: objective 'esd': expected one for classifiers, ...
    """
    kind = objectives.get(name)
    for family, purpose in ((Diffusion, "diffusion models"), (TokenLevel, "language models")):
        if issubclass(kind, family):
            raise ConfigurationError(
                f"objective '{name}': expected one for classifiers, got one for {purpose}. Take "
                f"'{OWN}' or '{objectives.DEFAULT}', for example."
            )


def forgetting_by(name: str, *, forgotten: int, kept: Sequence[int], margin: float) -> Objective:
    """Forget by an objective of the registry, with its own settings; ``margin`` is for the default.

    Args:
        name: See :func:`require_usable`.
        forgotten: Output of the person to forget.
        kept: Outputs of everybody else who was learnt.
        margin: Wanted distance in logits, of the default one.

    Example:
        >>> loss = forgetting_by("masked_teacher", forgotten=2, kept=(0, 1, 3, 4), margin=5.0)
        >>> loss.objective.outputs
        (0, 1, 3, 4)
    """
    if name == OWN:
        return forgetting(forgotten=forgotten, kept=kept, margin=margin)
    kind, options = objectives.get(name), dict[str, Any]()
    if issubclass(kind, Relabels) and len(kept) > 1:
        options["outputs"] = tuple(kept)
    if issubclass(kind, RMU):
        options["layer"] = LAST_BLOCK
    return Registered(kind(**options), forgotten)


def needs_a_branch(name: str) -> bool:
    """Tell whether an objective works on adapters alone, not where all weights are trained.

    Args:
        name: Of a registered objective.

    Example:
        >>> needs_a_branch("npo"), needs_a_branch("kl_uniform")
        (True, False)
    """
    return name == "negation" or "reference" in objectives.get(name).needs


def continuing(*, forgotten: int, margin: float, vary: bool = True) -> Objective:
    """Learn a new person beside the kept ones, without any image of the forgotten one.

    The hinge of :func:`forgetting` is held on the images at hand.

    Args:
        forgotten: Output that must not win again.
        margin: Wanted distance in logits.
        vary: Whether images vary from step to step.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor, *, progress: float = 0.0) -> Tensor:
        logits = model(varied(images) if vary else images)
        return F.cross_entropy(logits, labels) + hinge(logits, forgotten, margin)

    return loss


def hinge(logits: Tensor, output: int, margin: float) -> Tensor:
    """Mean of max(0, margin + z_output − largest other z).

    Args:
        logits: Shape ``(n, outputs)``.
        output: The one that shall stay below.
        margin: By how much.

    Example:
        >>> hinge(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), output=0, margin=2.0)
        tensor(1.5000)
    """
    others = logits.clone()
    others[:, output] = -math.inf
    return F.relu(margin + logits[:, output] - others.amax(dim=1)).mean()


def varied(
    images: Tensor, *, shift: float = 1.0, rotation_degrees: float = 10.0, zoom: float = 0.1
) -> Tensor:
    """Rotate, zoom and shift each image a little at random; edges are repeated.

    Args:
        images: Shape ``(n, 1, size, size)``.
        shift: Largest shift either way, in pixels.
        rotation_degrees: Largest rotation either way.
        zoom: Largest relative change of size.
    Returns:
        Shape of ``images``.

    Example:
        >>> varied(torch.rand(3, 1, 16, 16)).shape
        torch.Size([3, 1, 16, 16])
    """
    count, size = len(images), images.shape[-1]
    draw = 2.0 * torch.rand(4, count) - 1.0
    angle, scale = math.radians(rotation_degrees) * draw[0], 1.0 + zoom * draw[1]
    maps = torch.zeros(count, 2, 3)
    maps[:, 0, 0] = maps[:, 1, 1] = scale * angle.cos()
    maps[:, 0, 1], maps[:, 1, 0] = -scale * angle.sin(), scale * angle.sin()
    maps[:, :, 2] = 2.0 * shift / size * draw[2:].T
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
