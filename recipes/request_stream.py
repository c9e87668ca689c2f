"""A stream of requests, learn and forget in any order, served by adapters on frozen arrays.

A mixer learns some people and is programmed once. Every request after that gets a LoRA branch of
its own; all branches stay active, in sum, and those that forget are sealed. Beside it run the
composition of arXiv:2601.10037's face code, in which only the newest branch is active, and, for
each phase, a network that is trained from scratch on whoever is known at that time.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.continual.composition import Composition, add_adapter_
from aihwkit_lora.continual.streams import Phase, TaskStream
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.face_data import FaceDataConfig, load_faces
from aihwkit_lora.recipes.face_objectives import Objective, hinge, learning, varied
from aihwkit_lora.recipes.face_training import Schedule, Trainee, fit
from aihwkit_lora.recipes.mixer import MlpMixer
from aihwkit_lora.recipes.recipe import RECIPES, Recipe, reported
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.stage_training import VALIDATION, Evaluation, Score, StepRecorder
from aihwkit_lora.recipes.staged_job import StagedJob
from aihwkit_lora.reporting import RunReport, StageRecord
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_

TEN = (
    "learn 5, forget 2, learn 6, forget 0, learn 7, forget 5, learn 8, forget 3, learn 9, forget 6"
)
"""Ten requests; two of those to be forgotten were learnt by an adapter."""


@dataclass(frozen=True, kw_only=True)
class RequestStream:
    """Options of the recipe.

    Args:
        data: Data set of the face recipe.
        split: How its photos are split.
        first: People who are learnt before the arrays are programmed.
        requests: ``learn PERSON`` and ``forget PERSON``, with commas between them.
        newest: Whether to run the arm in which only the newest adapter is active.
        retrained: Whether to train from scratch for each phase.
        seed: Of images, training and programming.
        chip: Where the model runs.
        learn_epochs: Epochs of learning in torch, at first and from scratch.
        adapter_epochs: Epochs of each adapter.
        rank: Rank of each adapter.
        lora_scale: Factor on an adapter's output; ``lora_alpha`` is this times the rank.
        margin: Logits by which forgotten outputs shall stay below the winner.
        label_smoothing: Share of the target that is spread over everybody who is known, 0 to 1.
        learning_rate: Of the adapters, at its peak.
        batch_size: Images per step of the adapters.
        download: Whether a missing data set may be fetched from the internet.
    Raises:
        ConfigurationError: The stream makes no sense, or a number is too small.

    Example:
        >>> RequestStream(requests="forget 1, learn 7").people
        (0, 1, 2, 3, 4, 7)
    """

    data: str = "digits"
    split: str = "source"
    first: tuple[int, ...] = (0, 1, 2, 3, 4)
    requests: str = TEN
    newest: bool = True
    retrained: bool = True
    seed: int = 0
    chip: str = "rm-180nm"
    learn_epochs: int = 150
    adapter_epochs: int = 40
    rank: int = 8
    lora_scale: float = 4.0
    margin: float = 5.0
    label_smoothing: float = 0.1
    learning_rate: float = 4e-3
    batch_size: int = 128
    download: bool = True

    def __post_init__(self) -> None:
        al.chips.find(self.chip)
        for name in ("learn_epochs", "adapter_epochs", "rank", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    f"expected {name} of at least 1, found {getattr(self, name)}."
                )
        if len(self.people) < len(self.first) + 1:
            raise ConfigurationError(
                f"expected a stream that learns somebody, found '{self.requests}'."
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The requests, each with where it leaves the stream."""
        start = "learn " + " ".join(map(str, self.first))
        return tuple(TaskStream.parse([start, *self.requests.split(",")]))[1:]

    @property
    def people(self) -> tuple[int, ...]:
        """Everybody, in the order of learning, which is that of the outputs."""
        return tuple(int(unit) for unit in self.phases[-1].learnt_so_far)


def run(config: RequestStream, folder: RunFolder) -> RunReport:
    """Serve all requests in every arm.

    Args:
        config: What to run.
        folder: Keeps finished phases, and hands them back when a run is resumed.
    """
    job = Job(config, folder)
    learnt = folder.stage("learn", partial(job.learn, config.first, seed=config.seed))
    programmed = folder.stage("program", partial(job.program, learnt.model))
    start = (learnt.record, programmed.record)
    arms = {"hybrid": (*start, *job.serve(programmed.model, Composition.SUM))}
    if config.newest:
        arms["newest"] = (*start, *job.serve(programmed.model, Composition.NEWEST))
    if config.retrained:
        arms["retrained"] = tuple(job.from_scratch())
    write_table(arms, folder.path / "table.md")
    return reported("request_stream", config, arms)


class Job(StagedJob):
    """The stages of one run.

    Args:
        config: Options.
        folder: Keeps what is done.
    """

    def __init__(self, config: RequestStream, folder: RunFolder) -> None:
        super().__init__(al.chips.find(config.chip), folder)
        self.config = config
        *before, last = config.people
        self.faces = load_faces(
            FaceDataConfig(
                data=config.data,
                split=config.split,
                learnt=tuple(before),
                forgotten=before[0],
                new=last,
                seed=config.seed,
                download=config.download,
            )
        )

    def learn(self, people: Sequence[int], *, seed: int) -> Finished:
        """Learn some people in torch, from scratch. That is off the chip and not counted.

        Args:
            people: Who.
            seed: Of weights and order.
        """
        torch.manual_seed(1000 * seed)
        start, labels = time.perf_counter(), self._labels(people)
        model = MlpMixer(outputs=len(self.config.people))
        schedule = Schedule(
            epochs=self.config.learn_epochs, learning_rate=5e-3, batch_size=64, weight_decay=0.01
        )
        trainee = Trainee(
            model, learning(weight_noise=0.03), schedule, score=lambda e: -e.loss(*labels)
        )
        log = self.folder.path / "logs" / "learn"
        fit(trainee, self.faces.train.of(*labels), self.faces, schedule, log=log, callbacks=[])
        metrics = self._accuracies(model, people)
        return self._finished("learn", model, Counts(), start, metrics=metrics)

    def program(self, learnt: nn.Module) -> Finished:
        """Convert, program by write–verify, and freeze.

        Args:
            learnt: Model in torch.
        """
        start = time.perf_counter()
        model, counts = self._on_arrays(learnt, seed=self.config.seed)
        metrics = self._accuracies(model, self.config.first)
        return self._finished("program", model, counts, start, metrics=metrics)

    def serve(self, programmed: nn.Module, composition: Composition) -> Iterator[StageRecord]:
        """Serve all requests, one adapter each.

        Args:
            programmed: Model on arrays; left as it is.
            composition: Which adapters are active.
        """
        model, records = copy.deepcopy(programmed), list[StageRecord]()
        for phase in self.config.phases:
            name = f"{composition}-{stage_name(phase)}"
            finished = self.folder.stage(name, partial(self._serve, phase, model, composition))
            model = finished.model
            records.append(_with_relapse(finished.record, records, phase))
            yield records[-1]

    def from_scratch(self) -> Iterator[StageRecord]:
        """Train a network for each phase, on whoever is known then."""
        for phase in self.config.phases:
            name, people = stage_name(phase), [int(unit) for unit in phase.kept]
            seed = self.config.seed + 100 + phase.index
            work = partial(self.learn, people, seed=seed)
            record = self.folder.stage(f"retrained-{name}", work).record
            yield dataclasses.replace(record, name=name)

    def _serve(self, phase: Phase, model: nn.Module, composition: Composition) -> Finished:
        config = self.config
        torch.manual_seed(1000 * config.seed + phase.index)
        adapter = LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_scale * config.rank,  # type: ignore[arg-type]
            # New people need other features, not only another use of those that are there.
            target_modules=al.target_modules(model),
        )
        name = phase.request.adapter
        peft = add_adapter_(model, name, adapter, composition=composition)
        finished = self._train(phase, peft, composition)
        if not phase.learns and composition is Composition.SUM:
            log = RequestLog(self.folder.path / "requests.jsonl")
            seal_(peft, name, request=str(phase.request), log=log)
        return finished

    def _train(self, phase: Phase, model: nn.Module, composition: Composition) -> Finished:
        name, ledger, start = stage_name(phase), Ledger(), time.perf_counter()
        schedule = Schedule(
            epochs=self.config.adapter_epochs,
            learning_rate=self.config.learning_rate,
            batch_size=self.config.batch_size,
        )
        trainee = Trainee(
            model, self._objective(phase, composition), schedule, score=self._score(phase)
        )
        recorder = StepRecorder(ledger, self.chip, partial(self._metrics, model, phase))
        meter = EnergyMeter(self.chip, ledger, phase=name, validation_phase=VALIDATION)
        callbacks = [FrozenGuard(), meter, PulseCounter(ledger), recorder]
        people = phase.kept if phase.learns else (*phase.kept, *phase.units)
        images = self.faces.train.of(*self._labels(map(int, people)))
        log = self.folder.path / "logs" / f"{composition}-{name}"
        fit(trainee, images, self.faces, schedule, log=log, callbacks=callbacks)
        metrics = self._metrics(model, phase)
        peaks = [step.metrics.get("forget_accuracy", 0.0) for step in recorder.steps]
        if phase.learns and phase.forgotten_so_far:
            metrics["peak_forget_accuracy"] = max(peaks)
        return self._finished(name, model, ledger.total(phase=name), start, metrics=metrics)

    def _objective(self, phase: Phase, composition: Composition) -> Objective:
        gone = [unit for unit in phase.forgotten_so_far if unit not in phase.units]
        # The paper's code learns the new person by cross-entropy alone.
        held = gone if composition is Composition.SUM else []
        return serving(
            kept=self._labels(map(int, phase.kept)),
            forgotten=() if phase.learns else self._labels(map(int, phase.units)),
            gone=self._labels(map(int, held)),
            margin=self.config.margin,
            label_smoothing=self.config.label_smoothing,
        )

    def _score(self, phase: Phase) -> Score:
        kept = self._labels(map(int, phase.kept))
        if phase.learns:
            return lambda e: -e.loss(*kept)
        forgotten = self._labels(map(int, phase.units))
        return lambda e: -e.loss(*kept) - 10.0 * e.accuracy(*forgotten)

    def _metrics(self, model: nn.Module, phase: Phase) -> dict[str, float]:
        metrics = self._accuracies(model, map(int, phase.kept))
        evaluation = Evaluation.of(model, self.faces.test)
        forgotten = {
            f"forgotten_{person}": evaluation.accuracy(*self._labels([int(person)]))
            for person in phase.forgotten_so_far
        }
        if forgotten:
            metrics |= {"forget_accuracy": max(forgotten.values()), **forgotten}
        if phase.learns:
            new = self._labels(map(int, phase.units))
            metrics["new_accuracy"] = evaluation.accuracy(*new)
        return metrics

    def _accuracies(self, model: nn.Module, people: Iterable[int]) -> dict[str, float]:
        labels = self._labels(people)
        return {"retain_accuracy": Evaluation.of(model, self.faces.test).accuracy(*labels)}

    def _labels(self, people: Iterable[int]) -> tuple[int, ...]:
        return tuple(self.config.people.index(person) for person in people)


def serving(
    *,
    kept: Sequence[int],
    forgotten: Sequence[int],
    gone: Sequence[int],
    margin: float,
    label_smoothing: float = 0.0,
) -> Objective:
    """Know some people, forget others, and hold down whoever was forgotten before.

    Cross-entropy to the label, or for people to forget to a uniform mix of the kept ones, and for
    each forgotten output a hinge that keeps it below the winner, on every image at hand. Bounded.

    Args:
        kept: Outputs of people to know.
        forgotten: Outputs of people to forget now, whose images are there.
        gone: Outputs of people forgotten before, of whom no image is left.
        margin: Wanted distance in logits.
        label_smoothing: Share of the target that is spread over the kept outputs, 0 to 1.

    Example:
        >>> loss = serving(kept=[0, 1], forgotten=[2], gone=[3], margin=5.0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
        >>> loss(model, torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 2])).shape
        torch.Size([])
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor, *, progress: float = 0.0) -> Tensor:
        logits = model(varied(images))
        target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        nobody = torch.zeros_like(target[0])
        nobody[list(kept)] = 1.0 / len(kept)
        target = (1.0 - label_smoothing) * target + label_smoothing * nobody
        target[torch.isin(labels, torch.tensor([*forgotten], dtype=labels.dtype))] = nobody
        held = [hinge(logits, output, margin) for output in (*forgotten, *gone)]
        return sum(held, F.cross_entropy(logits, target))

    return loss


def stage_name(phase: Phase) -> str:
    """Name a phase in records and files.

    Args:
        phase: Any phase.

    Example:
        >>> stage_name(RequestStream(requests="forget 1, learn 7").phases[1])
        '02-learn-7'
    """
    return f"{phase.index:02d}-{phase.request.adapter}"


def write_table(arms: Mapping[str, Sequence[StageRecord]], file: Path) -> None:
    """Write what each phase left in each arm, as Markdown.

    Args:
        arms: Records by arm; those of learning and programming are left out.
        file: Where to.
    """
    titles = {
        "retain_accuracy": "kept",
        "forget_accuracy": "forgotten, worst person",
        "relapse": "relapse",
        "peak_forget_accuracy": "forgotten, worst epoch",
    }
    phases = {arm: {r.name: r for r in records} for arm, records in arms.items()}
    cells = [
        (arm, column)
        for arm in arms
        for column in (titles if arm != "retrained" else ("retain_accuracy",))
    ]
    heads = [f"{arm}: {titles[column]}" for arm, column in cells]
    lines = [f"| request | {' | '.join(heads)} | pulses |", "|---" * (2 + len(heads)) + "|"]
    for name in (r.name for r in arms["hybrid"] if r.name[:2].isdigit()):
        found = (phases[arm][name].metrics.get(column) for arm, column in cells)
        shown = ["" if value is None else f"{100 * value:.1f} %" for value in found]
        request, pulses = name[3:].replace("-", " ", 1), phases["hybrid"][name].pulses
        lines.append(f"| {request} | {' | '.join(shown)} | {pulses} |")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _with_relapse(record: StageRecord, earlier: Sequence[StageRecord], phase: Phase) -> StageRecord:
    """Add by how much anybody forgotten before is known better than right after the forgetting."""
    rises = []
    for person in phase.forgotten_so_far:
        key = f"forgotten_{person}"
        right_after = next((r.metrics[key] for r in earlier if key in r.metrics), None)
        if right_after is not None:
            rises.append(record.metrics[key] - right_after)
    if not rises:
        return record
    return dataclasses.replace(record, metrics={**record.metrics, "relapse": max(rises)})


RECIPES.add(
    "request_stream",
    Recipe(
        name="request_stream",
        summary="serve learn and forget requests in any order, one adapter each, without a pulse",
        config=RequestStream,
        run=run,
    ),
)
