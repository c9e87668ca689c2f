"""The blocked product against aihwkit's own tiles, with noise off: the same to the last bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import (
    InferenceRPUConfig,
    SingleRPUConfig,
    TorchInferenceRPUConfig,
)
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
from torch import nn

import aihwkit_lora as al

# Sums of at most 130 products in another order: a few units in the last place of float32.
ROUNDING = 2e-6

NOISE = (NoiseManagementType.NONE, NoiseManagementType.ABS_MAX, NoiseManagementType.CONSTANT)
BOUND = (BoundManagementType.NONE, BoundManagementType.ITERATIVE)


def quiet(config_class, tile=128, *, noise, bound, inp_res=1 / 254, out_bound=4.0, nm_thres=0.0):
    config = config_class()
    config.mapping.max_input_size = config.mapping.max_output_size = tile
    config.mapping.weight_scaling_omega = 0.6
    forward = config.forward
    forward.out_noise = forward.w_noise = forward.inp_noise = 0.0
    forward.inp_res = inp_res
    forward.out_res = 1e-9  # so fine that no value sits on the edge between two codes
    forward.out_bound, forward.nm_thres = out_bound, nm_thres
    forward.noise_management, forward.bound_management = noise, bound
    return config


def both_outputs(config, shape=(130, 70), bias=True):
    torch.manual_seed(0)
    analog = convert_to_analog(
        nn.Sequential(nn.Linear(*shape, bias=bias)), config, ensure_analog_root=False
    ).eval()
    x = torch.randn(16, shape[0]) * torch.linspace(0.01, 3.0, 16)[:, None]
    x[3] = 0.0
    expected = analog(x).detach()
    return expected, al.freeze_(analog, programmed_by="test")(x)


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
@pytest.mark.parametrize("tile", [32, 50, 128])
@pytest.mark.parametrize(("noise", "bound"), list(itertools.product(NOISE, BOUND)))
def test_noise_free_product_equals_aihwkit(config_class, tile, noise, bound):
    expected, found = both_outputs(quiet(config_class, tile, noise=noise, bound=bound))
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * 10)


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
@pytest.mark.parametrize("noise", NOISE)
def test_input_scale_ceiling_equals_aihwkit(config_class, noise):
    config = quiet(config_class, noise=noise, bound=BoundManagementType.NONE, nm_thres=0.7)
    expected, found = both_outputs(config)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * 10)


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_coarse_adc_equals_aihwkit_except_on_code_edges(config_class):
    config = quiet(config_class, noise=NOISE[1], bound=BOUND[0])
    config.forward.out_res = 1 / 254
    expected, found = both_outputs(config)
    # Another order of summation can tip a sum that lies on the edge between two codes.
    differing = ((found - expected).abs() > 1e-5).float().mean()
    assert differing <= 0.001


@pytest.mark.parametrize(
    "config_class", [InferenceRPUConfig, TorchInferenceRPUConfig, SingleRPUConfig]
)
def test_perfect_forward_is_the_logical_matrix(config_class):
    config = config_class()
    config.mapping.max_input_size = config.mapping.max_output_size = 40
    config.forward.is_perfect = True
    expected, found = both_outputs(config)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_input_gradient_is_exact_on_split_tiles():
    config = quiet(TorchInferenceRPUConfig, 32, noise=NOISE[1], bound=BOUND[1])
    layer = al.freeze_(convert_to_analog(nn.Linear(130, 70), config), programmed_by="test")
    x = torch.randn(4, 130, requires_grad=True)
    upstream = torch.randn(4, 70)
    (gradient,) = torch.autograd.grad(layer(x), x, upstream)
    torch.testing.assert_close(
        gradient, upstream @ torch.as_tensor(layer.weight), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("config_class", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_output_noise_has_aihwkits_spread(config_class):
    # 20,000 samples: the sample deviation is within 3 % at an error rate far below 1e-6.
    config = quiet(config_class, noise=NOISE[0], bound=BOUND[0])
    config.forward.out_noise = 0.06
    config.mapping.weight_scaling_omega = 0.0
    torch.manual_seed(1)
    analog = convert_to_analog(nn.Linear(8, 20, bias=False), config).eval()
    x = torch.full((1000, 8), 0.1)
    expected = analog(x).detach().std(dim=0).mean()
    found = al.freeze_(analog, programmed_by="test")(x).std(dim=0).mean()
    assert float(found) == pytest.approx(0.06, rel=0.03)
    assert float(found) == pytest.approx(float(expected), rel=0.05)
