"""Reads with noise: the same distribution as aihwkit's own tiles, and the same for the same seed.

Each test reads one input 4,000 times with aihwkit's tiles and with frozen ones. A difference of
means or variances beyond 5 standard errors is an error rate of 6e-7 a comparison, and the
two-sample Kolmogorov–Smirnov test is on p > 1e-6. With about 1,400 comparisons, a correct
implementation fails somewhere in one of a thousand runs; seeds are fixed, so it does not fail at
random.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import (
    BoundManagementType,
    NoiseManagementType,
    WeightNoiseType,
)
from aihwkit.simulator.presets import ReRamESPreset
from scipy.stats import ks_2samp
from torch import Tensor, nn

import aihwkit_lora as al

READS = 4000
STANDARD_ERRORS = 5.0
CONFIGS = [InferenceRPUConfig, TorchInferenceRPUConfig, ReRamESPreset]
ADDITIVE = {"w_noise_type": WeightNoiseType.ADDITIVE_CONSTANT, "w_noise": 0.03}
SETTINGS: dict[str, dict[str, Any]] = {
    "output noise": {"out_noise": 0.06},
    "output noise and coarse ADC": {"out_noise": 0.06, "out_res": 1 / 30, "out_bound": 2.0},
    "input noise": {"inp_noise": 0.05},
    "both": {"inp_noise": 0.05, "out_noise": 0.06},
    "input noise and asymmetries": {
        **{"inp_noise": 0.05, "out_noise": 0.06},
        **{"inp_asymmetry": 0.2, "out_asymmetry": 0.1},
    },
    "noise and bound management": {
        **{"out_noise": 0.06, "out_bound": 0.7, "out_res": 1 / 126},
        "bound_management": BoundManagementType.ITERATIVE,
    },
    "noise that alone overflows": {
        **{"out_noise": 0.3, "out_bound": 0.5, "out_res": 1 / 126},
        "bound_management": BoundManagementType.ITERATIVE,
    },
    "clipped": {"out_noise": 0.2, "out_bound": 0.5},
    "no scaling": {"out_noise": 0.06, "noise_management": NoiseManagementType.NONE},
    "random rounding, DAC": {"inp_sto_round": True, "inp_res": 1 / 6},
    "random rounding, ADC": {"out_sto_round": True, "out_res": 1 / 30, "out_bound": 2.0},
    "weight noise": ADDITIVE,
    "weight and output noise": ADDITIVE | {"out_noise": 0.06},
    "another noise for each column": {"out_noise": 0.06, "out_noise_std": 0.4},
}
# Not in aihwkit's torch tiles, which refuse them.
CPP_ONLY = {"weight noise", "weight and output noise"}


def noisy(config: Any, settings: dict[str, Any], tile: int = 12) -> nn.Module:
    config.mapping.max_input_size = config.mapping.max_output_size = tile
    config.mapping.weight_scaling_omega = 1.0
    forward = config.forward
    forward.out_noise, forward.out_res, forward.bound_management = (
        0.0,
        1e-9,
        BoundManagementType.NONE,
    )
    for name, value in settings.items():
        setattr(forward, name, value)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 15, bias=False))
    return convert_to_analog(net, config, ensure_analog_root=False).eval()


def reads(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs of every read, shape ``(reads, out_features)``."""
    with torch.no_grad():
        return torch.cat([model(x.expand(250, -1)) for _ in range(READS // 250)])


def assert_same_distribution(ours: Tensor, theirs: Tensor) -> None:
    error = STANDARD_ERRORS * ((ours.var(0) + theirs.var(0)) / READS).sqrt() + 1e-6
    assert bool(((ours.mean(0) - theirs.mean(0)).abs() <= error).all())
    # The variance of a variance, from the samples' own fourth moments.
    fourth = sum(((s - s.mean(0)) ** 4).mean(0) - s.var(0) ** 2 for s in (ours, theirs))
    error = STANDARD_ERRORS * (fourth.clamp(min=0) / READS).sqrt() + 1e-9
    assert bool(((ours.var(0) - theirs.var(0)).abs() <= error).all())
    for column in range(ours.shape[1]):
        # Rounded: float sums in another order differ in their last bit, and ranks would show it.
        samples = [(s[:, column].double() * 1e5).round().numpy() for s in (ours, theirs)]
        assert ks_2samp(*samples, method="asymp").pvalue > 1e-6


def cases() -> list[Any]:
    return [
        pytest.param(config, name, id=f"{config.__name__}-{name}")
        for config in CONFIGS
        for name in SETTINGS
        if config is not TorchInferenceRPUConfig or name not in CPP_ONLY
    ]


@pytest.mark.parametrize(("config", "name"), cases())
def test_frozen_tiles_read_with_the_noise_of_aihwkits(config: Any, name: str) -> None:
    model = noisy(config(), SETTINGS[name])
    x = torch.linspace(-0.8, 1.0, 20)
    theirs = reads(model, x)
    frozen = al.freeze_(model, programmed_by="test")
    assert al.engines(frozen)[0].engine == "fused"
    ours = reads(frozen, x)
    assert float(ours.std(0).max()) > 1e-3
    assert_same_distribution(ours, theirs)


@pytest.mark.parametrize("config", CONFIGS)
def test_both_engines_read_with_the_same_noise(config: Any) -> None:
    frozen = al.freeze_(noisy(config(), SETTINGS["both"]), programmed_by="test")
    fused, x = frozen[0].analog_module, torch.linspace(-0.8, 1.0, 20)
    ours = reads(frozen, x)
    reference = al.freeze_(al.thaw_(frozen), programmed_by="test", engine="reference")
    # The same conductances: thawing draws the write noise of pulsed cells anew.
    reference[0].analog_module.show_at(0.0, fused.programmed)
    assert al.engines(reference)[0].engine == "reference"
    assert_same_distribution(ours, reads(reference, x))


def test_tiles_do_not_share_noise() -> None:
    """Independent noise of n tiles along the input adds up to √n of one tile's."""
    deviations = []
    for tile, tiles in ((20, 1), (10, 2), (5, 4)):
        settings = {"out_noise": 0.06, "noise_management": NoiseManagementType.NONE}
        model = noisy(TorchInferenceRPUConfig(), settings, tile)
        frozen = al.freeze_(model, programmed_by="test")
        scale = frozen[0].analog_module.scale.square().sum(0).sqrt()[0, 0]
        deviations.append(float(reads(frozen, torch.zeros(20) + 0.1)[:, 0].std() / scale))
        assert frozen[0].analog_module.blocks.in_tiles == tiles
    # 4,000 samples: a deviation is within 5 % at an error rate below 1e-5.
    assert deviations == [pytest.approx(0.06, rel=0.05)] * 3


@pytest.mark.parametrize("config", CONFIGS)
def test_same_seed_same_outputs(config: Any) -> None:
    frozen = al.freeze_(noisy(config(), SETTINGS["both"]), programmed_by="test")
    x = torch.randn(5, 20)
    twins = [frozen, frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))]
    outputs = []
    for twin in twins:
        torch.manual_seed(7)
        outputs.append(twin(x))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert not torch.equal(frozen(x), outputs[0])


def test_vectors_of_zeros_are_read_as_aihwkit_does() -> None:
    for config, quiet in ((InferenceRPUConfig, [1, 4]), (TorchInferenceRPUConfig, [])):
        model = noisy(config(), {"out_noise": 0.06})
        x = torch.randn(6, 20)
        x[[1, 4]] = 0.0
        theirs = model(x)
        ours = al.freeze_(model, programmed_by="test")(x)
        for found in (ours, theirs):
            assert (found == 0).all(dim=1).nonzero().flatten().tolist() == quiet
        # A batch of zeros is not read by either.
        assert not model(torch.zeros(3, 20)).any()
