"""Losses against the formulas, written out a second time with Python's own numbers.

Everything is in 64-bit floats and takes fewer than a thousand operations on numbers of order 1 to
100, so a relative error of 1e-9 leaves room for rounding and for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from aihwkit_lora.unlearning import objectives

Row = tuple[list[float], list[float], int]  # logits now, logits before, label
CLASSES = 4


def lse(z: list[float]) -> float:
    top = max(z)
    return top + math.log(sum(math.exp(each - top) for each in z))


def softmax(z: list[float]) -> list[float]:
    return [math.exp(each - lse(z)) for each in z]


def ce(z: list[float], y: int) -> float:
    return lse(z) - z[y]


def kl(p: list[float], z: list[float]) -> float:
    return sum(a * (math.log(a) - (b - lse(z))) for a, b in zip(p, z, strict=True) if a > 0)


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def mean_ce(rows: list[Row]) -> float:
    return mean(ce(z, y) for z, _, y in rows)


def uniform(allowed: set[int]) -> list[float]:
    return [float(v in allowed) / len(allowed) for v in range(CLASSES)]


def hinged(z: list[float], unwanted: set[int], margin: float) -> float:
    rest = [value for v, value in enumerate(z) if v not in unwanted]
    return max(0.0, margin + max(z[v] for v in unwanted) - max(rest))


def sharpened(rows: list[Row], temperature: float) -> float:
    tempered = [([a / temperature for a in z], [b / temperature for b in z0]) for z, z0, _ in rows]
    return temperature**2 * mean(kl(softmax(z0), z) for z, z0 in tempered)


def masked(z0: list[float], y: int) -> list[float]:
    total = sum(math.exp(value) for v, value in enumerate(z0) if v != y)
    return [0.0 if v == y else math.exp(value) / total for v, value in enumerate(z0)]


def one_hot_error(rows: list[Row], label: Callable[[int], int]) -> float:
    return mean(
        (value - float(v == label(y))) ** 2 for z, _, y in rows for v, value in enumerate(z)
    )


def npo_term(now: float, before: float, beta: float) -> float:
    ratio = math.exp(before - now)  # p / p0
    return -2.0 / beta * math.log(1.0 / (1.0 + ratio**beta))


CASES: list[tuple[str, dict[str, Any], float, Callable[[list[Row], list[Row]], float]]] = [
    (
        "weighted_ga",
        {"weight": -0.3},
        0.0,
        lambda f, r: mean(
            [-0.3 * ce(z, y) for z, _, y in f] + [ce(z, y) for z, _, y in r],
        ),
    ),
    (
        "neggrad_plus",
        {"alpha": 0.8},
        0.0,
        lambda f, r: 0.8 * mean_ce(r) - (1.0 - 0.8) * mean_ce(f),
    ),
    (
        "bounded_ga",
        {"bound": 30.0, "beta": 0.15, "retain_weight": 2.0},
        0.0,
        lambda f, r: 0.15 * max(0.0, 30.0 - mean_ce(f)) + 2.0 * mean_ce(r),
    ),
    ("bounded_ga", {"bound": 0.01}, 0.0, lambda f, r: mean_ce(r)),
    (
        "npo",
        {"beta": 0.7},
        0.0,
        lambda f, r: mean(npo_term(ce(z, y), ce(z0, y), 0.7) for z, z0, y in f) + mean_ce(r),
    ),
    (
        "simnpo",
        {"beta": 0.7, "delta": 0.4, "retain_weight": 0.0},
        0.0,
        lambda f, r: mean(
            2.0 / 0.7 * math.log(1.0 + math.exp(-0.7 * (ce(z, y) - 0.4))) for z, _, y in f
        ),
    ),
    (
        "random_label",
        {"outputs": (1, 2)},
        0.0,
        lambda f, r: mean(ce(z, 3 - y) for z, _, y in f) + mean_ce(r),
    ),
    (
        "random_label",
        {"outputs": (1, 2), "target": "mse"},
        0.0,
        lambda f, r: one_hot_error(f, lambda y: 3 - y) + one_hot_error(r, lambda y: y),
    ),
    (
        "kl_uniform",
        {},
        0.0,
        lambda f, r: mean(kl(uniform({*range(4)} - {y}), z) for z, _, y in f) + mean_ce(r),
    ),
    (
        "kl_uniform",
        {"forgotten": (1, 2), "margin": 3.0, "retain_weight": 0.5},
        0.0,
        lambda f, r: (
            mean(kl(uniform({0, 3}), z) + hinged(z, {1, 2}, 3.0) for z, _, y in f)
            + 0.5 * mean(ce(z, y) + hinged(z, {1, 2}, 3.0) for z, _, y in r)
        ),
    ),
    (
        "kl_uniform",
        {"outputs": (0, 1, 3), "margin": 3.0, "pooled": True},
        0.0,
        lambda f, r: mean(
            [kl(uniform({0, 1, 3} - {y}), z) + hinged(z, {y}, 3.0) for z, _, y in f]
            + [ce(z, y) for z, _, y in r]
        ),
    ),
    (
        "masked_teacher",
        {"retain_weight": 0.3},
        0.0,
        lambda f, r: (
            mean(kl(masked(z0, y), z) for z, z0, y in f)
            + 0.3 * mean(kl(softmax(z0), z) for z, z0, _ in r)
        ),
    ),
    (
        "masked_teacher",
        {"retain": "ce"},
        0.0,
        lambda f, r: mean(kl(masked(z0, y), z) for z, z0, y in f) + mean_ce(r),
    ),
    ("scrub", {}, 0.06, lambda f, r: -sharpened(f, 2.0)),
    (
        "scrub",
        {"alpha": 0.3, "gamma": 0.9, "temperature": 1.5},
        0.5,
        lambda f, r: 0.3 * sharpened(r, 1.5) + 0.9 * mean_ce(r),
    ),
    ("negation", {}, 0.0, lambda f, r: mean_ce(f)),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    options = {"target_modules": ["0"], "r": 2, "init_lora_weights": False}
    peft = get_peft_model(nn.Sequential(nn.Linear(5, CLASSES)).double(), LoraConfig(**options))
    return peft.double()


def parts(model: nn.Module) -> tuple[dict[str, Any], list[Row], list[Row]]:
    """A batch, and the logits that the weights give by hand, now and without the adapter."""
    layer = model.base_model.model[0]
    w, b = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    up, down = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    generator = torch.Generator().manual_seed(1)
    batch, rows = {}, {}
    for part, labels in (("forget", [1, 2, 1]), ("retain", [0, 3, 3, 0, 0])):
        x = 2.0 * torch.randn(len(labels), 5, generator=generator, dtype=torch.float64)
        before = x @ w.T + b
        now = before + layer.scaling["default"] * x @ down.T @ up.T
        batch[part] = (x, torch.tensor(labels))
        rows[part] = list(zip(now.tolist(), before.tolist(), labels, strict=True))
    return batch, rows["forget"], rows["retain"]


@pytest.mark.parametrize(("name", "options", "progress", "by_hand"), CASES)
def test_formula(name, options, progress, by_hand, model):
    batch, forget, retain = parts(model)
    loss = objectives.get(name)(**options).loss(model, batch, progress=progress)
    assert loss.item() == pytest.approx(by_hand(forget, retain), rel=1e-9)


def test_boundary_shrink(model):
    batch, forget, retain = parts(model)
    layer = model.base_model.model[0].base_layer
    w, b = layer.weight.tolist(), layer.bias.tolist()
    wanted = []
    for x, (_, z0, y) in zip(batch["forget"][0].tolist(), forget, strict=True):
        # ∇x CE = Wᵀ (p − onehot)
        error = [p - float(v == y) for v, p in enumerate(softmax(z0))]
        slope = [sum(w[v][i] * error[v] for v in range(CLASSES)) for i in range(5)]
        moved = [xi + 0.4 * math.copysign(1.0, gi) for xi, gi in zip(x, slope, strict=True)]
        z = [sum(a * c for a, c in zip(w[v], moved, strict=True)) + b[v] for v in range(CLASSES)]
        wanted.append(max((v for v in range(CLASSES) if v != y), key=z.__getitem__))
    loss = objectives.get("boundary_shrink")(step=0.4).loss(model, batch)
    by_hand = mean(ce(z, v) for (z, _, _), v in zip(forget, wanted, strict=True)) + mean_ce(retain)
    assert loss.item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_rmu(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    options = {"target_modules": ["0"], "r": 2, "init_lora_weights": False}
    model = get_peft_model(net, LoraConfig(**options)).double()
    x = {part: torch.randn(shape, dtype=torch.float64) for part in ("forget", "retain")}
    objective = objectives.get("rmu")(layer="0", coefficient=3.0, seed=5, retain_weight=0.7)
    batch = {part: (each, torch.zeros(3)) for part, each in x.items()}

    draws = torch.randn(4, generator=torch.Generator().manual_seed(5)).tolist()
    length = math.sqrt(sum(each**2 for each in draws))
    layer = net[0]
    added = layer.get_delta_weight("default").detach()
    now = x["forget"] @ (layer.base_layer.weight + added).T + layer.base_layer.bias
    forget = mean(
        sum((h - 3.0 * u / length) ** 2 for h, u in zip(row, draws, strict=True))
        for row in now.flatten(0, -2).tolist()
    )
    change = (x["retain"] @ added.T).flatten(0, -2).tolist()
    retain = mean(sum(each**2 for each in row) for row in change)
    found = objective.loss(model, batch).item()
    assert found == pytest.approx(forget + 0.7 * retain, rel=1e-6)  # u is made in 32-bit floats


class Tiny(nn.Module):
    """Predicts noise from an image, a time and a label."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Embedding(5, 3)
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.fc(x + t[:, None] + self.labels(label))


@pytest.fixture(scope="module")
def diffusion() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    options = {"target_modules": ["fc"], "r": 2, "init_lora_weights": False}
    model = get_peft_model(Tiny().double(), LoraConfig(**options)).double()
    batch = {}
    for part, labels in (("forget", [1, 4]), ("retain", [0, 2, 2])):
        x, target = torch.randn(2, len(labels), 3, dtype=torch.float64).unbind()
        batch[part] = (x, torch.rand(len(labels)).double(), torch.tensor(labels)), target
    return model, batch


def predictions(model: nn.Module, inputs: Any, label: list[int] | None = None) -> Tensor:
    """Of the model with its adapter, or, for another label, of the one without."""
    tiny = model.base_model.model
    x, t, own = inputs
    features = x + t[:, None] + tiny.labels.weight[own if label is None else label]
    layer = tiny.fc
    weight = layer.base_layer.weight
    if label is None:
        weight = weight + layer.get_delta_weight("default")
    return (features @ weight.T + layer.base_layer.bias).detach()


def squares(a: Tensor, b: Tensor) -> float:
    return mean(
        (x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("gaussian_target", {}, lambda m, i: torch.randn(2, 3, dtype=torch.float64)),
        ("uniform_target", {}, lambda m, i: torch.rand(2, 3, dtype=torch.float64)),
        ("pseudo_class", {"classes": 5}, lambda m, i: predictions(m, i, [2, 0])),
        ("pseudo_class", {"other": {1: 3, 4: 2}}, lambda m, i: predictions(m, i, [3, 2])),
        (
            "esd",
            {"null_label": 0, "eta": 1.5},
            lambda m, i: (
                predictions(m, i, [0, 0])
                - 1.5 * (predictions(m, i, [1, 4]) - predictions(m, i, [0, 0]))
            ),
        ),
    ],
)
def test_diffusion(name, options, wanted, diffusion):
    model, batch = diffusion
    torch.manual_seed(3)
    target = wanted(model, batch["forget"][0])
    torch.manual_seed(3)
    loss = objectives.get(name)(retain_weight=0.4, **options).loss(model, batch)
    forget = squares(predictions(model, batch["forget"][0]), target)
    retain = squares(predictions(model, batch["retain"][0]), batch["retain"][1])
    assert loss.item() == pytest.approx(forget + 0.4 * retain, rel=1e-9)


def test_the_uniform_target_is_biased_and_the_gaussian_one_is_not():
    targets = torch.zeros(100, 1000)
    torch.manual_seed(0)
    means = [
        objectives.get(name)().wanted(nn.Identity(), (), targets).mean().item()
        for name in ("uniform_target", "gaussian_target")
    ]
    # Five standard errors of 1e5 draws: fails by chance once in a million.
    assert means == [pytest.approx(0.5, abs=5e-3), pytest.approx(0.0, abs=1.6e-2)]


class Language(nn.Module):
    """Logits of the next token, from this one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)

    def forward(self, input_ids: Tensor) -> Any:
        class Output:
            logits = self.head(self.embed(input_ids))

        return Output()


def sequences(model: nn.Module, part: Any, *, before: bool) -> list[list[float]]:
    """Negative log-likelihood of every token that counts, by sequence."""
    inputs, labels = part
    layer = model.base_model.model.head
    weight = layer.base_layer.weight + (0 if before else layer.get_delta_weight("default"))
    logits = (model.base_model.model.embed.weight[inputs["input_ids"]] @ weight.T).tolist()
    return [
        [ce(z[i], row[i + 1]) for i in range(len(row) - 1) if row[i + 1] != -100]
        for z, row in zip(logits, labels.tolist(), strict=True)
    ]


@pytest.fixture(scope="module")
def language() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    options = {"target_modules": ["head"], "r": 2, "init_lora_weights": False}
    model = get_peft_model(Language().double(), LoraConfig(**options)).double()
    batch = {}
    for part, count in (("forget", 3), ("retain", 2)):
        tokens = torch.randint(6, (count, 5))
        labels = tokens.clone()
        labels[0, :3] = -100
        batch[part] = ({"input_ids": tokens}, labels)
    return model, batch


@pytest.mark.parametrize(
    ("name", "options", "term"),
    [
        ("token_ga", {"weight": 0.6}, lambda now, _: -0.6 * mean(chain.from_iterable(now))),
        (
            "token_npo",
            {"beta": 0.3},
            lambda now, before: mean(
                npo_term(sum(a), sum(b), 0.3) for a, b in zip(now, before, strict=True)
            ),
        ),
        (
            "token_simnpo",
            {"beta": 2.0, "delta": 0.1},
            lambda now, _: mean(math.log(1.0 + math.exp(-2.0 * (mean(a) - 0.1))) for a in now),
        ),
    ],
)
def test_tokens(name, options, term, language):
    model, batch = language
    loss = objectives.get(name)(retain_weight=0.5, **options).loss(model, batch)
    now = sequences(model, batch["forget"], before=False)
    before = sequences(model, batch["forget"], before=True)
    retain = mean(chain.from_iterable(sequences(model, batch["retain"], before=False)))
    assert loss.item() == pytest.approx(term(now, before) + 0.5 * retain, rel=1e-9)


def test_a_sequence_without_tokens_that_count_adds_nothing(language):
    model, batch = language
    ids = batch["forget"][0]
    silent = torch.full_like(ids["input_ids"], -100)
    for name in ("token_ga", "token_simnpo"):
        loss = objectives.get(name)(retain_weight=0.0).loss(model, {"forget": (ids, silent)})
        assert torch.isfinite(loss)
    assert (
        objectives.get("token_ga")(retain_weight=0.0).loss(model, {"forget": (ids, silent)}) == 0.0
    )
