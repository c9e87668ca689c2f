"""Judges of generated images: which style and object they show, or that they show neither.

A classifier without a class for rubbish calls pure noise something. So the judge has a reject
class, and is trained on real images beside noise, blanks, mixtures and broken images. Accuracy
alone hides damage; the Fréchet distance between features of generated and real images shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from aihwkit_lora.recipes.image_data import PATCH, ImageData, Pictures

FEATURES = 32
"""Features that the Fréchet distance compares: the judge's last hidden layer."""

_BATCH = 96
_WEAK_NOISE = 0.15
_TOO_CLOSE = 5.0


class Judge(nn.Module):
    """Name the style and the object of images, with one class more for neither.

    Args:
        channels: Of an image.
        styles: Number of styles; class ``styles`` rejects.
        objects: Number of objects; class ``objects`` rejects.

    Example:
        >>> style, object = Judge(1, styles=10, objects=26)(torch.zeros(3, 1, 20, 20))
        >>> style.shape, object.shape
        (torch.Size([3, 11]), torch.Size([3, 27]))
    """

    def __init__(self, channels: int, *, styles: int, objects: int) -> None:
        super().__init__()
        self.styles, self.objects = styles, objects
        self.body = nn.Sequential(
            *_stage(channels, 24),
            *_stage(24, 48),
            nn.Conv2d(48, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, FEATURES),
        )
        self.style = nn.Linear(FEATURES, styles + 1)
        self.object = nn.Linear(FEATURES, objects + 1)

    def features(self, images: Tensor) -> Tensor:
        """Last hidden layer, before its ReLU; shape ``(n, 32)``."""
        found: Tensor = self.body(images)
        return found

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of styles ``(n, styles + 1)`` and of objects ``(n, objects + 1)``."""
        hidden = torch.relu(self.features(images))
        return self.style(hidden), self.object(hidden)


def _stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """What the judge says about some images.

    Args:
        styles: Index of the style, or the number of styles for a rejected image.
        objects: The same for objects.
        features: Shape ``(n, 32)``.
    """

    styles: Tensor
    objects: Tensor
    features: Tensor


@torch.no_grad()
def judge_images(judge: Judge, images: Tensor) -> Verdict:
    """Ask the judge about images.

    Args:
        judge: A trained judge.
        images: Shape ``(n, channels, size, size)``; values outside of [-1, 1] are cut off.

    Example:
        >>> judge_images(Judge(1, styles=2, objects=3), torch.zeros(5, 1, 20, 20)).features.shape
        torch.Size([5, 32])
    """
    features = torch.cat([judge.features(part.clamp(-1, 1)) for part in images.split(512)])
    hidden = torch.relu(features)
    return Verdict(
        styles=judge.style(hidden).argmax(dim=1),
        objects=judge.object(hidden).argmax(dim=1),
        features=features,
    )


def train_judge(data: ImageData, *, steps: int, seed: int) -> Judge:
    """Train a judge on real images of all cells and on images to reject.

    Args:
        data: Its training images, unseen cells and the new style included.
        steps: Optimiser steps.
        seed: Of the initial weights, of batches and of rejected images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(
            data.train.images.shape[1], styles=len(data.styles), objects=len(data.objects)
        )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        loss = _loss(judge, data.train, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return judge.eval().requires_grad_(False)


def _loss(judge: Judge, pictures: Pictures, generator: Generator) -> Tensor:
    real = pictures.where(_draw(len(pictures), _BATCH, generator))
    # A little noise is no reason to reject an image.
    weak = _WEAK_NOISE * torch.rand(_BATCH, 1, 1, 1, generator=generator)
    clear = real.images + weak * torch.randn(real.images.shape, generator=generator)
    broken = rejects(pictures, _BATCH // 2, generator)
    style, object = judge(torch.cat([clear.clamp(-1, 1), broken]))
    nothing = torch.full((len(broken),), judge.styles)
    other = torch.full((len(broken),), judge.objects)
    return F.cross_entropy(style, torch.cat([real.styles, nothing])) + F.cross_entropy(
        object, torch.cat([real.objects, other])
    )


def rejects(pictures: Pictures, count: int, generator: Generator) -> Tensor:
    """Make images that show nothing well: noise, blanks, mixtures and broken images.

    Args:
        pictures: Real images, the material for mixtures and broken ones.
        count: How many images.
        generator: Draws everything.
    Returns:
        Shape ``(count, channels, size, size)``, from -1 to 1, the kinds in turn.
    """
    kinds = (noise, blank, mixture, broken, shuffled)
    made = []
    for number, kind in enumerate(kinds):
        material = pictures.where(
            _draw(len(pictures), len(range(number, count, len(kinds))), generator)
        )
        made.append(kind(material, pictures, generator))
    return torch.cat(made).clamp(-1, 1)


def noise(material: Pictures, pictures: Pictures, generator: Generator) -> Tensor:
    """Noise, coarse or fine, strong or weak, alone or over an image."""
    shape = material.images.shape
    count = shape[0]
    fine = torch.randn(shape, generator=generator)
    coarse = F.interpolate(F.avg_pool2d(fine, 2) * 2, shape[-1], mode="bilinear")
    rough = torch.where(_coin(count, generator), fine, coarse)
    strength = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    image = torch.where(_coin(count, generator), material.images, torch.zeros(()))
    return image * 0.5 + strength * rough


def blank(material: Pictures, pictures: Pictures, generator: Generator) -> Tensor:
    """One brightness, with a little noise."""
    level = 2 * torch.rand(len(material), 1, 1, 1, generator=generator) - 1
    weak = 0.2 * torch.rand(len(material), 1, 1, 1, generator=generator)
    return level + weak * torch.randn(material.images.shape, generator=generator)


def mixture(material: Pictures, pictures: Pictures, generator: Generator) -> Tensor:
    """Two images of different objects, blended or one over the other."""
    other = pictures.where(_draw(len(pictures), len(material), generator))
    part = 0.35 + 0.3 * torch.rand(len(material), 1, 1, 1, generator=generator)
    blend = part * material.images + (1 - part) * other.images
    over = torch.maximum(material.images, other.images)
    mixed = torch.where(_coin(len(material), generator), blend, over)
    return _or_shuffled(mixed, material, other, generator)


def broken(material: Pictures, pictures: Pictures, generator: Generator) -> Tensor:
    """Between 40 % and 70 % of all patches are replaced by those of another image."""
    other = pictures.where(_draw(len(pictures), len(material), generator))
    share = 0.4 + 0.3 * torch.rand(len(material), 1, generator=generator)
    patches = _cut(material.images)
    chosen = torch.rand(patches.shape[:2], generator=generator) < share
    mixed = _joined(torch.where(chosen[..., None], _cut(other.images), patches), material.images)
    return _or_shuffled(mixed, material, other, generator)


def shuffled(material: Pictures, pictures: Pictures, generator: Generator) -> Tensor:
    """The patches of an image in another order."""
    patches = _cut(material.images)
    order = torch.rand(patches.shape[:2], generator=generator).argsort(dim=1)
    return _joined(patches.gather(1, order[..., None].expand_as(patches)), material.images)


def _or_shuffled(
    mixed: Tensor, material: Pictures, other: Pictures, generator: Generator
) -> Tensor:
    """Shuffle what looks like one of the two images still, as an I over a T does."""
    apart = [(mixed - each.images).flatten(1).norm(dim=1) for each in (material, other)]
    close = torch.minimum(*apart) < _TOO_CLOSE
    same = material.objects == other.objects
    return torch.where(
        (close | same).view(-1, 1, 1, 1), shuffled(material, other, generator), mixed
    )


def _cut(images: Tensor) -> Tensor:
    return F.unfold(images, PATCH, stride=PATCH).mT


def _joined(patches: Tensor, like: Tensor) -> Tensor:
    return F.fold(patches.mT, like.shape[-2:], PATCH, stride=PATCH)


def _coin(count: int, generator: Generator) -> Tensor:
    return torch.rand(count, 1, 1, 1, generator=generator) < 0.5


def _draw(total: int, count: int, generator: Generator) -> Tensor:
    return torch.randint(total, (count,), generator=generator)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Distance between two sets of features, each taken for a Gaussian.

    ``|m₁ - m₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½)`` (Heusel et al., arXiv:1706.08500). Unlike there, the
    features are those of our own judge, so values only compare with each other.

    Args:
        first: Shape ``(n, features)``, n at least 2.
        second: Shape ``(m, features)``, m at least 2.

    Example:
        >>> points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> round(frechet_distance(points, points + 2.0), 6)
        8.0
    """
    first, second = first.double(), second.double()
    apart = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    one, two = torch.cov(first.mT), torch.cov(second.mT)
    # The eigenvalues of C₁C₂ are those of the symmetric C₁^½ C₂ C₁^½.
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    shared = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return float(apart + one.trace() + two.trace() - 2 * shared)
