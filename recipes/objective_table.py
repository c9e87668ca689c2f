"""Forgetting by every objective: each person in turn, several seeds, beside retrained models.

The networks, images and arrays are those of ``face_recognition``. For each seed five people are
learnt and programmed once; then each of them is forgotten in turn by each objective, in a LoRA
branch on the same arrays. What comes out is compared with models that were trained from scratch
without that person and programmed into arrays of the same chip.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts
from aihwkit_lora.recipes.face_data import FaceImages, load_faces
from aihwkit_lora.recipes.face_objectives import require_usable
from aihwkit_lora.recipes.face_recognition import FaceRecognition, Job
from aihwkit_lora.recipes.face_verification import without_forgotten
from aihwkit_lora.recipes.recipe import RECIPES, Recipe, reported
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.stage_training import Evaluation
from aihwkit_lora.reporting import RunReport, StageRecord
from aihwkit_lora.tiles.write_noise import noisy_outputs
from aihwkit_lora.unlearning import objectives
from aihwkit_lora.unlearning.metrics import js_divergence, tug_of_war

RETRAINED = "retrained again"
"""Arm of the second retrained model: as close to the first one as anything can be expected."""

_COLUMNS = {
    "forget_accuracy": "forgotten",
    "retain_accuracy": "kept, train",
    "test_accuracy": "kept, test",
    "tug_of_war": "Tug-of-War",
    "js_forget": "JS, forgotten",
    "js_retain": "JS, kept",
    "noisy_forget_mean": "noisy chips, forgotten: mean",
    "noisy_forget_worst": "worst",
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveTable:
    """Options of the recipe.

    Args:
        data: Data set of the face recipe.
        split: How its photos are split.
        people: Who is learnt, and forgotten in turn.
        objectives: Names with commas between them; all that work on classifiers if empty.
        seeds: How many seeds.
        seed: The first one.
        chip: Where everything runs.
        learn_epochs: Epochs of learning, from scratch, in torch.
        forget_epochs: Epochs of forgetting.
        forget_rank: Rank of the adapter.
        noisy_chips: Simulated programmings on which the forgotten person is looked for; at least 1.
        sigma_siemens: Write noise of a cell on them.
        download: Whether a missing data set may be fetched from the internet.
    Raises:
        ConfigurationError: A number is too small, or an objective is not one for classifiers.

    Example:
        >>> ObjectiveTable(objectives="npo, bounded_ga").chosen
        ('npo', 'bounded_ga')
    """

    data: str = "digits"
    split: str = "source"
    people: tuple[int, ...] = (0, 1, 2, 3, 4)
    objectives: str = ""
    seeds: int = 5
    seed: int = 0
    chip: str = "rm-180nm"
    learn_epochs: int = 150
    forget_epochs: int = 15
    forget_rank: int = 6
    noisy_chips: int = 100
    sigma_siemens: float = 5e-6
    download: bool = True

    def __post_init__(self) -> None:
        for name in ("seeds", "learn_epochs", "forget_epochs", "forget_rank", "noisy_chips"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"expected {name} of at least 1, found {getattr(self, name)}."
                )
        for name in self.chosen:
            require_usable(name)
        self.face(self.seed, self.people[0])

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the objectives."""
        named = tuple(name.strip() for name in self.objectives.split(",") if name.strip())
        return named or tuple(filter(_for_classifiers, objectives.names()))

    def face(self, seed: int, person: int) -> FaceRecognition:
        """Configure the face recipe for one person to forget.

        Args:
            seed: Of images, split, training and programming.
            person: Who is forgotten.
        """
        return FaceRecognition(
            data=self.data,
            split=self.split,
            learnt=self.people,
            forgotten=person,
            new=next(each for each in range(len(self.people) + 1) if each not in self.people),
            seed=seed,
            chip=self.chip,
            learn_epochs=self.learn_epochs,
            forget_epochs=self.forget_epochs,
            forget_rank=self.forget_rank,
            download=self.download,
            baseline=False,
        )


def run(config: ObjectiveTable, folder: RunFolder) -> RunReport:
    """Forget every person by every objective; leave the table as ``table.md``.

    Args:
        config: What to run.
        folder: Keeps finished parts, and hands them back when a run is resumed.
    """
    rows: dict[str, list[StageRecord]] = {name: [] for name in (RETRAINED, *config.chosen)}
    for seed in range(config.seed, config.seed + config.seeds):
        base = _programmed(config, seed, folder)
        for person in config.people:
            trial = Trial(config, seed, person, folder)
            rows[RETRAINED].append(trial.floor())
            for name in config.chosen:
                rows[name].append(trial.forget(name, base))
    chip = al.chips.find(config.chip)
    arms = {name: (_summary(records, chip),) for name, records in rows.items()}
    write_table(arms, config, folder.path / "table.md")
    return reported("unlearning_objectives", config, arms)


class Trial:
    """One person to forget, with one seed.

    Args:
        config: Options of the recipe.
        seed: Of everything.
        person: Who is forgotten.
        folder: Keeps what is done.
    """

    def __init__(self, config: ObjectiveTable, seed: int, person: int, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.name = f"{seed}-{person}"
        face = config.face(seed, person)
        self.job = Job(face, load_faces(face), al.chips.find(config.chip), folder)

    def floor(self) -> StageRecord:
        """Compare two retrained models."""
        return self.folder.stage(f"floor-{self.name}", self._floor).record

    def forget(self, name: str, programmed: nn.Module) -> StageRecord:
        """Forget by one objective and compare with a retrained model.

        Args:
            name: Of the objective.
            programmed: Model on arrays, from which forgetting starts; left as it is.
        """
        work = partial(self._forget, name, programmed)
        return self.folder.stage(f"forget-{self.name}-{name}", work).record

    def _floor(self) -> Finished:
        retrained = self._retrained(1)
        metrics = self._metrics(retrained.model)
        record = dataclasses.replace(retrained.record, name="forget", metrics=metrics)
        return Finished(nn.Identity(), record)

    def _forget(self, name: str, programmed: nn.Module) -> Finished:
        face = dataclasses.replace(self.job.config, objective=name)
        forgotten = Job(face, self.job.people, self.job.chip, self.folder).forget(programmed)
        metrics = {**forgotten.record.metrics, **self._metrics(forgotten.model)}
        # Only the numbers are kept: hundreds of models would fill a disk.
        return Finished(
            nn.Identity(), dataclasses.replace(forgotten.record, metrics=metrics, steps=())
        )

    def _retrained(self, number: int) -> Finished:
        return self.folder.stage(f"retrained-{self.name}-{number}", partial(self._retrain, number))

    def _retrain(self, number: int) -> Finished:
        other = without_forgotten(self.job, number)
        return other.program(other.learn().model)

    def _metrics(self, model: nn.Module) -> dict[str, float]:
        faces, forgotten = self.job.people, self.job.people.forgotten
        sets = {
            "forget": faces.train.of(forgotten),
            "retain": faces.train.of(*faces.kept),
            "test": faces.test.of(*faces.kept),
        }
        reference = self._retrained(0).model
        ours, theirs = _accuracies(model, sets), _accuracies(reference, sets)
        unseen = faces.test.of(forgotten)
        return {
            **ours,
            "forget_test_accuracy": _accuracy(model, unseen),
            "tug_of_war": tug_of_war(ours, theirs),
            "js_forget": _divergence(model, reference, sets["forget"]),
            "js_retain": _divergence(model, reference, sets["retain"]),
            **self._on_noisy_chips(model, unseen),
        }

    def _on_noisy_chips(self, model: nn.Module, faces: FaceImages) -> dict[str, float]:
        logits = noisy_outputs(
            model,
            faces.images,
            chips=self.config.noisy_chips,
            sigma_siemens=self.config.sigma_siemens,
            seed=self.job.config.seed,
        )
        accuracies = (logits.argmax(-1) == faces.labels).double().mean(-1)
        return {
            "noisy_forget_mean": float(accuracies.mean()),
            "noisy_forget_worst": float(accuracies.max()),
        }


def write_table(
    arms: Mapping[str, Sequence[StageRecord]], config: ObjectiveTable, file: Path
) -> None:
    """Write mean and standard deviation of every column, as Markdown.

    Args:
        arms: By objective, one record of means each.
        config: What was run.
        file: Where to.
    """
    lines = [
        f"{config.data}, split '{config.split}', {config.chip}, {config.seeds} seeds × "
        f"{len(config.people)} people: mean ± standard deviation. Noisy chips: "
        f"{config.noisy_chips} programmings with {1e6 * config.sigma_siemens:g} µS, images that "
        "nobody has seen; of the worst the mean, and the worst of all in brackets.",
        "",
        f"| objective | {' | '.join(_COLUMNS.values())} |",
        "|---" * (1 + len(_COLUMNS)) + "|",
    ]
    for name, (record,) in arms.items():
        cells = [_cell(record.metrics, column) for column in _COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(metrics: Mapping[str, float], column: str) -> str:
    mean, spread = metrics[column], metrics[f"{column}_std"]
    if column.endswith("_worst"):
        return f"{100 * mean:.1f} % ({100 * metrics[f'{column}_highest']:.0f} %)"
    if column in ("tug_of_war", "js_forget", "js_retain"):
        return f"{mean:.3f} ± {spread:.3f}"
    return f"{100 * mean:.1f} ± {100 * spread:.1f} %"


def _programmed(config: ObjectiveTable, seed: int, folder: RunFolder) -> nn.Module:
    face = config.face(seed, config.people[0])
    job = Job(face, load_faces(face), al.chips.find(config.chip), folder)
    learnt = folder.stage(f"learn-{seed}", job.learn)
    return folder.stage(f"program-{seed}", lambda: job.program(learnt.model)).model


def _summary(records: Sequence[StageRecord], chip: al.chips.Chip) -> StageRecord:
    """Mean, spread and highest value of each metric; counts of all trials together."""
    counts = Counts.sum(record.counts for record in records)
    return StageRecord(
        name="forget",
        metrics=dict(_statistics(records)),
        counts=counts,
        energy=al.price(counts, chip),
        trainable_parameters=records[0].trainable_parameters,
        fingerprint="",
        wall_s=sum(record.wall_s for record in records),
    )


def _statistics(records: Sequence[StageRecord]) -> Iterable[tuple[str, float]]:
    for key in records[0].metrics:
        values = [record.metrics[key] for record in records]
        yield key, statistics.fmean(values)
        yield f"{key}_std", statistics.stdev(values) if len(values) > 1 else 0.0
        yield f"{key}_highest", max(values)


def _accuracies(model: nn.Module, sets: Mapping[str, FaceImages]) -> dict[str, float]:
    return {f"{name}_accuracy": _accuracy(model, faces) for name, faces in sets.items()}


def _accuracy(model: nn.Module, faces: FaceImages) -> float:
    return Evaluation.of(model, faces).accuracy(*faces.labels.unique().tolist())


def _divergence(model: nn.Module, reference: nn.Module, faces: FaceImages) -> float:
    return float(js_divergence(_probabilities(model, faces), _probabilities(reference, faces)))


def _probabilities(model: nn.Module, faces: FaceImages) -> Tensor:
    return Evaluation.of(model, faces).logits.double().softmax(dim=1)


def _for_classifiers(name: str) -> bool:
    try:
        require_usable(name)
    except ConfigurationError:
        return False
    return True


RECIPES.add(
    "unlearning_objectives",
    Recipe(
        name="unlearning_objectives",
        summary="forget each person by each objective; compare with retrained models",
        config=ObjectiveTable,
        run=run,
    ),
)
