"""Findings about a model under attack: what somebody gets back who tries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.errors import ConfigurationError, UnsupportedTileError
from aihwkit_lora.registry import nearest
from aihwkit_lora.tiles.freeze import frozen_layers, plain_name
from aihwkit_lora.tiles.layers import FrozenLayer
from aihwkit_lora.tiles.write_noise import noisy_outputs
from aihwkit_lora.unlearning.metrics.adapters import adapter_off_accuracy
from aihwkit_lora.unlearning.metrics.evaluation import (
    Batch,
    evaluating,
    logits_of,
    own_random_numbers,
)
from aihwkit_lora.unlearning.metrics.probe import collect_features, linear_probe
from aihwkit_lora.unlearning.metrics.relearning import RelearnCurve, relearn_curve
from aihwkit_lora.unlearning.reference import adapted_layers
from aihwkit_lora.unlearning.verification.bench import Bench, share
from aihwkit_lora.unlearning.verification.criteria import Judgement
from aihwkit_lora.unlearning.verification.intervals import bootstrap
from aihwkit_lora.unlearning.verification.report import Finding, Verdict
from aihwkit_lora.unlearning.verification.samples import Answers, chosen, joined

Watch = Callable[[nn.Module], AbstractContextManager[Any]]
"""Makes a block in which a model's reads are counted."""

Series = dict[str, tuple[float, ...]]
"""Numbers behind a finding, by name."""


@dataclass(frozen=True, kw_only=True)
class RelearnAttack:
    """Somebody trains an adapter of their own on a few forgotten samples.

    On frozen arrays that is a fresh LoRA beside every array, for the model under test and for the
    retrained ones alike; elsewhere all parameters are trained.

    Args:
        samples: Forgotten samples that the attacker has, at least 1.
        steps: Of Adam, each on all of them, at least 1.
        learning_rate: Above 0.
        rank: Of the attacker's LoRA, at least 1.
        accuracy: Share of the other forgotten samples that counts as knowing again, above 0 to 1.
    Raises:
        ConfigurationError: A field is out of its range.

    Example:
        >>> RelearnAttack(samples=4).steps
        30
    """

    samples: int = 8
    steps: int = 30
    learning_rate: float = 0.01
    rank: int = 8
    accuracy: float = 0.8

    def __post_init__(self) -> None:
        for each in fields(self):
            value, counted = getattr(self, each.name), each.type == "int"
            if value < 1 if counted else value <= 0:
                self._refuse(each.name, "1 or more" if counted else "above 0")
        if self.accuracy > 1:
            self._refuse("accuracy", "1 or less")

    def _refuse(self, name: str, expected: str) -> None:
        raise ConfigurationError(
            f"relearning: expected {name} of {expected}, got {getattr(self, name)!r}."
        )

    def curve(self, model: nn.Module, given: Batch, evaluation: Batch, seed: int) -> RelearnCurve:
        """Attack a copy of a model.

        Args:
            model: Stays as it is.
            given: Forgotten samples that the attacker has.
            evaluation: Other samples of what was forgotten.
            seed: Of the attacker's first weights.
        """
        options = {"steps": self.steps, "learning_rate": self.learning_rate, "seed": seed}
        if next(frozen_layers(model), None) is None:
            return relearn_curve(model, given, evaluation, trainable=lambda _: True, **options)  # type: ignore[arg-type]
        with own_random_numbers(seed):
            armed = _armed(model, self.rank)
        return relearn_curve(armed, given, evaluation, trainable=_attackers, **options)  # type: ignore[arg-type]


_ATTACKER = "relearn-attack"


def _attackers(name: str) -> bool:
    return f".{_ATTACKER}." in name


def _armed(model: nn.Module, rank: int) -> nn.Module:
    """Copy a model and put the attacker's adapter on the copy, beside all others."""
    from peft import PeftModel

    from aihwkit_lora.adapters import AnalogLoraConfig, undigitize_
    from aihwkit_lora.continual.composition import add_adapter_

    twin = undigitize_(copy.deepcopy(model))
    inner = next((part for part in twin.modules() if isinstance(part, PeftModel)), twin)
    config = AnalogLoraConfig.for_model(inner, r=rank, lora_alpha=2 * rank)
    armed = add_adapter_(inner, _ATTACKER, config)
    return armed if inner is twin else twin


def adapter_off(
    bench: Bench, audit: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[Finding]:
    """Leave all adapters out; nothing where there are none.

    Args:
        bench: Model and sets.
        audit: Makes the block that a sealed model asks for.
    """
    if not any(True for _ in adapted_layers(bench.model)):
        return
    inner: Any = next(part for part in bench.model.modules() if hasattr(part, "disable_adapter"))
    value = adapter_off_accuracy(
        bench.model,
        bench.sets["forget"],
        off=inner.disable_adapter,
        audit=audit,
        seed=bench.seed,
    )
    yield share(
        "adapter_off_accuracy",
        "all adapters off: forgotten samples",
        value,
        len(bench.answers["forget"].labels),
        retrained=bench.known("forget"),
        judge=bench.criteria.at_most,
        attack=True,
        note="what the arrays still hold",
    )


def relearned(bench: Bench, attack: RelearnAttack) -> Iterator[tuple[Finding, Series]]:
    """Train on a few forgotten samples; nothing where there are too few.

    Args:
        bench: Model, sets and retrained models.
        attack: How.
    """
    forgotten = joined(bench.sets["forget"])
    count = len(forgotten[1])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(bench.seed))
    apart = "forget_test" in bench.sets
    if count <= attack.samples and not apart:
        return
    given = chosen(forgotten, order[: attack.samples])
    rest = chosen(forgotten, order[attack.samples :])
    evaluation = joined(bench.sets["forget_test"]) if apart else rest
    curves = [
        attack.curve(model, given, evaluation, bench.seed)
        for model in (bench.model, *bench.retrained)
    ]
    yield _relearning(bench, attack, curves, len(given[1])), _points(curves)


def _relearning(
    bench: Bench, attack: RelearnAttack, curves: Sequence[RelearnCurve], given: int
) -> Finding:
    steps, *retrained = (curve.steps_to(attack.accuracy) for curve in curves)
    criterion, verdict = bench.criteria.slow_enough(steps, retrained)
    return Finding(
        name="relearn_steps",
        title=f"relearning: steps to {100 * attack.accuracy:.0f} % with {given} samples",
        unit="steps",
        value=steps,
        retrained=tuple(retrained),
        criterion=criterion,
        verdict=verdict,
        attack=True,
        note=f"of {attack.steps} steps; a dash means never",
    )


def _points(curves: Sequence[RelearnCurve]) -> Series:
    names = ("relearning", *(f"relearning_retrained_{i}" for i in range(len(curves) - 1)))
    return {
        name: tuple(accuracy for _, accuracy in curve.points)
        for name, curve in zip(names, curves, strict=True)
    }


def probed(bench: Bench, features: str | None) -> Iterator[Finding]:
    """Train a new last layer on the features in front of the present one.

    Args:
        bench: Model, sets and retrained models.
        features: Name of the layer whose inputs are the features; the last one that runs if None.
    Raises:
        ConfigurationError: A model has no such layer.
    """
    layer = features or _last_layer(bench)
    train, test = _probe_sets(bench)
    values = []
    for model in (bench.model, *bench.retrained):
        name = _full_name(model, layer)
        known = collect_features(model, name, train, inputs=True, seed=bench.seed)
        asked = collect_features(model, name, test, inputs=True, seed=bench.seed)
        values.append(linear_probe(*known, *asked))
    yield share(
        "linear_probe",
        "new last layer on old features: forgotten samples",
        values[0],
        sum(len(labels) for _, labels in test),
        retrained=values[1:],
        judge=bench.criteria.at_most,
        attack=True,
        note=f"features in front of layer '{layer}'; trained on the labels of all training samples",
    )


def _probe_sets(bench: Bench) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """What the probe is trained on, and unseen samples of what was forgotten."""
    forget, retain = bench.sets["forget"], bench.sets["retain"]
    if "forget_test" in bench.sets:
        return (*forget, *retain), bench.sets["forget_test"]
    whole = joined(forget)
    count = len(whole[1])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(bench.seed))
    half = count // 2
    return (chosen(whole, order[:half]), *retain), (chosen(whole, order[half:]),)


def _last_layer(bench: Bench) -> str:
    """The last layer with weights, adapters aside, that a pass runs."""
    ran: list[str] = []
    kinds = (nn.Linear, nn.modules.conv._ConvNd, FrozenLayer)
    handles = [
        module.register_forward_hook(partial(_note, ran, plain_name(name)))
        for name, module in bench.model.named_modules()
        if isinstance(module, kinds) and "lora_" not in name
    ]
    try:
        with evaluating(bench.model, seed=bench.seed):
            logits_of(bench.model, bench.sets["forget"][0][0])
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise ConfigurationError(
            f"linear probe: expected a {type(bench.model).__name__} with a linear layer, got none "
            "that runs. Pass features=, the name of the layer whose inputs are probed."
        )
    return ran[-1]


def _note(ran: list[str], name: str, *_: object) -> None:
    ran.append(name)


def _full_name(model: nn.Module, layer: str) -> str:
    # The last of its names: PEFT's layer comes before the one that it wraps.
    names: dict[str, str] = {plain_name(name): name for name, _ in model.named_modules()}
    if layer not in names:
        raise ConfigurationError(
            f"linear probe: expected every model to have layer '{layer}', got a "
            f"{type(model).__name__} without. Pass features= with a name that all have. "
            f"{nearest(layer, [name for name in names if name])}"
        )
    return names[layer]


def quantised(bench: Bench, bits: Sequence[int], watch: Watch) -> Iterator[tuple[Finding, Series]]:
    """Round the adapters to fewer bits; nothing where there are none that a unit runs.

    Args:
        bench: Model and sets.
        bits: Widths, each from 2 to 16.
        watch: Counts what the copies read.
    """
    if not bits or not any(True for _ in adapted_layers(bench.model)):
        return
    forgotten, kept = [], []
    for width in bits:
        try:
            twin = _rounded(bench.model, width)
        except UnsupportedTileError:
            return
        with watch(twin):
            forgotten.append(Answers.of(twin, bench.sets["forget"], bench.seed).accuracy)
            kept.append(Answers.of(twin, bench.sets["retain"], bench.seed).accuracy)
    worst = max(range(len(bits)), key=forgotten.__getitem__)
    finding = share(
        "quantised_accuracy",
        f"adapter in {bits[0]} to {bits[-1]} bits, worst: forgotten samples",
        forgotten[worst],
        len(bench.answers["forget"].labels),
        retrained=bench.known("forget"),
        judge=bench.criteria.at_most,
        attack=True,
        note=f"worst at {bits[worst]} bits; retained samples there {100 * kept[worst]:.1f} %",
    )
    series = {"bits": tuple(map(float, bits)), "quantised_forget_accuracy": tuple(forgotten)}
    yield finding, {**series, "quantised_retain_accuracy": tuple(kept)}


def _rounded(model: nn.Module, bits: int) -> nn.Module:
    from aihwkit_lora.adapters import DigitalUnit, digitize_

    # Memory is not what is asked about here.
    return digitize_(copy.deepcopy(model), DigitalUnit(bits=bits, sram_kib=float(2**40)))


@dataclass(frozen=True, kw_only=True)
class NoiseAttack:
    """Chance as an attacker: the same model on many chips, each programmed with other errors.

    Args:
        chips: How many.
        sigma_siemens: Standard deviation of the error of a cell.
        mapping: Cells and window of layers whose programming does not say.
    """

    chips: int
    sigma_siemens: float
    mapping: ConductanceMapping | None = None

    def accuracies(self, bench: Bench, name: str) -> Tensor:
        """Accuracy on a set of each chip, shape ``(chips,)``.

        Args:
            bench: Model and sets.
            name: Of the set.
        """
        right = []
        with evaluating(bench.model, seed=bench.seed):
            for inputs, labels in bench.sets[name]:
                outputs = noisy_outputs(
                    bench.model,
                    inputs,
                    chips=self.chips,
                    sigma_siemens=self.sigma_siemens,
                    seed=bench.seed,
                    mapping=self.mapping,
                )
                right.append(outputs.argmax(dim=2) == labels)
        return torch.cat(right, dim=1).double().mean(dim=1).cpu()


def noisy(bench: Bench, attack: NoiseAttack) -> Iterator[tuple[Finding, Series]]:
    """Program the model many times with random errors; nothing where no array is frozen.

    Args:
        bench: Model and sets.
        attack: How many chips, and how large the errors.
    """
    if next(frozen_layers(bench.model), None) is None:
        return
    forgotten, kept = (attack.accuracies(bench, name) for name in ("forget", "retain"))
    where = f"{attack.chips} chips, σ = {attack.sigma_siemens * 1e6:g} µS"
    series = {
        "noisy_forget_accuracy": tuple(forgotten.tolist()),
        "noisy_retain_accuracy": tuple(kept.tolist()),
    }
    yield _over_chips(bench, "noisy_mean", f"{where}, mean: forgotten samples", forgotten), series
    yield _worst_chip(bench, f"{where}, worst: forgotten samples", forgotten), {}
    information = ("for information", Verdict.NOT_JUDGED)
    title = f"{where}, mean: retained samples"
    yield _over_chips(bench, "noisy_retain", title, kept, judged=information), {}


def _over_chips(
    bench: Bench,
    name: str,
    title: str,
    accuracies: Tensor,
    judged: Judgement | None = None,
) -> Finding:
    value, known = float(accuracies.mean()), bench.known("forget")
    low, high = bootstrap([accuracies], lambda means: means[0], seed=bench.seed)
    criterion, verdict = judged or bench.criteria.at_most(value, known)
    return Finding(
        name=f"{name}_accuracy",
        title=title,
        unit="fraction",
        value=value,
        low=low,
        high=high,
        interval="bootstrap over chips, 95 %",
        retrained=() if judged else known,
        criterion=criterion,
        verdict=verdict,
        attack=True,
    )


def _worst_chip(bench: Bench, title: str, accuracies: Tensor) -> Finding:
    value, known = float(accuracies.max()), bench.known("forget")
    criterion, verdict = bench.criteria.at_most(value, known)
    return Finding(
        name="noisy_worst_accuracy",
        title=title,
        unit="fraction",
        value=value,
        retrained=known,
        criterion=criterion,
        verdict=verdict,
        attack=True,
        note=f"chip {int(accuracies.argmax())}; the worst of more chips can only be worse",
    )
