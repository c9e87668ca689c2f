"""Laws of frozen layers, for layers, tiles and converters of any size and setting."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import (
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
from aihwkit.simulator.presets import ReRamESPreset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import aihwkit_lora as al

CONFIGS: dict[str, Callable[[], Any]] = {
    "Inference": InferenceRPUConfig,
    "TorchInference": TorchInferenceRPUConfig,
    "ReRamES": ReRamESPreset,
    "FloatingPoint": FloatingPointRPUConfig,
}
# Sums of at most 40 products of 32-bit floats in another order differ by a few units in the last
# place of the largest one. The ADC is so fine (a step of 1e-9 of its range) that no such unit
# carries a sum over the edge between two codes.
ROUNDING = 1e-5

SIZES = st.integers(1, 40)


@dataclass(frozen=True)
class Linear:
    """Sizes of a linear layer."""

    inputs: int
    outputs: int

    def digital(self, bias: bool) -> nn.Module:
        return nn.Linear(self.inputs, self.outputs, bias=bias)

    def batch(self) -> Tensor:
        return torch.randn(5, self.inputs)


@dataclass(frozen=True)
class Convolution:
    """Sizes of a convolution in two dimensions and of its image."""

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    image: tuple[int, int]

    def digital(self, bias: bool) -> nn.Module:
        return nn.Conv2d(
            self.inputs, self.outputs, self.kernel, self.stride, self.padding, bias=bias
        )

    def batch(self) -> Tensor:
        return torch.randn(2, self.inputs, *self.image)


@dataclass(frozen=True)
class Specimen:
    """All that a layer and its tiles are made with."""

    tiles: str
    shape: Linear | Convolution
    tile: tuple[int, int]
    bias: str
    mapping: dict[str, Any]
    input_range: float | None
    forward: dict[str, Any]

    def config(self) -> Any:
        config = CONFIGS[self.tiles]()
        mapping = config.mapping
        mapping.max_input_size, mapping.max_output_size = self.tile
        mapping.digital_bias = self.bias != "on the array"
        for name, value in self.mapping.items():
            setattr(mapping, name, value)
        limits = config.pre_post.input_range
        limits.enable = self.input_range is not None
        limits.init_value, limits.init_from_data = self.input_range or 1.0, 0
        limits.learn_input_range = False
        if hasattr(config, "forward"):
            for name, value in (self.forward | QUIET).items():
                setattr(config.forward, name, value)
        return config

    def ordinary(self, seed: int = 0) -> Any:
        """A layer of aihwkit with weights of its own."""
        torch.manual_seed(seed)
        net = nn.Sequential(self.shape.digital(self.bias != "none"))
        return convert_to_analog(net, self.config(), ensure_analog_root=False).eval()

    def frozen(self, seed: int = 0, **options: Any) -> Any:
        return al.freeze_(self.ordinary(seed), programmed_by="checkpoint", **options)

    def batch(self, seed: int = 1) -> Tensor:
        """Inputs of all magnitudes, a vector of zeros among them."""
        torch.manual_seed(seed)
        x = self.shape.batch()
        x[0] = 0.0
        return x * torch.logspace(-2, 1, len(x)).view(-1, *[1] * (x.dim() - 1))


@st.composite
def linear_shapes(draw: st.DrawFn) -> Linear:
    return Linear(draw(SIZES), draw(SIZES))


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    pair = st.tuples
    kernel = draw(pair(st.integers(1, 3), st.integers(1, 3)))
    return Convolution(
        inputs=draw(st.integers(1, 3)),
        outputs=draw(st.integers(1, 12)),
        kernel=kernel,
        stride=draw(pair(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(pair(st.integers(0, 2), st.integers(0, 2))),
        image=draw(pair(st.integers(kernel[0], 6), st.integers(kernel[1], 6))),
    )


MAPPINGS = st.fixed_dictionaries(
    {
        "weight_scaling_omega": st.sampled_from([0.0, 0.6, 1.0]),
        "weight_scaling_columnwise": st.booleans(),
        "learn_out_scaling": st.booleans(),
        "out_scaling_columnwise": st.booleans(),
    }
)
# Noise is off, for laws that are exact.
QUIET = {"inp_noise": 0.0, "w_noise": 0.0, "out_noise": 0.0}
ADC = {
    "out_res": st.sampled_from([-1.0, 1e-9]),
    "out_bound": st.sampled_from([-1.0, 12.0, 2.0, 0.3]),
    "out_asymmetry": st.sampled_from([0.0, 0.1]),
    "out_scale": st.sampled_from([1.0, 3.0]),
    "bound_management": st.sampled_from([BoundManagementType.NONE, BoundManagementType.ITERATIVE]),
}
DAC = {
    "inp_res": st.sampled_from([-1.0, 1 / 254, 62.0, 0.1]),
    "inp_asymmetry": st.sampled_from([0.0, 0.1]),
}
# aihwkit's C++ tiles accept a DAC range other than 1 only where inputs are not scaled.
PLAIN_INPUTS = {
    "noise_management": st.just(NoiseManagementType.NONE),
    "inp_bound": st.sampled_from([1.0, 0.5, 2.0]),
}


def forwards(tiles: str) -> st.SearchStrategy[dict[str, Any]]:
    scales = [NoiseManagementType.ABS_MAX, NoiseManagementType.CONSTANT]
    if tiles != "TorchInference":
        scales.append(NoiseManagementType.MAX)
    scaled_inputs = {
        "noise_management": st.sampled_from(scales),
        "nm_thres": st.sampled_from([0.0, 0.7]),
    }
    return st.one_of(
        st.just({"is_perfect": True}),
        st.fixed_dictionaries(DAC | ADC | scaled_inputs),
        st.fixed_dictionaries(DAC | ADC | PLAIN_INPUTS),
    )


@st.composite
def specimens(
    draw: st.DrawFn,
    tiles: tuple[str, ...] = tuple(CONFIGS),
    biases: tuple[str, ...] = ("digital", "on the array", "none"),
) -> Specimen:
    kind = draw(st.sampled_from(tiles))
    if kind == "TorchInference":  # has no place for it
        biases = tuple(bias for bias in biases if bias != "on the array")
    bias = draw(st.sampled_from(biases))
    size = st.integers(2, 45)
    return Specimen(
        tiles=kind,
        shape=draw(st.one_of(linear_shapes(), convolutions())),
        tile=(64, 64) if bias == "on the array" else (draw(size), draw(size)),
        bias=bias,
        mapping=draw(MAPPINGS),
        input_range=draw(st.sampled_from([None, 0.5, 3.0])),
        forward=draw(forwards(kind)),
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = max(float(expected.abs().max()), 1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * scale)


@settings(max_examples=200)
@given(specimens())
def test_a_frozen_layer_gives_what_the_ordinary_one_gave(specimen: Specimen) -> None:
    model, x = specimen.ordinary(), specimen.batch()
    expected = model(x).detach()
    assert_close(al.freeze_(model, programmed_by="test")(x), expected)


@given(specimens())
def test_the_weight_is_the_one_that_aihwkit_reports(specimen: Specimen) -> None:
    model = specimen.ordinary()
    weight, bias = model[0].get_weights()
    layer = al.freeze_(model, programmed_by="test")[0]
    assert torch.equal(layer.weight.flatten(1), weight.flatten(1))
    assert (layer.bias is None) == (bias is None)
    if bias is not None:
        assert torch.equal(layer.bias, bias)


@given(specimens())
def test_gradients_pass_as_through_the_weight(specimen: Specimen) -> None:
    layer = specimen.frozen()[0]
    x = specimen.batch().requires_grad_()
    outputs = layer(x)
    upstream = torch.randn_like(outputs)
    (found,) = torch.autograd.grad(outputs, x, upstream)
    digital = specimen.shape.digital(bias=False)
    digital.weight.data.copy_(layer.weight.clone())
    (expected,) = torch.autograd.grad(digital(x), x, upstream)
    assert_close(found, expected)


@given(specimens(), st.sampled_from(["auto", "reference"]))
def test_a_state_makes_an_equally_built_model_equal(specimen: Specimen, engine: str) -> None:
    model, other = specimen.frozen(engine=engine), specimen.frozen(seed=2, engine=engine)
    x = specimen.batch()
    other.load_state_dict(model.state_dict())
    assert al.fingerprint(other) == al.fingerprint(model)
    assert torch.equal(other(x), model(x))
    al.verify(other)


@given(specimens(), st.sampled_from(["auto", "reference"]))
def test_copies_are_equal(specimen: Specimen, engine: str) -> None:
    model, x = specimen.frozen(engine=engine), specimen.batch()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert al.fingerprint(twin) == al.fingerprint(model)
        assert torch.equal(twin(x), expected)


@given(specimens(tiles=("Inference", "TorchInference", "FloatingPoint")))
def test_thawed_and_frozen_again_it_is_the_same(specimen: Specimen) -> None:
    model = specimen.frozen()
    fingerprint = al.fingerprint(model)
    again = al.freeze_(al.thaw_(model), programmed_by="test")
    assert al.fingerprint(again) == fingerprint


@given(specimens())
def test_both_engines_read_the_same(specimen: Specimen) -> None:
    ordinary, x = specimen.ordinary(), specimen.batch()
    fused = al.freeze_(copy.deepcopy(ordinary), programmed_by="test", engine="fused")
    reference = al.freeze_(ordinary, programmed_by="test", engine="reference")
    assert al.fingerprint(reference) == al.fingerprint(fused)
    assert_close(fused(x), reference(x).detach())
