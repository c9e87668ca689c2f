"""Group lasso, and layers that leave the SRAM."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora import ConfigurationError, StageError
from aihwkit_lora.unlearning import objectives
from aihwkit_lora.unlearning.reference import reference


def norm(*matrices) -> float:
    return math.sqrt(sum(float(x) ** 2 for m in matrices for x in m.weight.flatten().tolist()))


def factors(layer, adapter="default"):
    return layer.lora_A[adapter], layer.lora_B[adapter]


def test_the_penalty_is_the_sum_of_the_norms_and_warms_up(adapted, batch):
    model = adapted(init_lora_weights=False)
    first, second = (factors(model.base_model.model[i]) for i in (0, 2))
    plain = objectives.get("bounded_ga")()
    base = plain.loss(model, batch).item()
    sparse = objectives.group_lasso(plain, 0.3, warm_up=0.5)
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        wanted = base + 0.3 * share * (norm(*first) + norm(*second))
        found = sparse.loss(model, batch, progress=progress).item()
        assert found == pytest.approx(wanted, rel=1e-5)  # 32-bit floats
    grouped = objectives.group_lasso(plain, 0.3, warm_up=0.0, groups=("base", "0", "2"))
    assert grouped.loss(model, batch).item() == pytest.approx(wanted, rel=1e-5)


def test_layers_of_a_group_share_a_norm():
    net = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "ab": nn.Linear(3, 3)}
    )
    options = {"target_modules": ["0", "1", "ab"], "init_lora_weights": False}
    model = get_peft_model(net, LoraConfig(**options))
    sparse = objectives.group_lasso(objectives.get("npo")(), groups=("a",))
    parts = [factors(layer) for layer in (net["a"][0], net["a"][1], net["ab"])]
    wanted = norm(*parts[0], *parts[1]) + norm(*parts[2])
    assert sparse.penalty(model).item() == pytest.approx(wanted, rel=1e-5)


def test_only_what_is_trained_is_penalised(adapted):
    model = adapted(init_lora_weights=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    sparse = objectives.group_lasso(objectives.get("npo")())
    wanted = sum(norm(factors(model.base_model.model[i])[1]) for i in (0, 2))
    assert sparse.penalty(model).item() == pytest.approx(wanted, rel=1e-5)
    model.requires_grad_(False)
    with pytest.raises(StageError, match="a LoRA that is being trained, got none"):
        sparse.penalty(model)


def test_it_says_what_the_inner_objective_says():
    inner = objectives.get("scrub")()
    sparse = objectives.group_lasso(inner)
    assert (sparse.needs, sparse.bounded) == (inner.needs, inner.bounded)
    assert "scrub" in sparse.name
    assert sparse.formula.startswith(inner.formula)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "'group_lasso': expected strength above 0, got 0.0"),
        ({"warm_up": 1.5}, "expected warm_up from 0 to 1, got 1.5"),
    ],
)
def test_fields_are_checked(options, message):
    with pytest.raises(ConfigurationError, match=message):
        objectives.group_lasso(objectives.get("npo")(), **options)


def test_a_strong_lasso_empties_the_layer_that_is_not_needed(adapted, batch):
    model = adapted()
    sparse = objectives.group_lasso(objectives.get("kl_uniform")(), 0.2, warm_up=0.3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for step in range(200):
        optimizer.zero_grad()
        sparse.loss(model, batch, progress=step / 200).backward()
        optimizer.step()
    norms = objectives.block_norms(model, "default")
    small, large = sorted(norms.values())
    assert small < 0.05 < 1.0 < large
    unused = objectives.prune_unused_(model, "default", threshold=0.05)
    assert len(unused) == 1
    with torch.no_grad():
        assert (model(batch["forget"][0]).argmax(dim=1) != 2).all()
        assert (model(batch["retain"][0]).argmax(dim=1) == batch["retain"][1]).all()


@pytest.fixture
def half_empty(adapted):
    """An adapter with nothing in the first layer, beside a frozen one that is full."""
    model = adapted(init_lora_weights=False)
    model.add_adapter("new", LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "new"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".new." in name)
    for matrix in factors(model.base_model.model[0], "new"):
        nn.init.zeros_(matrix.weight)
    return model.eval()


def outputs(model, batch):
    with torch.no_grad():
        return model(batch["forget"][0])


def test_pruning_leaves_outputs_flags_and_other_adapters_alone(half_empty, batch):
    before = outputs(half_empty, batch)
    flags = {n: p.requires_grad for n, p in half_empty.named_parameters() if ".0.lora_" not in n}
    kept = factors(half_empty.base_model.model[0], "default")
    assert objectives.prune_unused_(half_empty, "new", threshold=1e-6) == ("0",)
    assert torch.equal(outputs(half_empty, batch), before)
    assert factors(half_empty.base_model.model[0], "default") == kept
    assert not any(p.requires_grad for matrix in kept for p in matrix.parameters())
    after = {n: p.requires_grad for n, p in half_empty.named_parameters() if ".0.lora_" not in n}
    assert after == flags
    with torch.no_grad(), reference(half_empty):
        half_empty(batch["forget"][0])


def test_pruned_layers_leave_the_sram(half_empty, batch):
    al.digitize_(half_empty, al.DigitalUnit(bits=8, sram_kib=4))
    objectives.prune_unused_(half_empty, "new", threshold=1e-6)
    al.power_cycle_(half_empty)
    ledger, mapping = al.Ledger(), al.chips.get("rm-180nm").mapping
    with al.observe(half_empty, ledger, phase="load", mapping=mapping):
        outputs(half_empty, batch)
    loaded = {layer: counts["sram_write_bits"] for layer, counts in ledger.by_layer().items()}
    assert ledger.total()["adapter_loads"] == 3
    # Rank 4 of "default" in both layers, 10 → 16 → 4; rank 2 of "new" in the second only. What
    # else is written are inputs' products, on A and B themselves.
    assert loaded["0"] == 8 * 4 * (10 + 16)
    assert loaded["2"] == 8 * (4 + 2) * (16 + 4)


def test_pruned_layers_stay_away_after_saving_and_loading(half_empty, frozen, batch, tmp_path):
    objectives.prune_unused_(half_empty, "new", threshold=1e-6)
    before = outputs(half_empty, batch)
    half_empty.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen(), tmp_path / "new", adapter_name="new").eval()
    assert list(objectives.block_norms(loaded, "new")) == ["2"]
    loaded.load_adapter(tmp_path, adapter_name="default")
    loaded.base_model.set_adapter(["default", "new"])
    assert torch.equal(outputs(loaded, batch), before)


@pytest.mark.parametrize("excluded", [["other"], r"other\..*"])
def test_what_was_excluded_before_stays_excluded(excluded, tmp_path):
    def net():
        torch.manual_seed(0)
        layers = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}
        return nn.Sequential(
            nn.ModuleDict({**layers, "other": nn.ModuleDict({"a": nn.Linear(3, 3)})})
        )

    excluded = ["other.a"] if excluded == ["other"] else r"0\.other\..*"
    options = {"target_modules": ["a", "b"], "exclude_modules": excluded}
    model = get_peft_model(net(), LoraConfig(**options, init_lora_weights=False))
    nn.init.zeros_(model.base_model.model[0]["a"].lora_A["default"].weight)
    nn.init.zeros_(model.base_model.model[0]["a"].lora_B["default"].weight)
    assert objectives.prune_unused_(model, "default", threshold=1e-6) == ("0.a",)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path)
    assert list(objectives.block_norms(loaded, "default")) == ["0.b"]


def test_nothing_below_the_threshold_changes_nothing(half_empty):
    before = half_empty.peft_config["default"].exclude_modules
    assert objectives.prune_unused_(half_empty, "default", threshold=1e-6) == ()
    assert half_empty.peft_config["default"].exclude_modules == before


@pytest.mark.parametrize("adapter", ["new", "unknown"])
def test_pruning_never_takes_everything(half_empty, adapter):
    with pytest.raises(ConfigurationError, match=f"leaves some of adapter '{adapter}', got 1000"):
        objectives.prune_unused_(half_empty, adapter, threshold=1000.0)
    assert "new" in half_empty.base_model.model[0].lora_A
