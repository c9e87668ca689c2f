"""digitize_: LoRA in fixed point, with PEFT none the wiser."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import aihwkit_lora as al
from aihwkit_lora.adapters import DigitalUnit, digitize_, power_cycle_, undigitize_
from aihwkit_lora.adapters.fixed_point import OnUnit, fixed_point

Make = Callable[..., PeftModel]
Batch = Callable[..., Tensor]
NETWORKS = ["linear", "signal", "image", "volume"]
UNIT = DigitalUnit(bits=5)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


def by_hand(layer: Any, x: Tensor, bits: int, adapters: tuple[str, ...] = ("default",)) -> Tensor:
    """The layer's output, its branches computed apart from its modules."""
    y: Tensor = layer.base_layer(x)
    for adapter in adapters:
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        hidden = product(product(x, down, bits), up, bits)
        y = y + hidden.float() * layer.scaling[adapter]
    return y


def product(x: Tensor, matrix: Any, bits: int) -> Tensor:
    def grid(values: Tensor) -> Tensor:
        vector = (-1,) if isinstance(matrix, nn.Linear) else tuple(range(1, values.dim()))
        return fixed_point(values, bits, vector)

    weight = fixed_point(matrix.weight, bits)
    if isinstance(matrix, nn.Linear):
        return grid(grid(x) @ weight.T)
    convolve = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}
    sums = convolve[weight.dim()](grid(x), weight, None, matrix.stride, matrix.padding)
    return grid(sums)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_branches_run_in_fixed_point(adapted: Make, batch: Batch, network: str, bits: int) -> None:
    model, x = adapted(network), batch(network)
    plain = model(x)
    assert digitize_(model, DigitalUnit(bits=bits)) is model
    first = layers(model)[0]
    assert torch.equal(first(x), by_hand(first, x, bits))
    assert not torch.equal(model(x), plain)


@pytest.mark.parametrize("network", NETWORKS)
def test_wide_numbers_come_close_to_floats(adapted: Make, batch: Batch, network: str) -> None:
    model, x = adapted(network), batch(network)
    with torch.no_grad():
        plain = model(x)
        units = [DigitalUnit(bits=bits) for bits in (3, 6, 10, 16)]
        errors = [float((digitize_(model, unit)(x) - plain).norm()) for unit in units]
    assert errors == sorted(errors, reverse=True)
    # Converters of the tiles that follow can tip by one code.
    assert errors[-1] < 0.02 * float(plain.norm())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "back", [undigitize_, lambda model: digitize_(model, DigitalUnit(bits=None))]
)
def test_there_is_a_way_back(
    adapted: Make, batch: Batch, network: str, back: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = adapted(network), batch(network)
    plain = model(x)
    assert not torch.equal(digitize_(model, DigitalUnit(bits=3))(x), plain)
    assert torch.equal(back(model)(x), plain)


def test_without_a_unit_everything_is_pefts_own_again(adapted: Make) -> None:
    model, original = adapted("image"), adapted("image")
    attributes = [set(vars(module)) for module in original.modules()]
    undigitize_(digitize_(model, UNIT))
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_another_unit_replaces_the_first(adapted: Make, batch: Batch) -> None:
    model, x = adapted(), batch()
    digitize_(model, DigitalUnit(bits=3))
    assert torch.equal(digitize_(model, UNIT)(x), digitize_(adapted(), UNIT)(x))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}])
def test_other_kinds_of_lora_run_too(adapted: Make, batch: Batch, options: dict[str, Any]) -> None:
    targets = ["0", "3"]  # with a bias, as lora_bias wants
    model, x = adapted(target_modules=targets, **options), batch()
    if "lora_bias" in options:
        for layer in layers(model):
            nn.init.normal_(layer.lora_B["default"].bias)
    plain = model(x)
    digitize_(model, DigitalUnit(bits=4))
    coarse = (model(x) - plain).detach().abs().mean()
    digitize_(model, DigitalUnit(bits=16))
    fine = (model(x) - plain).detach().abs().mean()
    assert coarse > 10 * fine
    model(x).sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_a_fresh_adapter_still_changes_nothing(
    frozen: Callable[..., nn.Module], config: Callable[..., LoraConfig], batch: Batch
) -> None:
    for dora in (False, True):
        model, x = frozen(), batch()
        expected = model(x)
        options = {"init_lora_weights": True, "use_dora": dora}
        model = get_peft_model(model, config(model, **options)).eval()
        torch.testing.assert_close(digitize_(model, UNIT)(x), expected, rtol=0, atol=1e-5)


def test_adapters_on_digital_layers_stay_in_floating_point(
    frozen: Callable[..., nn.Module], config: Callable[..., LoraConfig]
) -> None:
    model = nn.Sequential(nn.Linear(6, 10), frozen())
    model = get_peft_model(model, config(model, target_modules="all-linear"))
    digitize_(model, UNIT)
    on_unit = {
        name: isinstance(layer.lora_A["default"], OnUnit)
        for name, layer in zip("dabc", layers(model), strict=True)
    }
    assert on_unit == {"d": False, "a": True, "b": True, "c": True}


def test_a_model_without_adapters_on_frozen_layers_is_refused(
    frozen: Callable[..., nn.Module],
) -> None:
    digital = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    for model in (frozen(), digital, nn.Linear(3, 2)):
        with pytest.raises(al.StageError, match="expected LoRA on frozen layers, got none"):
            digitize_(model, UNIT)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (LoHaConfig(target_modules=["0", "3"]), r"loha\.Linear"),
        (IA3Config(target_modules=["0", "3"], feedforward_modules=[]), r"ia3\.Linear"),
        (AdaLoraConfig(target_modules=["0", "3"], total_step=9), r"adalora\.SVDLinear"),
    ],
)
def test_other_methods_are_refused_by_name(
    frozen: Callable[..., nn.Module], other: Any, found: str
) -> None:
    model = get_peft_model(frozen(), other)
    with pytest.raises(
        al.UnsupportedTileError, match=rf"layer '0': expected .* got {found}\. Leave"
    ):
        digitize_(model, UNIT)


def test_other_variants_are_refused_by_name_and_nothing_is_changed(adapted: Make) -> None:
    model = adapted(target_modules=["0"])
    model.add_adapter("odd", LoraConfig(r=2, target_modules=["3"], init_lora_weights="mica"))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(al.UnsupportedTileError, match=r"layer '3': .* got MiCALinearVariant\."):
        digitize_(model, UNIT)
    assert [type(module) for module in model.modules()] == kinds


def test_matrices_of_an_unknown_type_are_refused(adapted: Make) -> None:
    class Own(nn.Linear):
        pass

    model = adapted()
    layers(model)[1].lora_B["default"].__class__ = Own
    with pytest.raises(
        al.UnsupportedTileError, match=r"layer '2': .* got a matrix that is a Own\."
    ):
        digitize_(model, UNIT)


def test_names_parameters_and_optimisers_are_left_alone(adapted: Make, batch: Batch) -> None:
    model = adapted()
    names, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)
    digitize_(model, UNIT)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    before = [p.detach().clone() for p in parameters if p.requires_grad]
    model(batch()).square().sum().backward()
    optimizer.step()
    after = [p for p in parameters if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # Floats that lie on no grid.
    assert any(not torch.equal(p.double(), fixed_point(p, 5)) for p in after)


def stored(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), stored])
@pytest.mark.parametrize("network", NETWORKS)
def test_copies_have_a_unit_of_their_own(
    adapted: Make, batch: Batch, network: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = digitize_(adapted(network), UNIT), batch(network)
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    memories = {id(layer.sram) for layer in layers(twin)}
    assert len(memories) == 1
    assert memories.isdisjoint(id(layer.sram) for layer in layers(model))
    undigitize_(twin)
    assert not torch.equal(twin(x), model(x))


def test_what_is_saved_is_an_ordinary_lora(
    adapted: Make, frozen: Callable[..., nn.Module], batch: Batch, tmp_path: Path
) -> None:
    model, x = adapted(), batch()
    plain = model(x)
    digitize_(model, UNIT).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen(), tmp_path).eval()
    assert torch.equal(loaded(x), plain)
    assert torch.equal(digitize_(loaded, UNIT)(x), model(x))


def test_adapters_may_be_switched_off_swapped_and_combined(
    adapted: Make, frozen: Callable[..., nn.Module], config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model, x = adapted(), batch()
    model.add_adapter("second", config(model, r=3))
    digitize_(model.eval(), UNIT)
    with model.disable_adapter():
        assert torch.equal(model(x), frozen()(x))
    first = layers(model)[0]
    for active in (("second",), ("default",), ("second", "default")):
        model.base_model.set_adapter(list(active))
        assert torch.equal(first(x), by_hand(first, x, 5, active))
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "both", "cat")
    model.set_adapter("both")
    assert torch.equal(first(x), by_hand(first, x, 5, ("both",)))


def test_rows_of_a_batch_may_take_different_adapters(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model, x = adapted(), batch(size=4)
    model.add_adapter("second", config(model))
    digitize_(model.eval(), UNIT)
    alone = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model(x)
    with model.disable_adapter():
        alone["__base__"] = model(x)
    names = ["second", "__base__", "default", "second"]
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(model(x, adapter_names=names), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_adapters_that_come_later_run_on_the_unit(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch, layer: str
) -> None:
    """On layers that have adapters already, and on others."""
    model, x = adapted(target_modules=["0"]), batch()
    digitize_(model, UNIT)
    model.add_adapter("late", config(model, target_modules=[layer]))
    model.eval().set_adapter("late")
    late = model.base_model.model[int(layer)]
    hidden = x if layer == "0" else torch.relu(model.base_model.model[0](x))
    assert torch.equal(late(hidden), by_hand(late, hidden, 5, ("late",)))


def test_an_adapter_that_is_loaded_later_runs_on_the_unit(
    adapted: Make, batch: Batch, tmp_path: Path
) -> None:
    adapted().save_pretrained(tmp_path)
    model, x = adapted(r=1), batch()
    digitize_(model, UNIT)
    for quick in (False, True):
        name = f"late{quick}"
        model.load_adapter(tmp_path, name, low_cpu_mem_usage=quick)
        model.eval().set_adapter(name)
        assert torch.equal(model(x), digitize_(adapted(), UNIT)(x))


def test_a_later_adapter_that_the_unit_cannot_run_is_refused_when_it_runs(
    adapted: Make, batch: Batch
) -> None:
    model, x = adapted(target_modules=["0"]), batch()
    expected = digitize_(model, UNIT)(x)
    model.add_adapter("odd", LoraConfig(r=2, target_modules=["0"], init_lora_weights="mica"))
    assert torch.equal(model(x), expected)
    model.set_adapter("odd")
    with pytest.raises(al.UnsupportedTileError, match=r"layer '0': .* got MiCALinearVariant"):
        model(x)


def test_an_adapter_injected_past_the_tuner_runs_on_the_unit(adapted: Make, batch: Batch) -> None:
    """As transformers' own ``add_adapter`` does, which makes a tuner for each adapter."""
    model, x = adapted(target_modules=["0"]), batch()
    digitize_(model, UNIT)
    layer = layers(model)[0]
    options = LoraConfig(r=3, init_lora_weights=False)
    layer.update_layer("late", r=3, lora_alpha=3, config=options)
    layer.set_adapter("late")
    assert torch.equal(layer(x), by_hand(layer, x, 5, ("late",)))


def test_a_deleted_adapter_may_come_back_with_another_rank(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model, x = adapted(), batch()
    model.add_adapter("second", config(model))
    digitize_(model, UNIT)
    model.delete_adapter("second")
    model.add_adapter("second", config(model, r=5))
    model.eval().set_adapter("second")
    first = layers(model)[0]
    assert torch.equal(first(x), by_hand(first, x, 5, ("second",)))
    assert first.slots["second"].footprint.rank == 5


def test_unloading_leaves_nothing_behind(
    adapted: Make, frozen: Callable[..., nn.Module], batch: Batch
) -> None:
    model, x = adapted(), batch()
    bare = digitize_(model, UNIT).unload()
    assert torch.equal(bare(x), frozen()(x))
    again = get_peft_model(bare, LoraConfig(target_modules=["0"]))
    assert type(again.base_model) is LoraModel
    assert [type(layer) for layer in layers(again)] == [lora.Linear]


def test_merging_is_refused_as_before(adapted: Make, batch: Batch) -> None:
    model, x = digitize_(adapted(), UNIT), batch()
    expected = model(x)
    with pytest.raises(al.FrozenConductanceError, match="reprogram_"):
        model.merge_adapter()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("network", ["linear", "image"])
def test_consolidating_takes_what_the_unit_holds(adapted: Make, network: str) -> None:
    model = adapted(network)
    for layer in layers(model):
        floats = layer.get_delta_weight("default")
        digitize_(model, DigitalUnit(bits=4))
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        held = fixed_point(up.weight, 4).flatten(1) @ fixed_point(down.weight, 4).flatten(1)
        expected = (held * layer.scaling["default"]).float().view(floats.shape)
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-6, atol=0)
        assert not torch.allclose(floats, expected)
        undigitize_(model)


def test_reprogramming_writes_what_the_unit_holds() -> None:
    chip, models = al.chips.get("rm-180nm"), []
    for _ in range(2):
        torch.manual_seed(0)
        model = al.convert(nn.Sequential(nn.Linear(6, 4)), chip)
        al.program_(model, chip, seed=0)
        options = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        models.append(get_peft_model(al.freeze_(model), options))
    consolidated, by_targets = models
    layer = layers(digitize_(consolidated, DigitalUnit(bits=3)))[0]
    target = layer.base_layer.weight + layer.get_delta_weight("default").detach()
    al.reprogram_(consolidated, chip, seed=1)
    al.reprogram_(by_targets, chip, {"0": target}, seed=1)
    assert al.fingerprint(consolidated) == al.fingerprint(by_targets)
    assert not bool(layer.lora_B["default"].weight.any())


def test_gradients_survive_checkpointing(adapted: Make, batch: Batch) -> None:
    gradients = []
    for recompute in (False, True):
        model, x = digitize_(adapted(), UNIT), batch().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_torch_func_and_half_precision_models_work(adapted: Make, batch: Batch) -> None:
    model, x = digitize_(adapted(), UNIT), batch()
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(some: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, some, (sample,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    loss(dict(model.named_parameters()), x).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)
    low = model.bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert bool(low(x.bfloat16()).isfinite().all())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_computes_and_loads_the_same(adapted: Make, batch: Batch) -> None:
    torch.compiler.reset()
    model, x = digitize_(adapted(), UNIT), batch()
    expected = model(x)
    compiled = torch.compile(power_cycle_(model), backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
    assert all(layer.slots["default"].resident for layer in layers(model))
    torch.compiler.reset()


def loss_left(bits: int | None) -> float:
    """After training, as a fraction of the loss at the start."""
    torch.manual_seed(4)
    chip = al.chips.get("rm-180nm")
    model = al.convert(nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)), chip)
    model = al.freeze_(model, programmed_by="test")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"]))
    digitize_(model, DigitalUnit(bits=bits))
    x = torch.randn(64, 10)
    goal = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] - x[:, 4]], dim=1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[-1] / losses[0]


def test_training_knows_about_the_rounding() -> None:
    floats, at_8, at_4 = (loss_left(bits) for bits in (None, 8, 4))
    assert floats < 0.1
    assert at_8 < floats + 0.02
    assert at_4 < 0.5
