"""The reference engine: aihwkit's own tiles behind a frozen layer, equal to the last bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    QuantizedTorchInferenceRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.configs.configs import TorchInferenceRPUConfigIRDropT
from aihwkit.simulator.parameters.enums import AnalogMVType, NoiseManagementType, WeightNoiseType
from aihwkit.simulator.parameters.quantization import ActivationQuantConfig
from aihwkit.simulator.presets import (
    ReRamESPreset,
    StandardHWATrainingPreset,
    TikiTakaReRamESPreset,
)
from aihwkit.simulator.tiles.custom import CustomRPUConfig, CustomSimulatorTile
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.tiles.engines import TILES, TileKind, add_tile
from aihwkit_lora.tiles.reference import ReferenceEngine

CHIP = al.chips.get("rm-180nm")
ONLY_REFERENCE: dict[str, dict[str, Any]] = {
    "separate passes": {"mv_type": AnalogMVType.POS_NEG_SEPARATE, "inp_asymmetry": 0.2},
    "separate passes, digital sum": {"mv_type": AnalogMVType.POS_NEG_SEPARATE_DIGITAL_SUM},
    "IR drop": {"ir_drop": 1.0},
    "S-shaped output": {"out_nonlinearity": 0.3, "out_nonlinearity_std": 0.2},
    "calibrated slope": {"out_nonlinearity": 0.3, "slope_calibration": 0.5},
    "voltage offsets": {"v_offset_std": 0.1},
    "series resistance": {"r_series": 0.01},
    "reads that depend on polarity": {"w_read_asymmetry_dtod": 0.2},
    "upper bound only": {"bm_test_negative_bound": False, "out_bound": 0.5},
    "scaled by sums": {"noise_management": NoiseManagementType.ABS_MAX_NP_SUM},
}


def quiet(config: Any, tile: int = 16, **forward: Any) -> Any:
    config.mapping.max_input_size = config.mapping.max_output_size = tile
    config.mapping.weight_scaling_omega = 1.0
    if hasattr(config, "forward"):
        for name, value in {"out_noise": 0.0, "w_noise": 0.0, **forward}.items():
            setattr(config.forward, name, value)
    return config


def converted(config: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    return convert_to_analog(net, config, ensure_analog_root=False).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [InferenceRPUConfig, ReRamESPreset])
@pytest.mark.parametrize("name", ONLY_REFERENCE)
def test_what_fused_lacks_is_read_with_aihwkits_tiles(config: Any, name: str, x: Tensor) -> None:
    model = converted(quiet(config(), **ONLY_REFERENCE[name]))
    expected = model(x).detach()
    frozen = al.freeze_(model, programmed_by="test")
    assert [choice.engine for choice in al.engines(frozen)] == ["reference"] * 2
    field = next(iter(ONLY_REFERENCE[name]))
    assert any(part in al.engines(frozen)[0].reason for part in (f"forward.{field}", "slope"))
    assert torch.equal(frozen(x), expected)
    if config is InferenceRPUConfig:  # pulsed cells draw their write noise anew
        assert torch.equal(al.thaw_(frozen).eval()(x), expected)


@pytest.mark.parametrize(
    "config",
    [
        *(InferenceRPUConfig, TorchInferenceRPUConfig, ReRamESPreset, TikiTakaReRamESPreset),
        *(FloatingPointRPUConfig, CustomRPUConfig),
    ],
)
def test_asked_for_it_reads_every_kind_of_tile(config: Any, x: Tensor) -> None:
    model = converted(quiet(config()))
    expected = model(x).detach()
    frozen = al.freeze_(model, programmed_by="test", engine="reference")
    assert torch.equal(frozen(x), expected)
    assert al.engines(frozen)[0].reason == "was asked to read with aihwkit's own tiles"


def test_time_dependent_ir_drop_is_read_by_its_own_tile(x: Tensor) -> None:
    model = converted(quiet(TorchInferenceRPUConfigIRDropT()))
    expected = model(x).detach()
    frozen = al.freeze_(model, programmed_by="test")
    assert torch.equal(frozen(x), expected)
    reason = al.engines(frozen)[0].reason
    assert "simulator_tile_class = TorchSimulatorTile, got TorchSimulatorTileIRDropT" in reason
    switched_off = converted(quiet(TorchInferenceRPUConfigIRDropT(), ir_drop=0.0))
    al.freeze_(switched_off, programmed_by="test")
    assert al.engines(switched_off)[0].engine == "reference"  # its ADC rounds in its own way


def test_hardware_aware_training_is_read_with_its_weight_noise(x: Tensor) -> None:
    config = quiet(StandardHWATrainingPreset(), ir_drop=0.0)
    assert config.forward.w_noise_type == WeightNoiseType.PCM_READ
    assert al.engines(al.freeze_(converted(config), programmed_by="x"))[0].engine == "fused"
    config.forward.w_noise = 0.02
    frozen = al.freeze_(converted(config), programmed_by="test")
    assert "w_noise_type" in al.engines(frozen)[0].reason
    assert not torch.equal(frozen(x), frozen(x))


def quantised(tile: int, bias: bool = True) -> nn.Module:
    config = quiet(QuantizedTorchInferenceRPUConfig(), tile)
    config.pre_post.periph_quant.n_bits = 8
    config.act_quant_config = ActivationQuantConfig(n_bits=8)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24, bias=bias))
    return convert_to_analog(net, config, ensure_analog_root=False)


@pytest.mark.parametrize("tile", [0, 16], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_quantised_periphery_keeps_its_calibrated_ranges(tile: int, bias: bool, x: Tensor) -> None:
    model = quantised(tile, bias).train()
    for _ in range(3):
        model(x)
    expected = model.eval()(x).detach()
    frozen = al.freeze_(model, programmed_by="test")
    assert torch.equal(frozen(x), expected)
    frozen.train()(10 * x)  # in aihwkit, this would widen the ranges
    assert torch.equal(frozen(x), expected)
    assert torch.equal(al.thaw_(frozen).eval()(x), expected)


def test_a_periphery_that_was_never_calibrated_is_refused(x: Tensor) -> None:
    match = r"layer '0': expected a calibrated out_quantizer.*in train mode before freeze_"
    with pytest.raises(al.StageError, match=match):
        al.freeze_(quantised(0), programmed_by="test")


def test_a_running_average_that_reads_move_is_refused() -> None:
    config = quiet(InferenceRPUConfig(), noise_management=NoiseManagementType.AVERAGE_ABS_MAX)
    match = r"layer '0': expected a read to leave the tile as it is.*ABS_MAX before converting"
    with pytest.raises(al.UnsupportedTileError, match=match):
        al.freeze_(converted(config), programmed_by="test")


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_copies_build_tiles_of_their_own(twin_of: Any, used: bool, x: Tensor) -> None:
    frozen = al.freeze_(converted(quiet(InferenceRPUConfig(), ir_drop=1.0)), programmed_by="test")
    expected = copy.deepcopy(frozen)(x)
    if used:
        frozen(x)
    twin = twin_of(frozen)
    assert torch.equal(twin(x), expected)
    assert torch.equal(frozen(x), expected)


def test_its_tiles_belong_to_nobody(x: Tensor) -> None:
    frozen = al.freeze_(converted(quiet(InferenceRPUConfig(), ir_drop=1.0)), programmed_by="test")
    before = {"modules": list(frozen.modules()), "state": list(frozen.state_dict())}
    frozen(x.requires_grad_()).sum().backward()
    assert {"modules": list(frozen.modules()), "state": list(frozen.state_dict())} == before
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert isinstance(frozen[0].analog_module.engine, ReferenceEngine)


def test_gradients_are_exact_on_inference_tiles(x: Tensor) -> None:
    frozen = al.freeze_(converted(quiet(InferenceRPUConfig(), ir_drop=1.0)), programmed_by="test")
    inputs, upstream = x.clone().requires_grad_(), torch.randn(6, 24)
    frozen[0](inputs).backward(upstream)
    exact = upstream @ torch.as_tensor(frozen[0].weight)
    torch.testing.assert_close(inputs.grad, exact, rtol=0, atol=1e-5)


def test_gradients_follow_the_backward_settings_of_training_tiles(x: Tensor) -> None:
    """Without noise, aihwkit's backward pass with converters of its own: a coarse product."""
    upstream, found = torch.randn(6, 24), {}
    for engine in ("fused", "reference"):
        config = quiet(ReRamESPreset())
        config.backward.out_noise, config.backward.inp_res = 0.0, 1 / 6
        frozen = al.freeze_(converted(config), programmed_by="test", engine=engine)
        inputs = x.clone().requires_grad_()
        frozen[0](inputs).backward(upstream)
        exact = upstream @ torch.as_tensor(frozen[0].weight)
        found[engine] = float((inputs.grad - exact).abs().max() / exact.abs().max())
    assert found["fused"] < 1e-5
    assert 1e-3 < found["reference"] < 0.5


def test_adapters_train_and_reads_are_counted(x: Tensor) -> None:
    model = converted(quiet(InferenceRPUConfig(), ir_drop=1.0))
    al.program_(model, CHIP, seed=0)
    al.freeze_(model)
    fingerprint, ledger = al.fingerprint(model), al.Ledger()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=al.target_modules(model)))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.02)
    losses = []
    with al.observe(adapted, ledger, phase="unlearn"):
        for _ in range(10):
            optimizer.zero_grad()
            loss = adapted(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert al.fingerprint(adapted) == fingerprint
    counts = ledger.by_layer("unlearn")
    assert counts["0"]["tile_reads"] == 10 * 6 * 4
    assert counts["0"]["row_drives"] == 10 * 6 * 32 * 2
    assert counts["2"]["transposed_tile_reads"] == 10 * 6 * 2


def test_frozen_arrays_are_rewritten_under_it(x: Tensor) -> None:
    model = converted(quiet(InferenceRPUConfig(), ir_drop=1.0))
    al.program_(model, CHIP, seed=0)
    before = al.freeze_(model)(x)
    al.reprogram_(model, CHIP, {"0": -torch.as_tensor(model[0].weight)}, seed=1)
    assert not torch.allclose(model(x), before, atol=0.1)


class OwnSimulatorTile(CustomSimulatorTile):
    """A tile of a user's own that doubles what it reads."""

    def forward(self, *args: Any, **named: Any) -> Tensor:
        return 2.0 * super().forward(*args, **named)


def test_a_simulator_of_ones_own_is_read_as_it_is(x: Tensor) -> None:
    config = quiet(CustomRPUConfig())
    config.simulator_tile_class = OwnSimulatorTile
    model = converted(config)
    expected = model(x).detach()
    frozen = al.freeze_(model, programmed_by="test")
    assert "got OwnSimulatorTile" in al.engines(frozen)[0].reason
    assert torch.equal(frozen(x), expected)


def test_a_class_of_tiles_is_added_once() -> None:
    known = next(iter(TILES))
    with pytest.raises(al.ConfigurationError, match=rf"without a kind, got {known.__name__}"):
        add_tile(known, TileKind(whole_batch=True))
