"""Findings about what the model says as it is used: accuracies, divergence, membership."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from aihwkit_lora.errors import UnsupportedTileError
from aihwkit_lora.unlearning.metrics.accuracy import tug_of_war
from aihwkit_lora.unlearning.metrics.adapters import layer_distance
from aihwkit_lora.unlearning.metrics.divergence import js_divergence, js_per_sample
from aihwkit_lora.unlearning.metrics.membership import loss_membership, svc_membership
from aihwkit_lora.unlearning.reference import adapted_layers
from aihwkit_lora.unlearning.verification.bench import BOOTSTRAP, Bench, share
from aihwkit_lora.unlearning.verification.intervals import bootstrap
from aihwkit_lora.unlearning.verification.report import Finding
from aihwkit_lora.unlearning.verification.samples import Answers

_ACCURACIES = {
    "forget": "accuracy, forgotten samples",
    "forget_test": "accuracy, unseen samples of what was forgotten",
    "retain": "accuracy, retained samples",
    "test": "accuracy, unseen samples",
}
_THREE = ("forget", "retain", "test")


def output_findings(bench: Bench) -> Iterator[Finding]:
    """Measure everything that needs outputs and weights only.

    Args:
        bench: Model, sets and retrained models.
    """
    yield from _accuracies(bench)
    if bench.references:
        yield _tug_of_war(bench)
        yield from (_divergence(bench, name) for name in ("forget", "retain"))
    yield _svc(bench)
    yield _loss(bench)
    yield from _distance(bench)


def _accuracies(bench: Bench) -> Iterator[Finding]:
    for name, title in _ACCURACIES.items():
        if name in bench.sets:
            yield share(
                f"{name}_accuracy",
                title,
                bench.answers[name].accuracy,
                len(bench.answers[name].labels),
                retrained=bench.known(name),
                judge=bench.criteria.near,
            )


def _tug_of_war(bench: Bench) -> Finding:
    ours = _three(bench.answers)
    theirs = [_three(reference) for reference in bench.references]
    value = _mean([tug_of_war(ours, each) for each in theirs])
    pairs = [tug_of_war(one, other) for one, other in combinations(theirs, 2)]
    groups = [
        torch.stack([each[name].right for each in (bench.answers, *bench.references)], dim=1)
        for name in _THREE
    ]
    low, high = bootstrap(groups, _products, seed=bench.seed)
    criterion, verdict = bench.criteria.near_ceiling(value, pairs)
    return Finding(
        name="tug_of_war",
        title="Tug-of-War",
        unit="ratio",
        value=value,
        low=low,
        high=high,
        interval=BOOTSTRAP,
        retrained=tuple(pairs),
        criterion=criterion,
        verdict=verdict,
        note="mean over the retrained models, 1 is best; retrained: each against each",
    )


def _three(answers: dict[str, Answers]) -> dict[str, float]:
    return {f"{name}_accuracy": answers[name].accuracy for name in _THREE}


def _products(means: Sequence[Tensor]) -> Tensor:
    """Tug-of-War of resampled accuracies, the model's own in the first column."""
    factors = [1.0 - (mean[:, :1] - mean[:, 1:]).abs() for mean in means]
    return torch.stack(factors).prod(dim=0).mean(dim=1)


def _divergence(bench: Bench, name: str) -> Finding:
    ours = bench.answers[name].probabilities
    theirs = [reference[name].probabilities for reference in bench.references]
    each = torch.stack([js_per_sample(ours, other) for other in theirs]).mean(dim=0)
    value, floors = float(each.mean()), [float(js_divergence(*p)) for p in combinations(theirs, 2)]
    low, high = bootstrap([each], lambda means: means[0], seed=bench.seed)
    criterion, verdict = bench.criteria.near_floor(value, floors)
    kind = "forgotten" if name == "forget" else "retained"
    return Finding(
        name=f"js_{name}",
        title=f"Jensen–Shannon divergence, {kind} samples",
        unit="nats",
        value=value,
        low=low,
        high=high,
        interval=BOOTSTRAP,
        retrained=tuple(floors),
        criterion=criterion,
        verdict=verdict,
        note="mean over the retrained models; retrained: each against each, the floor",
    )


def _svc(bench: Bench) -> Finding:
    def attacked(answers: dict[str, Answers]) -> tuple[float, float]:
        confidences = [answers[name].confidence for name in _THREE]
        found = svc_membership(*confidences, seed=bench.seed)
        return found.value, found.attacker_accuracy

    value, sight = attacked(bench.answers)
    return share(
        "svc_membership",
        "membership by confidence: forgotten taken for unseen",
        value,
        len(bench.answers["forget"].labels),
        retrained=[attacked(reference)[0] for reference in bench.references],
        judge=partial(bench.criteria.near_membership, sight=sight),
        note=f"the attacker tells retained from unseen with {100 * sight:.0f} % (50 is chance)",
    )


def _loss(bench: Bench) -> Finding:
    def attacked(answers: dict[str, Answers]) -> tuple[float, int]:
        unseen = answers[bench.unseen].losses
        found = loss_membership(answers["forget"].losses, unseen, seed=bench.seed)
        return found.value, found.samples

    value, samples = attacked(bench.answers)
    other = "" if bench.unseen == "forget_test" else "; unseen samples are of other classes"
    return share(
        "loss_membership",
        "membership by loss: forgotten told from unseen",
        value,
        2 * samples,
        retrained=[attacked(reference)[0] for reference in bench.references],
        judge=bench.criteria.near_membership,
        note=f"cross-validated, 50 % is chance{other}",
    )


def _distance(bench: Bench) -> Iterator[Finding]:
    if not any(True for _ in adapted_layers(bench.model)):
        return
    try:
        distances = layer_distance(bench.model)
    except UnsupportedTileError:
        return  # an adapter that adds to no weight has no such distance
    largest = max(distances, key=distances.__getitem__)
    if math.isfinite(distances[largest]):
        yield Finding(
            name="layer_distance",
            title="largest share that adapters add to a layer's weight",
            unit="ratio",
            value=distances[largest],
            criterion="for information",
            note=f"in layer '{largest}'",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
