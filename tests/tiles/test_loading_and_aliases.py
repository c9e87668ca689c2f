"""What a checkpoint may do to a frozen array, and what its handles give away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import NoiseManagementType
from torch import Tensor, nn

import aihwkit_lora as al


def model(programmed_by: str, seed: int = 0, *, bias_on_array: bool = False) -> nn.Module:
    config = InferenceRPUConfig()
    config.mapping.max_input_size = config.mapping.max_output_size = 0 if bias_on_array else 3
    config.mapping.digital_bias = not bias_on_array
    torch.manual_seed(seed)
    converted = convert_to_analog(nn.Sequential(nn.Linear(5, 4)), config, ensure_analog_root=False)
    return al.freeze_(converted, programmed_by=programmed_by)


def test_an_array_that_waits_for_a_checkpoint_takes_it_over() -> None:
    waiting, other = model("checkpoint"), model("chip 7", seed=1)
    waiting.load_state_dict(other.state_dict())
    assert al.fingerprint(waiting) == al.fingerprint(other)
    al.verify(waiting)


def test_any_other_array_refuses_conductances_that_are_not_its_own() -> None:
    frozen = model("chip 7")
    before = al.fingerprint(frozen)
    with pytest.raises(al.FrozenConductanceError, match=r"0\.analog_module\.conductance.*others"):
        frozen.load_state_dict(model("chip 7", seed=1).state_dict())
    assert al.fingerprint(frozen) == before
    frozen.load_state_dict(model("chip 7").state_dict())


@pytest.mark.parametrize("part", ["conductance", "scale", "digest"])
def test_a_checkpoint_that_was_changed_is_refused(part: str) -> None:
    waiting, state = model("checkpoint"), model("chip 7", seed=1).state_dict()
    before = al.fingerprint(waiting)
    state[f"0.analog_module.{part}"].view(-1)[0] += 1
    with pytest.raises(al.FrozenConductanceError, match=r"whose digests the checkpoint holds"):
        waiting.load_state_dict(state)
    assert al.fingerprint(waiting) == before


def test_a_layer_with_its_bias_on_the_array_loads_its_own_state() -> None:
    waiting = model("checkpoint", bias_on_array=True)
    other = model("chip 7", seed=1, bias_on_array=True)
    waiting.load_state_dict(other.state_dict())
    assert torch.equal(waiting[0].bias, other[0].bias)


@pytest.mark.parametrize(
    "write",
    [
        lambda array: array.conductance.untyped_storage().fill_(0),
        lambda array: array.scale.untyped_storage().fill_(0),
        lambda array: torch.autograd.Variable(array.conductance).zero_(),
        lambda array: [part.zero_() for part in array.tile(0, 0)],
        lambda array: array.get_weights()[0].zero_(),
    ],
)
def test_what_an_array_hands_out_leads_to_no_conductance(
    write: Callable[[nn.Module], object],
) -> None:
    frozen = model("chip 7")
    before = al.fingerprint(frozen)
    with contextlib.suppress(al.FrozenConductanceError):
        write(frozen[0].analog_module)
    assert al.fingerprint(frozen) == before


@pytest.mark.parametrize("method", ["set_weights", "program_weights", "reset", "update"])
def test_the_module_of_a_layer_refuses_as_its_tiles_do(method: str) -> None:
    array = model("chip 7")[0].analog_module
    with pytest.raises(al.FrozenConductanceError, match=rf"layer '0'.*got {method}\(\)"):
        getattr(array, method)(torch.zeros(4, 5))
    assert torch.equal(array.get_weights()[0], array.logical_weight())


@pytest.mark.parametrize("config", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_padding_has_no_part_in_the_largest_value(
    config: type[InferenceRPUConfig],
) -> None:
    """Tiles of 2 and 1 inputs, and nothing above zero: MAX finds the largest of real inputs."""
    configured = config()
    configured.mapping.max_input_size = configured.mapping.max_output_size = 2
    configured.forward.noise_management = NoiseManagementType.MAX
    configured.forward.out_noise, configured.forward.out_res = 0.0, 1e-9
    net = nn.Sequential(nn.Linear(3, 1, bias=False))
    net[0].weight.data.fill_(0.5)
    ordinary = convert_to_analog(net, configured, ensure_analog_root=False).eval()
    x: Tensor = -torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    expected = ordinary(x).detach()
    torch.testing.assert_close(al.freeze_(ordinary, programmed_by="test")(x), expected)


@pytest.mark.parametrize("config", [InferenceRPUConfig, TorchInferenceRPUConfig])
def test_a_fixed_factor_of_an_ideal_product_is_that_of_aihwkit(
    config: type[InferenceRPUConfig],
) -> None:
    configured = config()
    configured.forward.is_perfect, configured.forward.out_scale = True, 3.0
    ordinary = convert_to_analog(
        nn.Sequential(nn.Linear(3, 2)), configured, ensure_analog_root=False
    ).eval()
    x = torch.randn(4, 3)
    expected = ordinary(x).detach()
    torch.testing.assert_close(al.freeze_(ordinary, programmed_by="test")(x), expected)


def test_a_bare_frozen_layer_loads_with_assign() -> None:
    waiting, other = model("checkpoint")[0], model("chip 7", seed=1)[0]
    waiting.load_state_dict(other.state_dict(), assign=True)
    assert al.fingerprint(waiting) == al.fingerprint(other)
