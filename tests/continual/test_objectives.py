"""Each loss against its formula, written out sample by sample or matrix by matrix."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.continual import objectives
from aihwkit_lora.continual.buffer import ReplayBuffer
from aihwkit_lora.continual.composition import add_adapter_, train_only_
from aihwkit_lora.continual.head import grow_head_
from aihwkit_lora.continual.objectives.ewc import measure_fisher
from aihwkit_lora.continual.objectives.inflora import extended, second_moments
from aihwkit_lora.continual.objectives.sd_lora import MAGNITUDES
from aihwkit_lora.errors import (
    ConfigurationError,
    DataError,
    StageError,
    UnknownNameError,
    UnsupportedTileError,
)
from aihwkit_lora.unlearning.reference import adapters_in_training
from aihwkit_lora.unlearning.seal import seal_, verify_seals


def ce(logits, label):
    return float(-logits.detach().double().log_softmax(0)[label])


def make(name, **options):
    return objectives.get(name)(**options)


def value(name, model, batch, **options):
    return float(make(name, **options).loss(model, batch).detach())


# ------------------------------------------------------------------ replay


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
def test_replay_is_a_weighted_mean(stacked, batch, ratio, balanced):
    model, parts = stacked("learn-1"), batch(7, 5)
    labels = torch.cat([y for _, y in parts.values()]).tolist()
    above = below = 0.0
    for part, (x, y) in parts.items():
        for logits, label in zip(model(x), y.tolist(), strict=True):
            weight = ratio if part == "replay" else 1.0
            weight /= labels.count(label) if balanced else 1
            above, below = above + weight * ce(logits, label), below + weight
    found = value("replay", model, parts, ratio=ratio, class_balanced=balanced)
    assert found == pytest.approx(above / below, rel=1e-5)


def test_without_a_replay_part_the_others_learn_from_new_samples_alone(stacked, batch):
    model, parts = stacked("learn-1"), batch(6, 0)
    x, y = parts["new"]
    expected = np.mean([ce(logits, label) for logits, label in zip(model(x), y, strict=True)])
    found = value("o_lora", model, parts, class_balanced=False)
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match="objective 'replay': expected a batch with 'replay'"):
        value("replay", model, parts)


def test_der_compares_with_logits_of_back_then(stacked, batch):
    model, parts = stacked("learn-1"), batch()
    buffer = ReplayBuffer(ratio=1.0)
    buffer.add(*parts["replay"])
    buffer.record(model)
    add_adapter_(model, "learn-2", copy.deepcopy(model.peft_config["learn-1"]))
    grow_head_(model, 1)
    x, y, before = buffer.balanced()
    logits, new = model(x), model(parts["new"][0])
    squares = ((logits[:, :3] - before) ** 2).sum() / before.numel()
    replayed = np.mean([ce(z, label) for z, label in zip(logits, y, strict=True)])
    fresh = np.mean([ce(z, label) for z, label in zip(new, parts["new"][1], strict=True)])
    expected = fresh + 0.3 * float(squares.detach()) + 0.7 * replayed
    found = value("der++", model, {**parts, "replay": (x, y, before)}, alpha=0.3, beta=0.7)
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(DataError, match=r"expected replay as .*logits\), got 2 parts"):
        value("der++", model, parts)


# ------------------------------------------------------------------ lwf


@pytest.mark.parametrize("outputs", [None, (0, 2)])
def test_lwf_is_the_divergence_from_the_old_model_on_old_outputs(stacked, batch, outputs):
    model, parts = stacked("forget-0"), batch(6, 0)
    x = parts["new"][0]
    parts["new"] = (x, torch.ones(6, dtype=torch.long))
    old = model(x).detach().double()
    add_adapter_(model, "learn-1", copy.deepcopy(model.peft_config["forget-0"]))
    new, t, kept = model(x).detach().double(), 3.0, [0, 2]
    p, q = ((z[:, kept] / t).softmax(1) for z in (old, new))
    divergence = float((p * (p / q).log()).sum(1).mean())
    task = np.mean([ce(z, 1) for z in new])
    found = value("lwf", model, parts, strength=0.7, temperature=t, outputs=outputs)
    assert found == pytest.approx(task + 0.7 * t**2 * divergence, rel=1e-4)
    assert divergence > 1e-3


def test_lwf_needs_no_copy_and_moves_the_newest_only(stacked, batch):
    model, parts = stacked("forget-0", "learn-1"), batch(6, 0)
    make("lwf").loss(model, parts).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved
    assert all(".learn-1." in name for name in moved)


# ------------------------------------------------------------------ ewc


def test_fisher_is_the_mean_of_squared_gradients_sample_by_sample(stacked, batch):
    model, (x, y) = stacked("learn-1"), batch(6)["new"]
    anchor = measure_fisher(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(anchor.fisher) == set(trained)
    expected = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row, label in zip(x, y, strict=True):
        model.zero_grad()
        (-model(row[None]).log_softmax(1)[0, label]).backward()
        for name, parameter in trained.items():
            expected[name] += parameter.grad**2 / len(y)
    for name in trained:
        assert torch.allclose(anchor.fisher[name], expected[name], rtol=1e-4, atol=1e-8)
        assert torch.equal(anchor.values[name], trained[name])


def test_ewc_pulls_back_to_every_anchor(stacked, batch):
    model, parts = stacked("learn-1"), batch(5, 0)
    objective = make("ewc", strength=3.0)
    plain = value("ewc", model, parts)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = 0.0
    for step in (0.01, 0.02):
        objective.finish_(model, [parts["new"]])
        with torch.no_grad():
            for parameter in trained:
                parameter += step
    for anchor, distance in zip(objective.anchors, (0.03, 0.02), strict=True):
        expected += 1.5 * sum(float(f.sum()) * distance**2 for f in anchor.fisher.values())
    now = value("ewc", model, parts)
    found = float(objective.loss(model, parts).detach())
    assert found - now == pytest.approx(expected, rel=1e-3)
    assert now != plain


def test_ewc_takes_several_inputs_and_named_ones():
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(2, 3, 2)

        def forward(self, a, b):
            return self.layer(a, b)

    model, a, b, y = Both(), torch.randn(4, 2), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    tuples = measure_fisher(model, [((a, b), y)]).fisher
    named = measure_fisher(model, [({"a": a, "b": b}, y)]).fisher
    assert all(torch.equal(tuples[name], named[name]) for name in tuples)


def test_ewc_says_when_it_has_nothing_to_hold(stacked, batch, config):
    model, parts = stacked("learn-1"), batch()
    objective = make("ewc")
    with pytest.raises(DataError, match="measure_fisher: expected samples, got none"):
        objective.finish_(model, [])
    objective.finish_(model, [parts["new"]])
    add_adapter_(model, "learn-2", config(model))
    with pytest.raises(StageError, match=r"still in training, got none.*train_only_"):
        objective.loss(model, parts)
    train_only_(model, "learn-1")
    objective.loss(model, parts).backward()


# ------------------------------------------------------------------ o_lora


def test_o_lora_adds_up_overlaps_of_input_directions(stacked, batch):
    model, parts = stacked("forget-0", "learn-1", "learn-2"), batch()
    overlap = 0.0
    for layer in (m for m in model.modules() if hasattr(m, "lora_A")):
        a = {name: part.weight.detach().numpy() for name, part in layer.lora_A.items()}
        for old in ("forget-0", "learn-1"):
            overlap += np.abs(a[old] @ a["learn-2"].T).sum()
    without = value("o_lora", model, parts, strength=0.0)
    found = value("o_lora", model, parts, strength=0.2)
    assert found - without == pytest.approx(0.2 * overlap, rel=1e-4)


def test_o_lora_flattens_kernels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    options = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model = add_adapter_(
        add_adapter_(net, "a1", LoraConfig(**options)), "b1", LoraConfig(**options)
    )
    parts = {"new": (torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2]))}
    layer = model.base_model.model[0]
    old, new = (layer.lora_A[name].weight.detach().flatten(1) for name in ("a1", "b1"))
    found = value("o_lora", model, parts, strength=1.0) - value(
        "o_lora", model, parts, strength=0.0
    )
    assert found == pytest.approx(float((old @ new.T).abs().sum()), rel=1e-3)


def test_training_with_o_lora_turns_directions_apart(stacked, batch):
    model, parts, objective = stacked("forget-0", "learn-1"), batch(), make("o_lora", strength=5.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.Adam(trained, lr=0.01), []
    for _ in range(60):
        optimiser.zero_grad()
        loss = objective.penalty(model, parts, objective.outputs_of(model, parts))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


# ------------------------------------------------------------------ inflora


def old_inputs(model, directions=3, count=40):
    """Inputs of the first layer that span few directions."""
    generator = torch.Generator().manual_seed(7)
    basis = torch.randn(directions, 10, generator=generator)
    x = torch.randn(count, directions, generator=generator) @ basis
    return x, torch.randint(3, (count,), generator=generator)


def first_layer(model):
    return next(m for m in model.modules() if hasattr(m, "lora_A"))


def test_moments_are_those_of_what_layers_read(stacked, batch):
    model, (x, y) = stacked("learn-1"), batch(9)["new"]
    moments = second_moments(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert set(moments) == {"0", "2"}
    assert torch.allclose(moments["0"], x.double().T @ x.double() / 9)


def test_a_basis_grows_by_the_fewest_directions():
    moment = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]).double())
    total = float(moment.square().sum())
    for threshold, directions in ((16 / total, 1), (0.9, 2), (0.94, 2), (0.95, 3), (1.0, 4)):
        basis = extended(moment[:, :0], moment, threshold)
        assert basis.shape == (4, directions)
        assert torch.allclose(basis.T @ basis, torch.eye(directions).double())
    basis = extended(moment[:, :0], moment, 0.9)
    assert torch.equal(extended(basis, moment, 0.9), basis)


def test_inflora_reads_what_old_inputs_lack(stacked, batch, config):
    model, (x, y) = stacked("learn-1"), batch(30)["new"]
    objective, (old, labels) = make("inflora", threshold=0.999999), old_inputs(model)
    objective.finish_(model, [(old, labels)])
    add_adapter_(model, "learn-2", config(model, r=3, target_modules=["0"]))
    objective.prepare_(model, [(x, y)])
    weight = first_layer(model).lora_A["learn-2"].weight
    # by hand, in numpy
    m = np.linalg.svd(old.numpy().T, full_matrices=False)[0][:, :3]
    h = x.numpy().T @ x.numpy() / len(x)
    u = np.linalg.svd(h - m @ m.T @ h)[0][:, :3]
    expected = u @ u.T / 3  # signs of columns are free
    assert np.allclose(weight.detach().numpy().T @ weight.detach().numpy(), expected, atol=1e-5)
    assert float((weight.detach() @ old.T).abs().max()) < 1e-5
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_B.learn-2" in name for name in trained)
    assert len(trained) == 1
    assert adapters_in_training(model) == {"learn-2"}


def test_old_inputs_are_answered_as_before(stacked, batch, config):
    model, (x, y) = stacked("learn-1"), batch(30)["new"]
    objective, (old, labels) = make("inflora", threshold=0.999999), old_inputs(model)
    objective.finish_(model, [(old, labels)])
    first = config(model, r=3, target_modules=["0"], init_lora_weights=True)
    add_adapter_(model, "learn-2", first)
    objective.prepare_(model, [(x, y)])
    before, other = model(old).detach(), model(x).detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=0.1)
    for _ in range(20):
        optimiser.zero_grad()
        objective.loss(model, {"new": (x, y)}).backward()
        optimiser.step()
    assert torch.allclose(model(old), before, atol=1e-4)
    assert not torch.allclose(model(x), other, atol=1e-1)


def test_inflora_is_deterministic(stacked, batch):
    weights = []
    for _ in range(2):
        model = stacked("learn-1")
        make("inflora").prepare_(model, [batch(30)["new"]])
        weights.append(first_layer(model).lora_A["learn-1"].weight)
    assert torch.equal(*weights)


def test_inflora_says_what_it_cannot_do(stacked, batch, config):
    model, data = stacked("learn-1"), [batch(30)["new"]]
    objective = make("inflora", threshold=1.0)
    with pytest.raises(DataError, match="'inflora': expected samples of the task, got none"):
        objective.prepare_(model)
    objective.finish_(model, data)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"layer '0': .* at least 2 directions .*got 0"):
        objective.prepare_(model, data)
    assert all(torch.equal(before[name], held) for name, held in model.state_dict().items())
    with pytest.raises(StageError, match="expected one adapter in training, got none"):
        objective.prepare_(model.requires_grad_(False), data)
    net = nn.Sequential(nn.Conv1d(2, 3, 2))
    conv = get_peft_model(net, LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(UnsupportedTileError, match=r"layer '0': .*linear layers.*a Conv1d"):
        second_moments(conv, [(torch.ones(1, 2, 4),)])


# ------------------------------------------------------------------ sd_lora


def factors(model):
    """The number in front of every adapter of every layer."""
    return {
        (name, adapter): float(torch.as_tensor(layer.scaling[adapter]).detach())
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
        for adapter in layer.lora_A
    }


def trained_magnitudes(model):
    return {
        name: p for name, p in model.named_parameters() if MAGNITUDES in name and p.requires_grad
    }


def test_sd_lora_starts_where_it_is_and_learns_magnitudes(stacked, batch):
    model, parts = stacked("learn-1", "learn-2", lora_alpha=3), batch()
    x = parts["new"][0]
    before = model(x).detach()
    objective = make("sd_lora")
    objective.prepare_(model)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-6)
    (alpha,) = [p for name, p in trained_magnitudes(model).items() if ".0." in name]
    layer = first_layer(model)
    b, a = (part["learn-1"].weight.detach() for part in (layer.lora_B, layer.lora_A))
    norm = torch.linalg.matrix_norm(b @ a)
    assert float(alpha.detach()) == pytest.approx(float(1.5 * norm), rel=1e-5)
    with torch.no_grad():
        alpha.fill_(2.0)
    expected = layer.get_base_layer()(x) + 2.0 * x @ (b @ a / norm).T
    b, a = (part["learn-2"].weight.detach() for part in (layer.lora_B, layer.lora_A))
    assert torch.allclose(layer(x), expected + 1.5 * x @ (b @ a).T, rtol=1e-4, atol=1e-5)
    objective.loss(model, parts).backward()
    assert all(p.grad is not None for p in trained_magnitudes(model).values())


def test_sd_lora_fixes_magnitudes_again_and_peft_saves_them(stacked, batch, tmp_path, frozen):
    model, x = stacked("learn-1", "learn-2", lora_alpha=3), batch()["new"][0]
    shared = model.peft_config["learn-1"]
    objective = make("sd_lora")
    for change in (0.3, 1.7):  # two tasks in a row
        objective.prepare_(model)
        with torch.no_grad():
            for place, alpha in enumerate(trained_magnitudes(model).values()):
                alpha.mul_(change + place)
        during = model(x).detach()
        objective.finish_(model)
        assert torch.allclose(model(x), during, rtol=1e-5, atol=1e-6)
        assert not trained_magnitudes(model)
    expected = [1.5 * 0.3 * 1.7, 1.5 * 1.3 * 2.7]
    old = [factor for (_, adapter), factor in factors(model).items() if adapter == "learn-1"]
    assert old == pytest.approx(expected, rel=1e-4)
    assert shared.alpha_pattern == {}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen(), tmp_path / "learn-1", adapter_name="learn-1")
    loaded.load_adapter(tmp_path / "learn-2", "learn-2")
    assert factors(loaded) == pytest.approx(factors(model))


def test_sd_lora_leaves_sealed_and_fixed_adapters_alone(stacked, batch, config):
    model = stacked("forget-0", "learn-1", "learn-2")
    seal_(model, "forget-0", request="class 0")
    add_adapter_(model, "learn-3", config(model))
    make("sd_lora", fixed=("learn-1",)).prepare_(model)
    names = {name.rsplit(".", 1)[1] for name in trained_magnitudes(model)}
    assert names == {"learn-2"}
    model(batch()["new"][0])
    verify_seals(model)


def test_an_adapter_that_adds_nothing_has_no_direction(frozen, config):
    model = add_adapter_(frozen(), "a1", config(frozen(), init_lora_weights=True))
    add_adapter_(model, "b1", config(model))
    make("sd_lora").prepare_(model)
    assert not trained_magnitudes(model)


def test_copies_have_magnitudes_of_their_own(stacked, batch):
    model, x = stacked("learn-1", "learn-2"), batch()["new"][0]
    make("sd_lora").prepare_(model)
    before, same = model(x).detach(), copy.deepcopy(model)
    assert torch.equal(same(x), before)
    with torch.no_grad():
        for alpha in trained_magnitudes(same).values():
            alpha.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(same(x), before)


def test_sd_lora_on_a_digital_unit(stacked, batch):
    model = al.digitize_(stacked("a1", "b1"), al.DigitalUnit(bits=8, sram_kib=64))
    x = batch()["new"][0]
    before, objective = model(x).detach(), make("sd_lora")
    objective.prepare_(model)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-5)
    objective.finish_(model)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_learns_the_new_and_keeps_the_array(stacked, batch, config, name):
    model, parts = stacked("forget-0"), batch(20, 12)
    seal_(model, "forget-0", request="class 0")
    arrays = al.fingerprint(model)
    add_adapter_(model, "learn-1", config(model, init_lora_weights=True))
    objective, buffer = make(name), ReplayBuffer(ratio=1.0)
    buffer.add(*parts["replay"])
    buffer.record(model)
    parts["replay"] = buffer.balanced()
    objective.prepare_(model, [parts["new"]])
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(40):
        optimiser.zero_grad()
        loss = objective.loss(model, parts, progress=step / 40)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    objective.finish_(model, [parts["new"]])
    assert losses[-1] < 0.8 * losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    assert al.fingerprint(model) == arrays
    verify_seals(model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("replay", {"ratio": -1.0}, "'replay': expected ratio of 0 or more, got -1.0"),
        ("der++", {"alpha": -1.0}, "expected alpha of 0 or more"),
        ("der++", {"beta": -1.0}, "expected beta of 0 or more"),
        ("lwf", {"strength": -1.0}, "expected strength of 0 or more"),
        ("lwf", {"temperature": 0.0}, "expected temperature above 0"),
        ("lwf", {"outputs": (1,)}, r"expected outputs to be None or to name 2 or more, got \(1,\)"),
        ("ewc", {"strength": -1.0}, "expected strength of 0 or more"),
        ("o_lora", {"strength": -1.0}, "expected strength of 0 or more"),
        ("inflora", {"threshold": 0.0}, "expected threshold above 0 and up to 1"),
        ("inflora", {"threshold": 1.5}, "expected threshold above 0 and up to 1"),
    ],
)
def test_impossible_fields_are_refused(name, options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(name, **options)


def test_the_registry():
    assert objectives.DEFAULT in objectives.names()
    with pytest.raises(UnknownNameError, match=r"unknown continual objective 'olora'.*'o_lora'"):
        objectives.get("olora")
    with pytest.raises(ConfigurationError, match=r"'replay' is registered already"):
        objectives.register(objectives.get("replay"))
    with pytest.raises(ConfigurationError, match="got no name, summary, formula, source"):
        objectives.register(type("Nameless", (objectives.ContinualObjective,), {}))
    rows = objectives.table().splitlines()
    assert len(rows) == 2 + len(objectives.names())
    assert len({row.count(" | ") for row in rows if "---" not in row}) == 1


def test_the_docs_show_the_table():
    page = Path(__file__).parents[2] / "docs" / "continual.md"
    assert objectives.table().rstrip() in page.read_text(encoding="utf-8")
