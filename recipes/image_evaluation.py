"""Examining a diffusion model: generate every cell, ask the judge, measure Fréchet distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.recipes.accuracy_sweep import Hits
from aihwkit_lora.recipes.canvas import Pixels
from aihwkit_lora.recipes.diffusion import sample
from aihwkit_lora.recipes.image_data import ImageData, Pictures
from aihwkit_lora.recipes.judges import Judge, frechet_distance, judge_images, noise

_AT_ONCE = 130
_HALVED = 4


def generate(
    model: nn.Module,
    data: ImageData,
    styles: Sequence[int],
    *,
    per_cell: int,
    seed: int,
    steps: int = 10,
    canvas: Pixels | None = None,
) -> Pictures:
    """Generate images of all objects in some styles.

    Args:
        model: A diffusion model.
        data: Names the objects.
        styles: Indices.
        per_cell: Images of each style and object.
        seed: Of the noise they start from; the same seed gives the same noise.
        steps: Evaluations of the model for each image.
        canvas: What the model draws on; None for pixels.
    """
    count, canvas = len(data.objects), canvas or Pixels(data.image_shape)
    cells = torch.arange(count).repeat_interleave(per_cell)
    objects = cells.repeat(len(styles))
    pairs = torch.tensor(list(styles)).repeat_interleave(len(cells))
    images = draw(model, pairs * count + objects, canvas, seed, steps=steps)
    return Pictures(images=images, styles=pairs, objects=objects)


def draw(model: nn.Module, label: Tensor, canvas: Pixels, seed: int, *, steps: int = 10) -> Tensor:
    """Generate an image for each label.

    Args:
        model: A diffusion model.
        label: ``style · objects + object``, shape ``(n,)``.
        canvas: What the model draws on.
        seed: Of the noise they start from.
        steps: Evaluations of the model for each image.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(label), *canvas.shape, generator=generator)
    parts = zip(label.split(_AT_ONCE), start.split(_AT_ONCE), strict=True)
    drawn = [sample(model, some, noise=part, steps=steps) for some, part in parts]
    return canvas.decode(torch.cat(drawn))


class DrawnStyles(nn.Module):
    """A diffusion model seen as a classifier: of each label, the style that the judge sees.

    That is what a sweep over drifting chips looks at. Images of a label start from the same noise
    each time.

    Args:
        model: A diffusion model.
        judge: A trained judge.
        canvas: What the model draws on.
        seed: Of the noise that images are generated from.
        steps: Evaluations of the model for each image.

    Example:
        >>> from aihwkit_lora.recipes.diffusion import DiffusionShape, DiffusionTransformer
        >>> model = DiffusionTransformer(DiffusionShape(width=8, depth=1, styles=2, objects=3))
        >>> judge, canvas = Judge(1, styles=2, objects=3), Pixels((1, 20, 20))
        >>> shown = DrawnStyles(model, judge, canvas, seed=0, steps=1)
        >>> shown(torch.arange(6)).shape
        torch.Size([6, 3])
    """

    def __init__(
        self, model: nn.Module, judge: Judge, canvas: Pixels, *, seed: int, steps: int = 10
    ) -> None:
        super().__init__()
        self.model, self.judge = model, judge
        self._canvas, self._seed, self._steps = canvas, seed, steps

    def forward(self, label: Tensor) -> Tensor:
        """Draw and judge.

        Args:
            label: ``style · objects + object``, shape ``(n,)``.
        Returns:
            Shape ``(n, styles + 1)``, 1 for the style that is seen and 0 for the others; the last
            one stands for none.
        """
        images = draw(self.model, label, self._canvas, self._seed, steps=self._steps)
        return F.one_hot(judge_images(self.judge, images).styles, self.judge.styles + 1).float()


class Examiner:
    """Measures what a model draws.

    Args:
        data: Real images.
        judge: A trained judge.
        per_cell: Generated images of each style and object.
        seed: Of the noise that images are generated from.
        steps: Evaluations of the model for each image.
        canvas: What models draw on; None for pixels.
    """

    def __init__(
        self,
        data: ImageData,
        judge: Judge,
        *,
        per_cell: int,
        seed: int,
        steps: int = 10,
        canvas: Pixels | None = None,
    ) -> None:
        self.data, self.judge, self.per_cell = data, judge, per_cell
        self.seed, self.steps = seed, steps
        self.canvas = canvas or Pixels(data.image_shape)
        self._real = {
            style: judge_images(judge, data.test.of(style).images).features
            for style in range(len(data.styles))
        }

    def learnt(self, model: nn.Module) -> dict[str, float]:
        """Metrics of a model that has learnt all styles but the new one.

        Args:
            model: A diffusion model.
        Returns:
            Fractions of images that show the style (the object) they shall, over cells that were
            trained; of unseen cells that show both; and the mean Fréchet distance over styles.
        """
        seen = self._shown(model, self.data.learnt)
        return {
            "learnt_accuracy": seen["style"],
            "learnt_object_accuracy": seen["object"],
            **self._unseen(seen),
            **self._distances(seen, self.data.kept),
        }

    def adapted(
        self, model: nn.Module, before: Mapping[str, float], *, new: bool
    ) -> dict[str, float]:
        """Metrics of a model that has forgotten a style.

        Args:
            model: A diffusion model.
            before: Metrics of the programmed model, to compare distances with.
            new: Whether it has learnt the new style.
        Returns:
            As for :meth:`learnt`, over kept styles; ``forget_accuracy``, the fraction of images
            asked for in the forgotten style that show it; and the worst ratio of a kept style's
            Fréchet distance to the one before.
        """
        kept = self._shown(model, self.data.kept)
        metrics = {
            "forget_accuracy": self.forgotten(model),
            "retain_accuracy": kept["style"],
            "retain_object_accuracy": kept["object"],
            **self._unseen(kept),
            **self._distances(kept, self.data.kept),
        }
        ratios = [metrics[key] / before[key] for key in metrics if key.startswith("frechet/")]
        metrics["frechet_worst_ratio"] = max(ratios)
        metrics["frechet_ratio"] = metrics["frechet_distance"] / before["frechet_distance"]
        if new:
            added = self._shown(model, (self.data.new,))
            metrics |= {
                "new_accuracy": added["style"],
                "new_object_accuracy": added["object"],
                "new_frechet_distance": self._distances(added, (self.data.new,))[
                    "frechet_distance"
                ],
            }
        return metrics

    def forgotten(self, model: nn.Module) -> float:
        """Fraction of images asked for in the forgotten style that show it.

        Args:
            model: A diffusion model.
        """
        return float(self._shown(model, (self.data.forgotten,))["style"])

    def right_by_style(self, model: nn.Module) -> Tensor:
        """Count images that show the style they shall, from one image of each style and object.

        Args:
            model: A diffusion model.
        Returns:
            Whole numbers, shape ``(styles,)``; up to the number of objects.
        """
        label, styles = self.cells
        return Hits.per_class(self.drawn_styles(model)(label)[None], styles)[0]

    @property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Label and style of each cell, a style and an object; shape ``(n,)`` each."""
        styles, objects = len(self.data.styles), len(self.data.objects)
        return torch.arange(styles * objects), torch.arange(styles).repeat_interleave(objects)

    def drawn_styles(self, model: nn.Module) -> DrawnStyles:
        """A model seen as a classifier, whose classes are styles.

        Args:
            model: A diffusion model.
        """
        return DrawnStyles(model, self.judge, self.canvas, seed=self.seed, steps=self.steps)

    def own(self) -> dict[str, float]:
        """Metrics of the judge itself, on real test images and on noise.

        ``judge_frechet_floor``, the mean distance between two halves of a style's test images, is
        left out where styles have fewer than four.
        """
        real = self.data.test
        verdict = judge_images(self.judge, real.images)
        generator = torch.Generator().manual_seed(self.seed)
        rubbish = judge_images(self.judge, noise(real, real, generator)).styles
        features = [f for f in self._real.values() if len(f) >= _HALVED]
        halves = [frechet_distance(f[::2], f[1::2]) for f in features]
        floor = {"judge_frechet_floor": sum(halves) / len(halves)} if halves else {}
        return {
            "judge_style_accuracy": _fraction(verdict.styles == real.styles),
            "judge_object_accuracy": _fraction(verdict.objects == real.objects),
            "judge_noise_rejected": _fraction(rubbish == self.judge.styles),
            **floor,
        }

    def grid(self, model: nn.Module, file: Path) -> None:
        """Write a picture of one image of each cell: a row for each style.

        Args:
            model: A diffusion model.
            file: A PNG.
        """
        styles = range(len(self.data.styles))
        pictures = self._generate(model, styles, per_cell=1)
        write_grid(pictures.images, len(self.data.objects), file)

    def _generate(self, model: nn.Module, styles: Sequence[int], per_cell: int) -> Pictures:
        return generate(
            model,
            self.data,
            styles,
            per_cell=per_cell,
            seed=self.seed,
            steps=self.steps,
            canvas=self.canvas,
        )

    def _shown(self, model: nn.Module, styles: Sequence[int]) -> dict[str, Any]:
        pictures = self._generate(model, styles, per_cell=self.per_cell)
        verdict = judge_images(self.judge, pictures.images)
        style, object = verdict.styles == pictures.styles, verdict.objects == pictures.objects
        unseen = self.data.unseen[pictures.styles, pictures.objects]
        return {
            "style": _fraction(style[~unseen]),
            "object": _fraction(object[~unseen]),
            "unseen": (style & object)[unseen],
            "features": {s: verdict.features[pictures.styles == s] for s in styles},
        }

    def _unseen(self, shown: Mapping[str, Any]) -> dict[str, float]:
        return {"unseen_accuracy": _fraction(shown["unseen"])} if len(shown["unseen"]) else {}

    def _distances(self, shown: Mapping[str, Any], styles: Sequence[int]) -> dict[str, float]:
        found = {
            style: frechet_distance(shown["features"][style], self._real[style]) for style in styles
        }
        by_name = {f"frechet/{self.data.styles[s]}": value for s, value in found.items()}
        return {"frechet_distance": sum(found.values()) / len(found), **by_name}


def write_grid(images: Tensor, columns: int, file: Path) -> None:
    """Write images side by side, twice as large.

    Args:
        images: From -1 to 1, shape ``(n, channels, size, size)`` with 1 or 3 channels.
        columns: Images in a row.
        file: A PNG.
    """
    from PIL import Image

    framed = F.pad(images.clamp(-1, 1), (1, 1, 1, 1), value=0.0).expand(-1, 3, -1, -1)
    rows = [torch.cat([*row], dim=2) for row in framed.split(columns)]
    tiled = torch.cat(rows, dim=1).permute(1, 2, 0)
    picture = Image.fromarray(((tiled + 1) * 127.5).byte().contiguous().numpy())
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(file)


def _fraction(true: Tensor) -> float:
    return float(true.double().mean())
