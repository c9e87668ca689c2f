"""What holds for every objective: bounds, where gradients go, what is needed, and the registry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora import ConfigurationError, DataError, StageError, UnknownNameError
from aihwkit_lora.recipes.face_objectives import forgetting
from aihwkit_lora.unlearning import objectives
from aihwkit_lora.unlearning.objectives.terms import kl, mark, mse, nll, other_outputs, token_nll

DOCS = Path(__file__).parents[3] / "docs"
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "weighted_ga": {},
    "neggrad_plus": {},
    "bounded_ga": {},
    "npo": {},
    "simnpo": {},
    "random_label": {"target": "mse"},
    "kl_uniform": {"margin": 2.0, "forgotten": (2,)},
    "masked_teacher": {},
    "scrub": {},
    "boundary_shrink": {},
    "rmu": {"layer": "1"},
    "negation": {},
}
BOUNDED = [name for name in CLASSIFIERS if objectives.get(name).bounded]
LOGITS = st.lists(st.floats(-80, 80, width=32), min_size=4, max_size=4)


def made(name: str) -> objectives.Objective:
    return objectives.get(name)(**CLASSIFIERS[name])


def linear(weights: list[list[float]]) -> nn.Module:
    """A model whose adapter has set the logits of the i-th input, where the reference has zeros."""
    net = nn.Sequential(nn.Linear(len(weights), 4, bias=False), nn.Identity())
    nn.init.zeros_(net[0].weight)
    model = get_peft_model(net, LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    with torch.no_grad():
        net[0].lora_A["default"].weight.copy_(torch.tensor(weights).T)
        net[0].lora_B["default"].weight.copy_(torch.eye(4))
    return model


@pytest.mark.parametrize("name", BOUNDED)
@given(
    rows=st.lists(LOGITS, min_size=2, max_size=4), labels=st.lists(st.integers(0, 3), min_size=4)
)
def test_a_bounded_loss_is_never_below_zero(name, rows, labels):
    x = torch.eye(len(rows))
    batch = {
        "forget": (x[:1], torch.tensor(labels[:1])),
        "retain": (x[1:], torch.tensor(labels[1 : len(rows)])),
    }
    # Logarithms of 32-bit floats, added up: a divergence of 0 comes out as ±1e-5 at worst.
    assert made(name).loss(linear(rows), batch, progress=0.5) >= -1e-4


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name not in BOUNDED])
def test_the_others_go_down_without_end(name):
    losses = []
    for size in (10.0, 1000.0):
        batch = {
            "forget": (torch.eye(2)[:1], torch.tensor([0])),
            "retain": (torch.eye(2)[1:], torch.tensor([1])),
        }
        model = linear([[-size, size, 0.0, 0.0], [0.0, size, 0.0, 0.0]])
        losses.append(made(name).loss(model, batch, progress=0.09).item())
    assert losses[1] < 50 * losses[0] < 0


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_gradients_reach_all_of_the_adapter_and_nothing_else(name, adapted, batch):
    model = adapted(init_lora_weights=False)
    made(name).loss(model, batch, progress=0.5).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    layers = ("0", "1") if name == "rmu" else ("0", "1", "2")
    adapter = {n for n, _ in model.named_parameters() if "lora_" in n and n.split(".")[2] in layers}
    assert reached == adapter
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_is_not_needed_may_lack_and_what_is_needed_is_asked_for(name, adapted, batch):
    objective, model = made(name), adapted()
    for missing in ("forget", "retain"):
        rest = {part: value for part, value in batch.items() if part != missing}
        losses = [lambda p, rest=rest: objective.loss(model, rest, progress=p)]
        if missing not in objective.needs:
            assert losses[0](0.0).isfinite()
            continue
        with pytest.raises(DataError, match=f"'{name}': expected a batch with '{missing}', got"):
            [losses[0](progress) for progress in (0.0, 0.06)]


@pytest.mark.parametrize("name", sorted({*CLASSIFIERS} - {"rmu"}))
def test_a_reference_is_needed_where_it_is_declared(name, frozen, batch):
    net = nn.Sequential(nn.Linear(10, 4))
    if "reference" not in objectives.get(name).needs:
        assert made(name).loss(net, batch).isfinite()
        return
    with pytest.raises(StageError, match="expected a model with adapters"):
        made(name).loss(net, batch)


def test_a_retain_weight_of_zero_needs_no_retain_set(adapted, batch):
    for name in sorted({*BOUNDED} - {"negation"}):
        objective = objectives.get(name)(**CLASSIFIERS[name], retain_weight=0.0)
        assert "retain" not in objective.needs
        assert "retain" in objectives.get(name).needs
        assert objective.loss(adapted(), {"forget": batch["forget"]}).isfinite()


def test_the_reference_reads_the_arrays_and_is_counted(adapted, batch):
    reads = {}
    for name in ("simnpo", "npo"):
        model, ledger = adapted(), al.Ledger()
        mapping = al.chips.get("rm-180nm").mapping
        with al.observe(model, ledger, phase="forget", mapping=mapping):
            made(name).loss(model, batch)
        reads[name] = ledger.total()["tile_reads"]
    # 12 samples to forget and 36 to keep; npo runs the former once more.
    assert reads["npo"] * 48 == reads["simnpo"] * 60


def test_random_labels_are_all_others_equally_often():
    objective, picked = objectives.get("random_label")(retain_weight=0.0), torch.zeros(4)
    x, labels = torch.zeros(900, 2), torch.full((900,), 2)
    torch.manual_seed(0)
    logits = nn.Linear(2, 4, bias=False)
    z = logits(x).detach().requires_grad_()
    objective.forget_loss(lambda _: z, x, labels).backward()
    # ∂CE/∂z = (p − onehot) / n, and p = 1/4 here.
    picked = (0.25 - z.grad * 900).sum(dim=0).round()
    assert picked[2] == 0
    assert picked.sum() == 900
    # Five standard deviations of a binomial(900, 1/3): by chance less than once in 5e5.
    assert ((picked[[0, 1, 3]] - 300).abs() < 5 * math.sqrt(900 * 2 / 9)).all()


@given(st.lists(LOGITS, min_size=4, max_size=6))
def test_the_recipe_for_faces_is_kl_uniform(rows):
    # Six outputs, person 2 to forget, 5 not learnt yet: today's objective of the face recipe.
    x = torch.rand(len(rows), 1, 16, 16)
    labels = torch.tensor([2, 0, 1, 3, 4, 2][: len(rows)])
    recipe = forgetting(forgotten=2, kept=(0, 1, 3, 4), margin=5.0)
    z = torch.nn.functional.pad(torch.tensor(rows), (0, 2))
    losses, slopes = [], []
    ours = objectives.get("kl_uniform")(
        outputs=(0, 1, 3, 4), forgotten=(2,), margin=5.0, pooled=True
    )
    forget = labels == 2
    for loss in (
        lambda z: recipe(lambda _: z, x, labels),
        lambda z: ours.loss(
            lambda mask: z[mask],
            {"forget": (forget, labels[forget]), "retain": (~forget, labels[~forget])},
        ),
    ):
        leaf = z.clone().requires_grad_()
        value = loss(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        losses.append(value.item())
        slopes.append(slope)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-6)
    # A divergence is a cross-entropy less the entropy of its target.
    constant = math.log(4) * float(forget.float().mean())
    assert losses[1] == pytest.approx(losses[0] - constant, rel=1e-4, abs=1e-4)


WRONG = [
    ("weighted_ga", {"weight": 0.5}, "expected weight below 0, got 0.5"),
    ("neggrad_plus", {"alpha": 1.0}, "expected alpha above 0 and below 1"),
    ("bounded_ga", {"bound": 0.0}, "expected bound above 0"),
    ("bounded_ga", {"beta": -1.0}, "expected beta above 0"),
    ("bounded_ga", {"retain_weight": -1.0}, "expected retain_weight of 0 or more"),
    ("npo", {"beta": 0.0}, "'npo': expected beta above 0, got 0.0"),
    ("simnpo", {"beta": 0.0}, "expected beta above 0"),
    ("random_label", {"target": "l1"}, "expected target 'ce' or 'mse', got 'l1'"),
    ("random_label", {"outputs": (1,)}, "expected outputs two or more different ones"),
    ("random_label", {"outputs": (1, 1)}, "expected outputs two or more different ones"),
    ("kl_uniform", {"margin": -1.0}, "expected margin of 0 or more"),
    ("kl_uniform", {"outputs": (1, 2), "forgotten": (2,)}, "expected forgotten outside of outputs"),
    ("kl_uniform", {"pooled": True, "retain_weight": 0.0}, "expected retain_weight above 0"),
    ("masked_teacher", {"retain": "mse"}, "expected retain 'kl' or 'ce'"),
    ("boundary_shrink", {"step": 0.0}, "expected step above 0"),
    ("scrub", {"alpha": -1.0}, "expected alpha of 0 or more"),
    ("scrub", {"gamma": -1.0}, "expected gamma of 0 or more"),
    ("scrub", {"temperature": 0.0}, "expected temperature above 0"),
    ("scrub", {"rounds": 0}, "expected rounds of 1 or more"),
    ("scrub", {"max_rounds": 11}, "expected max_rounds from 1 to rounds"),
    ("scrub", {"max_share": 1.0}, "expected max_share above 0 and below 1"),
    ("rmu", {"layer": "1", "coefficient": 0.0}, "expected coefficient above 0"),
    ("pseudo_class", {}, "expected classes or other, one of them, got None"),
    ("pseudo_class", {"classes": 3, "other": {1: 2}}, "expected classes or other, one of them"),
    ("pseudo_class", {"classes": 1}, "expected classes of 2 or more"),
    ("esd", {"null_label": 0, "eta": -1.0}, "expected eta of 0 or more"),
    ("token_ga", {"weight": 0.0}, "expected weight above 0"),
    ("token_npo", {"beta": 0.0}, "expected beta above 0"),
    ("token_simnpo", {"beta": 0.0}, "expected beta above 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_fields_are_checked(name, options, message):
    with pytest.raises(ConfigurationError, match=message):
        objectives.get(name)(**options)


def test_shapes_and_outputs_are_checked():
    z, y = torch.zeros(2, 4), torch.tensor([0, 1])
    with pytest.raises(DataError, match=r"logits of shape \(n, classes\).*got \(2, 5, 4\)"):
        nll(torch.zeros(2, 5, 4), y)
    with pytest.raises(DataError, match=r"\(n, t, vocabulary\).*got \(2, 4\) and \(2,\)"):
        token_nll(z, y)
    with pytest.raises(DataError, match=r"in the shape of its target, \(2,\), got \(2, 4\)"):
        mse(z, y)
    with pytest.raises(ConfigurationError, match=r"outputs from 0 to 3.*got \(2, 4\)"):
        mark(z, (2, 4))
    with pytest.raises(ConfigurationError, match=r"outputs from 0 to 3.*got \(-1, 2\)"):
        mark(z, (-1, 2))
    with pytest.raises(ConfigurationError, match=r"2 outputs or more.*got \[0\] of a model with 1"):
        other_outputs(torch.zeros(2, 1), torch.zeros(2).long())
    assert kl(torch.eye(4), torch.eye(4) * 1e4).max() == 0


def test_too_many_forgotten_outputs_leave_nothing(adapted, batch):
    objective = objectives.get("kl_uniform")(forgotten=(0, 1, 2))
    with pytest.raises(ConfigurationError, match=r"expected 2 outputs or more.*got \[3\]"):
        objective.loss(adapted(), batch)


def test_inputs_are_checked(adapted, batch):
    labels = batch["forget"][1]
    with pytest.raises(DataError, match=r"one tensor of floats, got torch\.int64"):
        made("boundary_shrink").loss(adapted(), {**batch, "forget": (labels, labels)})
    pseudo = objectives.get("pseudo_class")(other={1: 2})
    with pytest.raises(DataError, match=r"expected inputs \(x_t, t, label\), got a Tensor"):
        pseudo.loss(adapted(), batch)
    with pytest.raises(DataError, match=r"expected labels in other, \[1\], got 3"):
        pseudo.other_label(torch.tensor([1, 3]))


def test_rmu_needs_a_layer_that_runs_and_trains(adapted, batch):
    def loss(layer: str, model: nn.Module) -> Any:
        return objectives.get("rmu")(layer=layer).loss(model, batch)

    with pytest.raises(ConfigurationError, match=r"the name of a layer, got 'head'\. Known: 0, 1"):
        loss("head", nn.Sequential(nn.Linear(10, 4), nn.ReLU()))
    with pytest.raises(ConfigurationError, match="in layer '1' or before it, got none"):
        loss("1", adapted(target_modules=["2"]))
    net = nn.Sequential(nn.Linear(10, 4))
    net[0].unused = nn.Identity()
    with pytest.raises(ConfigurationError, match=r"expected layer '0\.unused' to give a tensor"):
        loss("0.unused", net)


def test_rmu_takes_the_first_part_of_what_a_layer_gives():
    recurrent = nn.GRU(3, 2)
    h = objectives.get("rmu")(layer="").hidden(recurrent, torch.zeros(4, 3))
    assert h.shape == (4, 2)


def test_the_default_is_registered_and_bounded():
    assert objectives.get(objectives.DEFAULT).bounded


def test_names_are_unique_and_unknown_ones_are_helped():
    with pytest.raises(ConfigurationError, match="objective 'npo' is registered already"):
        objectives.register(objectives.get("npo"))
    with pytest.raises(UnknownNameError, match=r"unknown objective 'nop'\. Did you mean 'npo'"):
        objectives.get("nop")


def test_a_class_that_does_not_say_what_it_is_is_refused():
    class Silent(objectives.Objective):
        name: ClassVar[str] = "silent"
        bounded: ClassVar[bool] = True

        def loss(self, model, batch, *, progress=0.0):
            return torch.zeros(())

    with pytest.raises(
        ConfigurationError, match=r"Silent: .* got no summary, formula, source, needs"
    ):
        objectives.register(Silent)
    assert "silent" not in objectives.names()


def test_the_page_shows_the_table():
    # Without those that other tests, or the page itself, have registered in this process.
    ours = {n for n in objectives.names() if objectives.get(n).__module__.startswith("aihwkit_")}
    rows = objectives.table().splitlines(keepends=True)
    table = rows[:2] + [row for row in rows[2:] if row.split("`")[1] in ours]
    assert len(table) == 2 + 19
    assert "".join(table) in (DOCS / "objectives.md").read_text(encoding="utf-8")


def test_no_cell_of_the_table_breaks_it():
    assert {line.count("|") for line in objectives.table().splitlines()} == {7}
