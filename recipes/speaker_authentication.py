"""Speaker authentication: learn, program, freeze, forget one, enrol another, restore; counted.

The second workload of arXiv:2601.10037: a recurrent spiking network learns five speakers in torch
and is programmed into arrays of resistive memory. One speaker is then forgotten, and a new one
learnt, each by a LoRA branch inside the time loop, beside the frozen arrays; the branch that
forgets is sealed. Then the arrays err by write noise, and a third branch makes up for it. Beside
it runs the baseline that trains all weights and writes the arrays after every step.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, FrozenGuard, PulseCounter
from aihwkit_lora.chips import Chip
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.continual.head import grow_head_
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering import Counts, Ledger
from aihwkit_lora.recipes.face_ratios import ratios
from aihwkit_lora.recipes.recipe import RECIPES, Recipe
from aihwkit_lora.recipes.reprogramming import Reprogrammer, train_all_weights_
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.speaker_data import (
    SpeakerClips,
    SpeakerData,
    SpeakerDataConfig,
    load_speakers,
)
from aihwkit_lora.recipes.speaker_training import (
    Heard,
    Loss,
    OneCycle,
    SpeakerTrainee,
    fit,
    forgetting,
    naming,
    noisy_naming,
)
from aihwkit_lora.recipes.spiking import LORA_TARGETS, NEURONS, SpikingNet, WiderHead
from aihwkit_lora.recipes.training import VALIDATION, StepRecorder
from aihwkit_lora.reporting import Ratio, RunReport, StageRecord, StepRecord, environment
from aihwkit_lora.tiles.write_noise import noisy_chips, noisy_outputs
from aihwkit_lora.unlearning.auditing import audit
from aihwkit_lora.unlearning.metrics.probe import linear_probe
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_, seals


@dataclass(frozen=True, kw_only=True)
class SpeakerAuthentication(SpeakerDataConfig):
    """Options of the recipe; those of the data come first.

    Args:
        chip: Name of the chip to program and to price for, or a YAML file that describes one.
        baseline: Whether to run the arm that reprograms all weights.
        quick: Few epochs and clips, to see that everything works. Results mean nothing.
        neuron: Who computes the neurons: ``"torch"``, or ``"snntorch"`` where it is installed.
        hidden: Neurons.
        learn_epochs: Epochs of learning the first speakers, in torch.
        weight_noise: Weight noise while learning, as a fraction of the largest weight.
        rank: Rank of every adapter.
        lora_alpha: Their ``lora_alpha``; divided by the rank it is the factor on their output.
        forget_epochs: Epochs of the adapter that forgets.
        continue_epochs: Epochs of the adapter and the row that learn the new speaker.
        replay: Part of the kept speakers' clips that is still there when the new one joins.
        noise_siemens: Standard deviation of the write noise of a cell.
        noise_chips: Simulated chips that the noise is judged on; the first one is restored.
        restore_epochs: Epochs of the adapter that restores.
        batch_size: Clips per step.
        reprogram_forget_steps: Steps in which the baseline forgets; whole epochs are made of them.
        reprogram_continue_steps: Steps in which the baseline learns the new speaker.
        reprogram_batch_size: Clips per step of the baseline, each of which writes all arrays.

    Example:
        >>> SpeakerAuthentication(data="voices", seed=1).forgotten
        1
    """

    chip: str = "rm-180nm"
    baseline: bool = True
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
    noise_siemens: float = 1e-6
    noise_chips: int = 10
    restore_epochs: int = 8
    batch_size: int = 128
    reprogram_forget_steps: int = 24
    reprogram_continue_steps: int = 64
    reprogram_batch_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        al.chips.find(self.chip)
        NEURONS.get(self.neuron)
        counts = ("_epochs", "_steps", "_size", "_chips")
        for name in (field.name for field in dataclasses.fields(self)):
            if name.endswith(counts) or name in ("rank", "hidden"):
                self._require(name, "of at least 1", getattr(self, name) >= 1)
        for name in ("weight_noise", "noise_siemens"):
            self._require(name, "of 0 or more", getattr(self, name) >= 0.0)
        self._require("replay", "above 0, up to 1", 0.0 < self.replay <= 1.0)

    def _require(self, name: str, expected: str, satisfied: bool) -> None:
        if not satisfied:
            raise ConfigurationError(f"expected {name} {expected}, found {getattr(self, name)}.")

    @property
    def resolved(self) -> SpeakerAuthentication:
        """What is run: the options, or the smaller ones of a quick run."""
        if not self.quick:
            return self
        clips = min(self.clips_per_speaker or _QUICK_CLIPS, _QUICK_CLIPS)
        limits = {name: min(getattr(self, name), most) for name, most in _QUICK.items()}
        return replace(self, quick=False, clips_per_speaker=clips, **limits)


_QUICK_CLIPS = 30
_QUICK: Mapping[str, Any] = {
    "learn_epochs": 10,
    "forget_epochs": 4,
    "continue_epochs": 6,
    "restore_epochs": 2,
    "noise_chips": 2,
    "reprogram_forget_steps": 4,
    "reprogram_continue_steps": 4,
}


def run(config: SpeakerAuthentication, folder: RunFolder) -> RunReport:
    """Run all stages of both arms.

    Args:
        config: What to run.
        folder: Keeps finished stages, and hands them back when a run is resumed.
    """
    resolved = config.resolved
    job = Job(resolved, load_speakers(resolved), al.chips.find(config.chip), folder)
    learnt = folder.stage("learn", job.learn)
    programmed = folder.stage("program", lambda: job.program(learnt.model))
    forgotten = folder.stage("hybrid-forget", lambda: job.forget(programmed.model))
    continued = folder.stage("hybrid-continue", lambda: job.continue_(forgotten.model))
    noisy = folder.stage("hybrid-noise", lambda: job.noise(continued.model))
    restored = folder.stage("hybrid-restore", lambda: job.restore(noisy.model))
    start = (learnt.record, programmed.record)
    stages = (forgotten, continued, noisy, restored)
    arms = {"hybrid": (*start, *(stage.record for stage in stages))}
    if config.baseline:
        forgotten = folder.stage("reprogram-forget", lambda: job.rewrite(programmed.model))
        continued = folder.stage("reprogram-continue", lambda: job.rewrite_on(forgotten.model))
        arms["reprogram"] = (*start, forgotten.record, continued.record)
    return RunReport(
        recipe="speaker_authentication",
        chip=config.chip,
        seed=config.seed,
        config=dataclasses.asdict(config),
        environment=environment(),
        arms=arms,
        ratios=tuple(_of_clips(ratio) for ratio in ratios(arms, job.chip)),
    )


class Job:
    """The stages of one run.

    Args:
        config: Options.
        speakers: Clips of everybody.
        chip: Where the model runs.
        folder: Where logs and adapters go.
    """

    def __init__(
        self, config: SpeakerAuthentication, speakers: SpeakerData, chip: Chip, folder: RunFolder
    ) -> None:
        self.config, self.speakers, self.chip, self.folder = config, speakers, chip, folder

    def learn(self) -> Finished:
        """Learn the first speakers in torch. That happens off the chip and is not counted."""
        self._seed("learn")
        config, learnt, start = self.config, self.speakers.learnt, time.perf_counter()
        model = SpikingNet(neurons=config.hidden, outputs=len(learnt), neuron=config.neuron)
        schedule = self._schedule(config.learn_epochs, 2e-3)
        loss = noisy_naming(config.weight_noise)
        trainee = SpeakerTrainee(model, loss, schedule, score=lambda heard: -heard.loss(*learnt))
        self._fit(trainee, schedule, self.speakers.train.of(*learnt), "learn")
        return self._finished("learn", model, Counts(), start, metrics=self._learnt(model))

    def program(self, learnt: nn.Module) -> Finished:
        """Convert, program by write–verify, and freeze."""
        start, ledger = time.perf_counter(), Ledger()
        model = al.convert(learnt, self.chip).requires_grad_(False)
        al.program_(model, self.chip, ledger=ledger, phase="program", seed=self.config.seed)
        al.freeze_(model)
        metrics = self._learnt(model)
        return self._finished("program", model, ledger.total(), start, metrics=metrics)

    def forget(self, programmed: nn.Module) -> Finished:
        """Forget one speaker by a LoRA branch, and seal it."""
        # PEFT puts adapters into the model it is given; the other arm starts from the same one.
        model = self._with_adapter(copy.deepcopy(programmed), "forget")
        schedule = self._schedule(self.config.forget_epochs, 4e-3)
        finished = self._adapt("forget", model, self._forgetting(), schedule)
        log = RequestLog(self.folder.path / "requests.jsonl")
        seal_(model, "forget", request=f"speaker {self.config.forgotten}", log=log)
        return finished

    def continue_(self, forgotten: nn.Module) -> Finished:
        """Learn a new speaker by a second branch and a digital row of the head."""
        model = self._with_adapter(forgotten, "continue")
        grow_head_(model, 1, head="head", generator=self._generator("grow"))
        schedule = self._schedule(self.config.continue_epochs, 2e-3)
        finished = self._adapt("continue", model, naming, schedule)
        model.save_pretrained(str(self.folder.path / "adapters"))
        return finished

    def noise(self, continued: nn.Module) -> Finished:
        """Let the arrays err as if written less well: one chip in full, and a series of them."""
        start, test = time.perf_counter(), self.speakers.test
        with self._noisy(continued):
            metrics = self._after_continuing(continued)
        logits = noisy_outputs(
            continued, test.inputs, chips=self.config.noise_chips, **self._noise_options()
        )
        chips = [Heard(each, test.labels) for each in logits]
        known = [self._known(heard) for heard in chips]
        metrics |= {
            "known_accuracy_mean": sum(known) / len(known),
            "known_accuracy_worst": min(known),
            "forget_accuracy_worst": max(h.accuracy(self.speakers.forgotten) for h in chips),
        }
        return self._finished("noise", continued, Counts(), start, metrics=metrics)

    def restore(self, noisy: nn.Module) -> Finished:
        """Make up for one chip's write noise by a third branch; the others stay active."""
        model = self._with_adapter(noisy, "restore")
        schedule = self._schedule(self.config.restore_epochs, 2e-3)
        finished = self._adapt("restore", model, naming, schedule, self._noisy(model))
        model.save_pretrained(str(self.folder.path / "adapters"))
        return finished

    def rewrite(self, programmed: nn.Module) -> Finished:
        """Forget by training all weights, written into the arrays after each step."""
        model = train_all_weights_(copy.deepcopy(programmed))
        steps = self.config.reprogram_forget_steps
        return self._reprogram("forget", model, self._forgetting(), steps)

    def rewrite_on(self, forgotten: nn.Module) -> Finished:
        """Learn the new speaker in the same way; its row of the head is digital here too."""
        self._seed("grow")
        model = cast(Any, forgotten)
        model.head = WiderHead(model.head, self.config.hidden, 1)
        steps = self.config.reprogram_continue_steps
        return self._reprogram("continue", forgotten, naming, steps)

    def _adapt(
        self,
        stage: str,
        model: PeftModel,
        loss: Loss,
        schedule: OneCycle,
        chip: AbstractContextManager[Any] | None = None,
    ) -> Finished:
        trainee = SpeakerTrainee(model, loss, schedule, score=self._score(stage))
        with chip or nullcontext():
            return self._train("hybrid", stage, trainee, schedule, Ledger(), FrozenGuard())

    def _reprogram(self, stage: str, model: nn.Module, loss: Loss, steps: int) -> Finished:
        ledger = Ledger()
        schedule = OneCycle.of_steps(
            steps,
            clips=len(self._clips(stage)),
            learning_rate=1e-3,
            batch_size=self.config.reprogram_batch_size,
        )
        seed = self.config.seed + len(stage)
        write = Reprogrammer(model, self.chip, ledger, phase=stage, seed=seed)
        trainee = SpeakerTrainee(model, loss, schedule, after_step=write)
        return self._train("reprogram", stage, trainee, schedule, ledger)

    def _train(
        self,
        arm: str,
        stage: str,
        trainee: SpeakerTrainee,
        schedule: OneCycle,
        ledger: Ledger,
        *guards: FrozenGuard,
    ) -> Finished:
        model, start = trainee.model, time.perf_counter()
        clips = self._clips(stage)
        evaluate = self._after_forgetting if stage == "forget" else self._after_continuing
        recorder = StepRecorder(ledger, self.chip, lambda: evaluate(model))
        meter = EnergyMeter(self.chip, ledger, phase=stage, validation_phase=VALIDATION)
        callbacks = [*guards, meter, PulseCounter(ledger), recorder]
        self._seed(stage)
        self._fit(trainee, schedule, clips, f"{arm}-{stage}", callbacks)
        metrics = {**evaluate(model), **self._without_adapters(model)}
        counts = ledger.total(phase=stage)
        steps = tuple(recorder.steps)
        return self._finished(stage, model, counts, start, metrics=metrics, steps=steps)

    def _fit(
        self,
        trainee: SpeakerTrainee,
        schedule: OneCycle,
        clips: SpeakerClips,
        log: str,
        callbacks: list[Any] | None = None,
    ) -> None:
        outputs = clips.labels.unique().tolist()
        fit(
            trainee,
            clips,
            self.speakers.validation.of(*outputs),
            schedule,
            log=self.folder.path / "logs" / log,
            callbacks=callbacks or [],
        )

    def _clips(self, stage: str) -> SpeakerClips:
        """Clips of everybody learnt so far; the forgotten speaker's are gone once forgotten."""
        speakers = self.speakers
        if stage == "forget":
            return speakers.train.of(*speakers.learnt)
        left = speakers.train.of(*speakers.kept, speakers.new)
        generator = self._generator("replay")
        return left.replay(self.config.replay, generator, whole=speakers.new).balanced()

    def _forgetting(self) -> Loss:
        return forgetting(forgotten=self.speakers.forgotten, kept=self.speakers.kept)

    def _score(self, stage: str) -> Callable[[Heard], float]:
        speakers = self.speakers
        if stage == "forget":
            forgotten, kept = speakers.forgotten, speakers.kept
            return lambda heard: -heard.loss(*kept) - 10.0 * heard.accuracy(forgotten)
        return lambda heard: -heard.loss(*speakers.kept, speakers.new)

    def _schedule(self, epochs: int, rate: float) -> OneCycle:
        return OneCycle(epochs=epochs, learning_rate=rate, batch_size=self.config.batch_size)

    def _with_adapter(self, model: nn.Module, stage: str) -> PeftModel:
        # PEFT takes whole numbers by its annotation and any by its arithmetic.
        alpha = cast(int, self.config.lora_alpha)
        config = LoraConfig(r=self.config.rank, lora_alpha=alpha, target_modules=LORA_TARGETS)
        self._seed(stage)
        return add_adapter_(model, stage, config)

    def _noisy(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        return noisy_chips(model, chip=0, **self._noise_options())

    def _noise_options(self) -> dict[str, Any]:
        return {
            "sigma_siemens": self.config.noise_siemens,
            "seed": self.config.seed,
            "mapping": self.chip.mapping,
        }

    def _learnt(self, model: nn.Module) -> dict[str, float]:
        heard = Heard.of(model, self.speakers.test)
        return {"learnt_accuracy": heard.accuracy(*self.speakers.learnt)}

    def _after_forgetting(self, model: nn.Module) -> dict[str, float]:
        return self._forgotten_and_kept(Heard.of(model, self.speakers.test))

    def _after_continuing(self, model: nn.Module) -> dict[str, float]:
        heard = Heard.of(model, self.speakers.test)
        return {
            **self._forgotten_and_kept(heard),
            "new_accuracy": heard.accuracy(self.speakers.new),
            "known_accuracy": self._known(heard),
        }

    def _known(self, heard: Heard) -> float:
        """Accuracy on everybody who is known in the end."""
        return heard.accuracy(*self.speakers.kept, self.speakers.new)

    def _forgotten_and_kept(self, heard: Heard) -> dict[str, float]:
        return {
            "forget_accuracy": heard.accuracy(self.speakers.forgotten),
            "retain_accuracy": heard.accuracy(*self.speakers.kept),
        }

    def _without_adapters(self, model: nn.Module) -> dict[str, float]:
        """What is still there: a probe on the hidden neurons, and the arrays without adapters."""
        if not isinstance(model, PeftModel):
            return {}
        speakers = self.speakers
        trained = [parameter.requires_grad for parameter in model.parameters()]
        sealed = audit(model, reason="evaluation") if seals(model) else nullcontext()
        with sealed, model.disable_adapter():
            heard = Heard.of(model, speakers.test)
        # PEFT 0.21 makes every active adapter trainable on the way out.
        for parameter, flag in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(flag)
        return {
            "probe_forget_accuracy": self._probed(cast(SpikingNet, model.get_base_model())),
            "adapter_off_forget_accuracy": heard.accuracy(speakers.forgotten),
        }

    @torch.no_grad()
    def _probed(self, network: SpikingNet) -> float:
        """Forgotten clips that an attacker names who has clips of everybody and sees all spikes."""
        train, test = self.speakers.train, self.speakers.test.of(self.speakers.forgotten)
        rates = [network.rates(clips.inputs) for clips in (train, test)]
        return linear_probe(rates[0], train.labels, rates[1], test.labels)

    def _seed(self, stage: str) -> None:
        torch.manual_seed(1000 * self.config.seed + _STREAMS.index(stage))

    def _generator(self, stage: str) -> torch.Generator:
        seed = 1000 * self.config.seed + _STREAMS.index(stage)
        return torch.Generator().manual_seed(seed)

    def _finished(
        self,
        name: str,
        model: nn.Module,
        counts: Counts,
        start: float,
        *,
        metrics: dict[str, float],
        steps: tuple[StepRecord, ...] = (),
    ) -> Finished:
        frozen = next(al.frozen_layers(model), None) is not None
        # Nothing is trained while noise is looked at, whatever the stage before has left.
        trained = (p.numel() for p in model.parameters() if p.requires_grad and name != "noise")
        record = StageRecord(
            name=name,
            metrics=metrics,
            counts=counts,
            energy=al.price(counts, self.chip),
            trainable_parameters=sum(trained),
            fingerprint=al.fingerprint(model) if frozen else "",
            steps=steps,
            wall_s=time.perf_counter() - start,
        )
        return Finished(model, record)


_STREAMS = ("learn", "forget", "continue", "restore", "grow", "replay")
"""Stages with random numbers of their own."""


def _of_clips(ratio: Ratio) -> Ratio:
    """The ratios of the face recipe say image where a clip is meant."""
    texts = ("name", "numerator", "denominator", "includes")
    return replace(
        ratio, **{text: getattr(ratio, text).replace("per image", "per clip") for text in texts}
    )


RECIPES.add(
    "speaker_authentication",
    Recipe(
        name="speaker_authentication",
        summary="forget one speaker, enrol another, restore, by LoRA on a frozen spiking network",
        config=SpeakerAuthentication,
        run=run,
    ),
)
