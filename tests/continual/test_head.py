"""A head grows by digital rows; what it said before it says still, bit for bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.continual.composition import add_adapter_
from aihwkit_lora.continual.head import ROWS, grow_head_
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.unlearning.seal import seal_, verify_seals

MAPPING = al.chips.get("rm-180nm").mapping


def digital():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture
def models(frozen, stacked):
    def sealed():
        model = stacked("forget-1")
        seal_(model, "forget-1", request="class 1")
        return model

    return {
        "digital": digital,
        "frozen": frozen,
        "adapted": lambda: stacked("forget-1"),
        "head not adapted": lambda: stacked("forget-1", target_modules=["0"]),
        "sealed": sealed,
        "on a unit": lambda: al.digitize_(stacked("a1"), al.DigitalUnit(bits=8, sram_kib=64)),
    }


KINDS = ["digital", "frozen", "adapted", "head not adapted", "sealed", "on a unit"]


@pytest.mark.parametrize("kind", KINDS)
def test_old_logits_are_bit_equal(models, kind):
    model, x = models[kind](), torch.randn(7, 10)
    old = model(x)
    for size in (4, 6, 7):
        grow_head_(model, size - model(x).shape[1])
        new = model(x)
        assert new.shape == (7, size)
        assert torch.equal(new[:, :3], old)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_new_rows_only(models, kind):
    model = models[kind]().requires_grad_(False)
    grow_head_(grow_head_(model, 1), 2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name.split(f"{ROWS}.")[1] for name in trained] == ["rows_1.weight", "rows_1.bias"]
    model(torch.randn(7, 10)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_an_adapter_in_training_stays_in_training(stacked):
    model = stacked("learn-3")
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    grow_head_(model, 1)
    after = {name for name, p in model.named_parameters() if p.requires_grad}
    assert before < after
    assert len(after - before) == 2


def test_old_weights_may_stay_in_training():
    model = grow_head_(digital(), 1, freeze_old=False)
    assert all(p.requires_grad for p in model.parameters())


def test_names_of_what_was_there_stay(stacked):
    model = stacked("forget-1")
    before, targets = set(model.state_dict()), al.target_modules(model)
    grow_head_(model, 1)
    assert before < set(model.state_dict())
    assert al.target_modules(model) == targets


def test_seals_hold(models):
    model = grow_head_(models["sealed"](), 2)
    verify_seals(model)
    model(torch.randn(2, 10))


def test_a_frozen_array_is_not_written(frozen):
    model = frozen()
    mark = al.fingerprint(model)
    grow_head_(model, 3)
    assert al.fingerprint(model) == mark
    al.verify(model)


@pytest.mark.parametrize("name", ["frozen", "head not adapted"])
def test_a_later_adapter_of_a_grown_head_leaves_the_rows_beside_it(models, config, name):
    model, x = grow_head_(models[name](), 2), torch.randn(5, 10)
    before = model(x)
    model = add_adapter_(model, "learn-3", config(model, init_lora_weights=True))
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    grown = model(x)
    assert grown.shape == before.shape
    assert not torch.equal(grown, before)
    al.verify(model)


def test_rows_are_drawn_like_the_old_ones():
    torch.manual_seed(0)
    head = nn.Linear(200, 20)
    head.weight.data.normal_(0.3, 0.05)
    model = grow_head_(nn.Sequential(head), 50, generator=torch.Generator().manual_seed(3))
    rows, old = model[0].grown_rows.rows_0, head.weight.detach()
    new = rows.weight.detach()
    # 10,000 draws: the mean is off by more than five standard errors once in 1.7 million seeds.
    assert abs(float(new.mean() - old.mean())) < 5 * float(old.std()) / 100
    assert abs(float(new.std() / old.std()) - 1) < 5 / 20000**0.5
    assert not bool(rows.bias.any())


def test_the_generator_decides_and_torch_s_own_is_left_alone():
    state = torch.get_rng_state()
    heads = [
        grow_head_(copy.deepcopy(model), 1, generator=torch.Generator().manual_seed(seed))
        for model in [nn.Sequential(nn.Linear(3, 2))]
        for seed in (1, 1, 2)
    ]
    torch.set_rng_state(state)
    first, second, third = [model[0].grown_rows.rows_0.weight for model in heads]
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_head_without_bias_gets_rows_without():
    model = grow_head_(nn.Sequential(nn.Linear(3, 2, bias=False)), 1)
    assert model[0].grown_rows.rows_0.bias is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_is_counted_as_before_plus_the_rows(models, kind):
    counts = []
    for outputs in (0, 2):
        model, ledger = models[kind](), al.Ledger()
        if outputs:
            grow_head_(model, outputs)
        with al.observe(model, ledger, phase="test", mapping=MAPPING), torch.no_grad():
            model(torch.ones(5, 10))
        counts.append(dict(ledger.total()))
    before, after = counts
    width = 6 if kind == "digital" else 12
    before["forward_macs"] = before.get("forward_macs", 0) + 5 * width * 2
    assert after == before


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_files_keep_the_rows(models, kind):
    model, x = grow_head_(models[kind](), 2), torch.randn(4, 10)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for same in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(same(x), model(x))


def test_a_head_can_be_named(frozen):
    model = grow_head_(frozen(), 1, head="2")
    assert model(torch.ones(1, 10)).shape == (1, 4)
    model = nn.ModuleDict(
        {"body": nn.Linear(4, 3), "people": nn.Linear(3, 2), "mood": nn.Linear(3, 2)}
    )
    assert grow_head_(model, 1, head="people")["people"](torch.ones(1, 3)).shape == (1, 3)


def test_a_head_that_is_the_model_itself():
    assert grow_head_(nn.Linear(3, 2), 1)(torch.ones(1, 3)).shape == (1, 3)


def test_what_cannot_grow_is_refused(stacked):
    with pytest.raises(ConfigurationError, match="outputs of at least 1, got 0"):
        grow_head_(digital(), 0)
    with pytest.raises(ConfigurationError, match=r"name a linear layer of PeftModel, got 'haed'"):
        grow_head_(stacked("a1"), 1, head="haed")
    with pytest.raises(ConfigurationError, match=r"of ReLU, got None\. None is registered"):
        grow_head_(nn.ReLU(), 1)
