"""Every layer of aihwkit, frozen: the same function, and an ordinary layer for torch and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aihwkit.nn import (
    AnalogConv1d,
    AnalogConv1dMapped,
    AnalogConv2d,
    AnalogConv2dMapped,
    AnalogConv3d,
    AnalogConv3dMapped,
    AnalogGRUCell,
    AnalogLinear,
    AnalogLinearMapped,
    AnalogLSTMCell,
    AnalogLSTMCellCombinedWeight,
    AnalogRNN,
    AnalogSequential,
    AnalogVanillaRNNCell,
)
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.presets import ReRamESPreset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.tiles.layers import (
    LAYERS,
    FrozenConv1d,
    FrozenConv2d,
    FrozenConv3d,
    FrozenLinear,
    freezes,
)

CHIP = al.chips.get("rm-180nm")
TORCH_OF = {FrozenConv1d: nn.Conv1d, FrozenConv2d: nn.Conv2d, FrozenConv3d: nn.Conv3d}


def quiet(config: Any, tile: int = 14) -> Any:
    """Noise off, and an ADC so fine that no sum lies on the edge between two codes."""
    config.forward.out_noise, config.forward.out_res = 0.0, 1e-9
    config.mapping.max_input_size = config.mapping.max_output_size = tile
    config.mapping.weight_scaling_omega = 1.0
    return config


LINEAR = [(AnalogLinear, {}), (AnalogLinearMapped, {})]
CONVOLUTIONS = [
    (AnalogConv1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (2, 4, 11)),
    (AnalogConv1dMapped, {"kernel_size": 3, "padding": 2}, (2, 4, 11)),
    (AnalogConv2d, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}, (2, 4, 8, 9)),
    (AnalogConv2d, {"kernel_size": 3, "dilation": 2, "padding": 2}, (2, 4, 8, 9)),
    (AnalogConv2dMapped, {"kernel_size": (3, 2), "padding": 1}, (2, 4, 8, 9)),
    (AnalogConv3d, {"kernel_size": (2, 3, 2), "padding": (1, 1, 0)}, (2, 4, 5, 6, 7)),
    (AnalogConv3dMapped, {"kernel_size": (1, 3, 2), "stride": (1, 2, 1)}, (2, 4, 5, 6, 7)),
]


def tile_of(kind: type) -> int:
    """Tiles of 20 × 20, but one for all where aihwkit 1.2.0 cannot split the layer."""
    return 0 if kind is AnalogConv3d else 20


def convolution(kind: type, options: dict[str, Any], config: Any, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = kind(4, 10, bias=bias, rpu_config=config, **options)
    return layer.eval()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("config", [InferenceRPUConfig, ReRamESPreset])
@pytest.mark.parametrize(("kind", "options", "shape"), CONVOLUTIONS)
def test_convolutions_compute_what_they_did(
    kind: type, options: dict[str, Any], shape: tuple[int, ...], config: Any, bias: bool
) -> None:
    layer = convolution(kind, options, quiet(config(), tile=tile_of(kind)), bias)
    x = torch.randn(shape)
    expected, weight = layer(x).detach(), layer.get_weights()[0]
    frozen = al.freeze_(layer, programmed_by="test")
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=2e-6)
    torch_layer = TORCH_OF[type(frozen)]
    assert isinstance(frozen, torch_layer)
    assert torch.equal(frozen.weight.flatten(1), weight.flatten(1))
    plain = torch_layer(4, 10, bias=bias, **options)
    assert plain.weight.shape == frozen.weight.shape
    assert frozen.extra_repr().startswith(plain.extra_repr())


@pytest.mark.parametrize(("kind", "options", "shape"), CONVOLUTIONS)
def test_gradients_through_convolutions_are_those_of_torch(
    kind: type, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    config = quiet(InferenceRPUConfig(), tile=tile_of(kind))
    config.forward.is_perfect = True
    frozen = al.freeze_(convolution(kind, options, config, True), programmed_by="test")
    plain = TORCH_OF[type(frozen)](4, 10, **options)
    plain.weight.data.copy_(torch.as_tensor(frozen.weight))
    plain.bias.data.copy_(frozen.bias)
    x, y = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    y.data.copy_(x)
    upstream = torch.randn_like(plain(x))
    frozen(x).backward(upstream)
    plain(y).backward(upstream)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


def test_an_image_without_a_batch_is_convolved() -> None:
    layer = convolution(AnalogConv2d, {"kernel_size": 3}, quiet(TorchInferenceRPUConfig()), True)
    frozen, image = al.freeze_(layer, programmed_by="test"), torch.randn(4, 8, 9)
    assert torch.equal(frozen(image), frozen(image[None])[0])


@pytest.mark.parametrize(("kind", "options", "shape"), CONVOLUTIONS)
def test_thawing_gives_the_same_class_and_function(
    kind: type, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    layer = convolution(kind, options, quiet(InferenceRPUConfig(), tile=tile_of(kind)), True)
    x = torch.randn(shape)
    expected = layer(x).detach()
    thawed = al.thaw_(al.freeze_(layer, programmed_by="test"))
    assert type(thawed) is kind
    torch.testing.assert_close(thawed.eval()(x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("kind", "_"), LINEAR)
@pytest.mark.parametrize("config", [InferenceRPUConfig, TorchInferenceRPUConfig, ReRamESPreset])
def test_linear_layers_compute_what_they_did(kind: type, _: Any, config: Any) -> None:
    torch.manual_seed(0)
    layer = kind(30, 20, rpu_config=quiet(config())).eval()
    x = torch.randn(2, 3, 30)
    expected = layer(x).detach()
    frozen = al.freeze_(layer, programmed_by="test")
    assert type(frozen) is FrozenLinear
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=2e-6)
    assert type(al.thaw_(frozen)) is kind


CELLS = [AnalogVanillaRNNCell, AnalogLSTMCell, AnalogLSTMCellCombinedWeight, AnalogGRUCell]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layers_compute_what_they_did_and_adapt(
    cell: type, bias: bool, bidirectional: bool
) -> None:
    torch.manual_seed(0)
    config = quiet(TorchInferenceRPUConfig(), tile=8)
    rnn = AnalogRNN(cell, 6, 10, bias, config, num_layers=2, bidir=bidirectional)
    model, x = rnn.eval(), torch.randn(5, 3, 6)
    expected = model(x)[0].detach()
    fingerprint = al.fingerprint(al.freeze_(model, programmed_by="test"))
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=5e-6)
    adapted = get_peft_model(
        nn.Sequential(model),
        LoraConfig(r=2, target_modules=al.target_modules(nn.Sequential(model))),
    )
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(x)[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert al.fingerprint(adapted) == fingerprint


class Shared(nn.Module):
    """One layer that is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([self.first, nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.first(x)))


def test_a_shared_layer_is_replaced_everywhere() -> None:
    model = Shared()
    layer = AnalogLinear(4, 4, rpu_config=quiet(TorchInferenceRPUConfig()))
    model.first = model.blocks[0] = layer
    al.freeze_(model, programmed_by="test")
    assert isinstance(model.first, FrozenLinear)
    assert model.blocks[0] is model.first
    al.thaw_(model)
    assert type(model.blocks[0]) is AnalogLinear
    assert model.blocks[0] is model.first


def test_a_layer_that_stands_twice_in_a_container_is_replaced_twice() -> None:
    layer = AnalogLinear(4, 4, rpu_config=quiet(TorchInferenceRPUConfig()))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    al.freeze_(model, programmed_by="test")
    assert [type(part) for part in model] == [FrozenLinear, nn.ReLU, FrozenLinear]
    assert model[0] is model[2]


def test_padding_in_words_is_refused() -> None:
    layer = AnalogConv2d(2, 3, 3, padding="same", rpu_config=quiet(InferenceRPUConfig()))
    match = r"layer '0': expected padding in numbers, got a word"
    with pytest.raises(al.UnsupportedTileError, match=match):
        al.freeze_(nn.Sequential(layer), programmed_by="test")


def test_each_layer_keeps_its_mode() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = convert_to_analog(net, quiet(TorchInferenceRPUConfig())).train()
    model[1].eval()
    al.freeze_(model, programmed_by="test")
    assert [layer.training for layer in model] == [True, False]
    al.thaw_(model)
    assert [layer.training for layer in model] == [True, False]


def test_containers_stay_what_they_are() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), nn.Linear(72, 3))
    model = convert_to_analog(net, quiet(TorchInferenceRPUConfig()))
    al.freeze_(model, programmed_by="test")
    assert type(model) is type(model[0]) is AnalogSequential
    assert [name for name, _ in al.frozen_layers(model)] == ["0.0", "1"]
    assert len(list(model.analog_tiles())) == 1 + 6
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 3)


BIASES: list[Callable[[Any], None]] = [
    lambda config: setattr(config.mapping, "digital_bias", True),
    lambda config: setattr(config.mapping, "digital_bias", False),
]


@pytest.mark.parametrize("config", [InferenceRPUConfig, ReRamESPreset])
@pytest.mark.parametrize("convolve", [False, True], ids=["linear", "convolution"])
def test_a_bias_on_the_array_is_frozen_with_it(config: Any, convolve: bool) -> None:
    configured = quiet(config(), tile=0)
    configured.mapping.digital_bias = False
    torch.manual_seed(0)
    layer = (
        AnalogConv2d(2, 5, 3, rpu_config=configured)
        if convolve
        else AnalogLinear(18, 5, rpu_config=configured)
    ).eval()
    x = torch.randn(3, 2, 5, 5) if convolve else torch.randn(3, 18)
    expected, (_, bias) = layer(x).detach(), layer.get_weights()
    frozen = al.freeze_(layer, programmed_by="test")
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=2e-6)
    assert torch.equal(frozen.bias, bias)
    assert torch.equal(frozen.get_weights()[1], bias)
    (tile,) = frozen.analog_tiles()
    assert (tile.in_size, tile.analog_bias) == (18, True)
    torch.testing.assert_close(tile.get_weights()[1], bias)
    with pytest.raises(al.FrozenConductanceError, match=r"expected the frozen bias to be read"):
        frozen.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(al.FrozenConductanceError, match="write it"):
        frozen.bias.data.zero_()
    assert torch.equal(al.thaw_(frozen).get_weights()[1], bias) or config is ReRamESPreset


def test_a_bias_on_the_array_is_programmed_and_counted() -> None:
    configured = quiet(InferenceRPUConfig(), tile=0)
    configured.mapping.digital_bias = False
    model = convert_to_analog(nn.Sequential(nn.Linear(18, 5)), configured)
    wanted = model[0].get_weights()
    report = al.program_(model, CHIP, seed=0)
    assert report.counts["programmed_cells"] == 19 * 5
    al.freeze_(model)
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer"):
        model(torch.ones(4, 18))
    counts = ledger.total()
    assert counts["row_drives"] == counts["active_row_drives"] == 4 * 19
    assert counts["cell_reads"] == 4 * 19 * 5
    before = model[0].bias.clone()
    target = 0.5 * torch.as_tensor(model[0].weight)
    assert al.reprogram_(model, CHIP, {"0": target}, seed=1).pulses > 0
    # The bias was not to move; its cells cost a verification each, within tolerance.
    tolerance = 0.02 / 0.6 * float(model[0].analog_module.scale.max())
    assert float((model[0].bias - before).abs().max()) <= 2 * tolerance
    assert float((before - wanted[1]).abs().max()) <= tolerance


def test_convolutions_are_programmed_counted_and_consolidated() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 2))
    model = al.convert(net, CHIP)
    report = al.program_(model, CHIP, seed=0)
    assert report.counts["programmed_cells"] == 3 * 9 * 6 + 6 * 4 * 4
    al.freeze_(model)
    ledger, x = al.Ledger(), torch.randn(2, 3, 5, 5)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=al.target_modules(model)))
    nn.init.normal_(adapted.base_model.model[0].lora_B["default"].weight, std=0.1)
    with al.observe(adapted, ledger, phase="infer"):
        adapted(x)
    counts = ledger.by_layer("infer")
    # One read for each position of the kernel: 5 × 5 with padding, then 4 × 4.
    assert counts["0"]["tile_reads"] == 2 * 25
    assert counts["2"]["tile_reads"] == 2 * 16
    assert counts["0"]["cell_reads"] == 2 * 25 * 27 * 6
    wanted = adapted.base_model.model[0].get_delta_weight("default").detach() + torch.as_tensor(
        adapted.base_model.model[0].base_layer.weight
    )
    report = al.reprogram_(adapted, CHIP, seed=1)
    assert report.pulses > 0
    written = torch.as_tensor(adapted.base_model.model[0].base_layer.weight)
    scale = float(adapted.base_model.model[0].base_layer.analog_module.scale.max())
    assert float((written - wanted).abs().max()) <= 1.001 * scale * 0.02 / 0.6


def test_an_adapter_of_a_convolution_is_saved_and_loaded(tmp_path: Any) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = al.convert(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2)), CHIP)
        al.program_(model, CHIP, seed=0)
        return al.freeze_(model)

    model = build()
    config = LoraConfig(
        r=2, target_modules=al.target_modules(model), init_lora_weights=False, use_dora=True
    )
    adapted, x = get_peft_model(model, config).eval(), torch.randn(2, 3, 6, 6)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.equal(loaded(x), adapted(x))
    with pytest.raises(al.FrozenConductanceError, match=r"layer '0'.*reprogram_"):
        adapted.merge_adapter()


def test_a_layer_has_one_frozen_form() -> None:
    with pytest.raises(al.ConfigurationError, match=r"without a frozen form, got AnalogLinear"):
        freezes(AnalogLinear)(FrozenLinear)
    assert LAYERS[AnalogLinear] is FrozenLinear
