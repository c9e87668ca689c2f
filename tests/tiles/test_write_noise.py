"""Write noise: many simulated programmings of one model, computed and never written back."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import BoundManagementType, NoiseManagementType
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.tiles import write_noise
from aihwkit_lora.tiles.write_noise import evaluate_noisy, noisy_chips, noisy_outputs
from aihwkit_lora.unlearning.seal import seal_

CHIP = al.chips.get("rm-180nm")
SINGLE = CHIP.mapping
PAIR = ConductanceMapping(g_min_siemens=0.0, g_max_siemens=40e-6, pairs=1)
MICRO = 1e-6
# Every statistical test below is seeded; on new seeds each would fail once in 100,000 runs.
ALPHA = 1e-5


def frozen(net: nn.Module, chip: Any = CHIP) -> nn.Module:
    return al.freeze_(al.convert(net, chip), programmed_by="test")


def programmed(net: nn.Module, chip: Any = CHIP) -> nn.Module:
    model = al.convert(net, chip)
    al.program_(model, chip, seed=0)
    return al.freeze_(model)


def normalised(model: nn.Module) -> Tensor:
    """Normalised weights of a bare linear layer in a Sequential, as reads see them."""
    array = model[0].analog_module
    columns = [
        torch.cat([array.tensors.tile(array.blocks, (i, o)).conductance[0].T
                   for i in range(array.blocks.in_tiles)], dim=1)
        for o in range(array.blocks.out_tiles)
    ]  # fmt: skip
    return torch.cat(columns).double()


def errors(model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """Normalised weights, and what write noise adds to them."""
    before = normalised(model)
    with noisy_chips(model, **options):
        return before, normalised(model) - before


@pytest.fixture
def wide() -> nn.Module:
    """One layer of 300 × 260 weights on 3 × 3 tiles, spread over the whole window."""
    torch.manual_seed(0)
    net = nn.Linear(300, 260, bias=False)
    nn.init.uniform_(net.weight, -0.5, 0.5)
    return frozen(nn.Sequential(net))


def test_errors_far_from_the_ends_are_normal_with_the_stated_deviation(wide: nn.Module) -> None:
    weight, error = errors(wide, sigma_siemens=1 * MICRO, seed=1, mapping=SINGLE)
    inside = error[weight.abs() < 0.75]  # 7.5 deviations from the ends
    assert len(inside) > 50_000
    # 30 µS are one unit of normalised weight.
    assert stats.kstest((30.0 * inside).numpy(), "norm").pvalue > ALPHA


def test_errors_in_logical_weights_are_the_deviation_over_siemens_per_weight(
    wide: nn.Module,
) -> None:
    array = wide[0].analog_module
    scale = array.largest_weight()  # a logical weight that 30 µS stand for
    before = array.logical_weight().clone()
    weight, error = errors(wide, sigma_siemens=1 * MICRO, seed=2, mapping=SINGLE)
    logical, siemens_per_weight = error * scale, SINGLE.half_width_siemens / scale
    inside = weight.abs() < 0.75
    expected = (1 * MICRO / siemens_per_weight)[inside]
    assert stats.kstest((logical[inside] / expected).numpy(), "norm").pvalue > ALPHA
    assert torch.equal(array.logical_weight(), before)


def test_the_window_cuts_errors_off(wide: nn.Module) -> None:
    sigma = 20.0 / 30.0
    weight, error = errors(wide, sigma_siemens=20 * MICRO, seed=3, mapping=SINGLE)
    seen, start = (weight + error).flatten().numpy(), weight.flatten().numpy()
    assert seen.min() >= -1.0 - 1e-6
    assert seen.max() <= 1.0 + 1e-6
    low, high = stats.norm.cdf((-1 - start) / sigma), stats.norm.cdf((1 - start) / sigma)
    at_ends = (seen < -1 + 1e-6) | (seen > 1 - 1e-6)
    share = low + 1.0 - high
    deviation = (share * (1.0 - share)).sum() ** 0.5
    z = (at_ends.sum() - share.sum()) / deviation
    assert abs(z) < stats.norm.isf(ALPHA / 2)
    # In between, a normal distribution that is cut off at both ends.
    inside = stats.norm.cdf((seen - start) / sigma)
    uniform = ((inside - low) / (high - low))[~at_ends]
    assert stats.kstest(uniform, "uniform").pvalue > ALPHA


@pytest.mark.parametrize("weight", [0.0, 0.4, -1.0])
def test_both_cells_of_a_pair_err_each_within_its_window(weight: float) -> None:
    net = nn.Linear(300, 200, bias=False)
    nn.init.constant_(net.weight, weight)
    net.weight.data[0, 0] = 1.0  # which fills the window
    model = frozen(nn.Sequential(net), replaced_size(1000))
    _, error = errors(model, sigma_siemens=5 * MICRO, seed=4, mapping=PAIR)
    generator = torch.Generator().manual_seed(5)
    plus, minus = max(weight, 0.0) * 40e-6, max(-weight, 0.0) * 40e-6
    drawn = torch.randn(2, 60_000, generator=generator).double() * 5e-6
    cells = (torch.tensor([[plus], [minus]]) + drawn).clamp(0.0, 40e-6)
    oracle = (cells[0] - cells[1]) / 40e-6 - weight
    assert stats.ks_2samp(error.flatten()[1:].numpy(), oracle.numpy()).pvalue > ALPHA


def replaced_size(size: int) -> Any:
    """The chip with arrays so large that a layer is one tile."""
    return replace(CHIP, rows=size, columns=size)


@pytest.mark.parametrize("name", al.chips.names())
def test_noise_without_measure_drives_every_programmed_cell_to_an_end(name: str) -> None:
    chip = al.chips.get(name)
    torch.manual_seed(0)
    model = programmed(nn.Sequential(nn.Linear(40, 30, bias=False)), chip)
    cells = model[0].analog_module.programming.cells[0].siemens
    before, error = errors(model, sigma_siemens=1.0, seed=6)
    low, high = chip.mapping.g_min_siemens, chip.mapping.g_max_siemens
    # A cell that write-verify left beyond the window stays there.
    ends = torch.stack([cells.clamp(max=low), cells.clamp(min=high)])
    moves = (ends - cells) / chip.mapping.half_width_siemens
    reached = [
        before + chip.mapping.weights(torch.stack([moves[e, c] for c, e in enumerate(choice)]))
        for choice in itertools.product((0, 1), repeat=len(cells))
    ]
    distance = (torch.stack(reached) - (before + error)).abs().amin(0)
    assert float(distance.max()) < 1e-5
    assert float(error.std()) > 0.3


def test_no_noise_is_what_was_programmed_even_beyond_the_window() -> None:
    model = programmed(nn.Sequential(nn.Linear(60, 50)))
    array = model[0].analog_module
    assert bool((array.programmed.conductance.abs() > 1.0).any())  # within write tolerance
    with noisy_chips(model, sigma_siemens=0.0):
        assert torch.equal(array.tensors.conductance, array.programmed.conductance)


def test_nothing_is_written_and_reads_are_exactly_restored() -> None:
    model = programmed(nn.Sequential(nn.Linear(300, 20), nn.ReLU(), nn.Linear(20, 5)))
    x = torch.randn(4, 300)
    clean, fingerprint = model(x), al.fingerprint(model)
    state = copy.deepcopy(model.state_dict())

    def fail() -> None:
        with noisy_chips(model, seed=1):
            assert not torch.equal(model(x), clean)
            assert al.fingerprint(model) == fingerprint
            al.verify(model)
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail()
    assert torch.equal(model(x), clean)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_chips_are_numbered_and_seeded() -> None:
    model = programmed(nn.Sequential(nn.Linear(30, 20)))
    x = torch.randn(4, 30)
    state = torch.get_rng_state()
    many = evaluate_noisy(model, lambda m: m(x), chips=3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    with noisy_chips(model, seed=7, chip=2) as again:
        assert torch.equal(again(x), many[2])
    with noisy_chips(model, seed=8, chip=2):
        assert not torch.equal(model(x), many[2])
    assert not torch.equal(many[0], many[1])


def pick(model: nn.Module, x: Any, seed: int, chips: int, **options: Any) -> Tensor:
    """The loop that a pass for several chips must equal."""
    return torch.stack(evaluate_noisy(model, lambda m: m(x), chips=chips, seed=seed, **options))


def test_many_chips_in_one_pass_equal_one_by_one_on_every_kind_of_tile(tile_kind: Any) -> None:
    model, x = tile_kind.frozen().eval(), tile_kind.batch()
    options = {"sigma_siemens": 5e-6, "mapping": SINGLE}
    with torch.no_grad():
        expected = pick(model, x, 9, 5, **options)
    torch.testing.assert_close(
        noisy_outputs(model, x, chips=5, seed=9, at_once=3, **options),
        expected,
        rtol=0.0,
        atol=1e-6,
    )


def config(**forward: Any) -> TorchInferenceRPUConfig:
    chosen = TorchInferenceRPUConfig()
    chosen.mapping.max_input_size, chosen.mapping.max_output_size = 8, 6
    chosen.forward.out_noise = 0.0
    for name, value in forward.items():
        setattr(chosen.forward, name, value)
    return chosen


@pytest.mark.parametrize(
    "forward",
    [
        {},
        {"is_perfect": True},
        {"noise_management": NoiseManagementType.NONE},
        {"noise_management": NoiseManagementType.MAX},
        {"bound_management": BoundManagementType.NONE, "out_bound": 1.0},
        {"bound_management": BoundManagementType.ITERATIVE, "out_bound": 1.0},
        {"inp_asymmetry": 0.1, "out_asymmetry": 0.2},
    ],
    ids=str,
)
def test_many_chips_in_one_pass_follow_converters(forward: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 17), nn.Tanh(), nn.Linear(17, 13))
    model = al.freeze_(convert_to_analog(net, config(**forward)), programmed_by="test")
    x = torch.randn(6, 20)
    x[2] = 0.0
    with torch.no_grad():
        expected = pick(model, x, 3, 7, mapping=SINGLE)
    many = noisy_outputs(model, x, chips=7, seed=3, mapping=SINGLE, at_once=4)
    assert torch.equal(many, expected)


class TimeFirst(nn.Module):
    """A model whose vectors are not in the order of its samples, and that reads a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(6, 5), nn.Linear(5, 4)
        self.start = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        steps = self.embed(x.transpose(0, 1))  # (time, n, 5)
        state = self.mix(self.start)
        for step in steps:
            state = torch.tanh(self.mix(step) + state)
        return state


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chips are computed together, or the test fails."""

    def alone(*_: Any) -> Tensor:
        raise AssertionError("expected a pass for several chips, got one chip by itself")

    monkeypatch.setattr(write_noise, "_alone", alone)


@pytest.mark.usefixtures("in_one_pass")
def test_samples_need_not_come_first_inside_a_model() -> None:
    torch.manual_seed(0)
    model, x = programmed(TimeFirst()), torch.randn(3, 4, 6)
    with torch.no_grad():
        expected = pick(model, x, 1, 5)
    assert torch.equal(noisy_outputs(model, x, chips=5, seed=1), expected)


class Peeking(nn.Module):
    """A model that looks at a number, which no pass for several chips can do."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.calls = nn.Linear(6, 5), 0

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Any:
        self.calls += 1
        y = self.head(x) * factor
        return type("Output", (), {"logits": -y if float(y.sum()) > 0 else y})()


def test_a_model_that_needs_it_is_run_chip_by_chip() -> None:
    torch.manual_seed(0)
    model, x = programmed(Peeking()), torch.randn(3, 6)
    with torch.no_grad():
        expected = pick_logits(model, {"x": x, "factor": 2.0})
    model.calls = 0
    many = noisy_outputs(model, {"x": x, "factor": 2.0}, chips=4, seed=1)
    assert torch.equal(many, expected)
    assert model.calls == 1 + 4  # one attempt at all of them
    assert model.head.analog_module.engine.name == "fused"
    assert not model.head.analog_module._forward_pre_hooks
    assert torch.equal(noisy_outputs(model, (x,), chips=4, seed=1).abs(), expected.abs() / 2)


def pick_logits(model: nn.Module, x: dict[str, Any]) -> Tensor:
    return torch.stack(evaluate_noisy(model, lambda m: m(**x).logits, chips=4, seed=1))


def test_a_mistake_of_the_model_comes_out() -> None:
    model = programmed(nn.Sequential(nn.Linear(6, 5)))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        noisy_outputs(model, torch.randn(3, 7), chips=2)


@pytest.mark.usefixtures("in_one_pass")
@pytest.mark.parametrize("sealed", [False, True])
def test_adapters_on_the_digital_unit_err_with_every_chip_alike(sealed: bool) -> None:
    torch.manual_seed(0)
    model = programmed(nn.Sequential(nn.Linear(20, 17), nn.Dropout(0.5), nn.Linear(17, 13)))
    peft = get_peft_model(model, LoraConfig(r=3, target_modules=["0", "2"]))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    al.digitize_(peft, al.DigitalUnit(bits=8))
    if sealed:
        seal_(peft, "default", request="a class")
    x = torch.randn(6, 20)
    peft.train()
    many = noisy_outputs(peft, x, chips=5, seed=2, at_once=5)
    assert peft.training
    assert peft.base_model.model[1].training
    with torch.no_grad():
        assert torch.equal(many, pick(peft.eval(), x, 2, 5))


def test_reads_of_every_chip_are_counted() -> None:
    model, x = programmed(nn.Sequential(nn.Linear(300, 20))), torch.rand(4, 300)
    one, many, loop = al.Ledger(), al.Ledger(), al.Ledger()
    with torch.no_grad(), al.observe(model, one, phase="verify"):
        model(x)
    with al.observe(model, many, phase="verify"):
        noisy_outputs(model, x, chips=3, seed=1)
    with torch.no_grad(), al.observe(model, loop, phase="verify"):
        pick(model, x, 1, 3)
    assert many.total() == loop.total()
    assert many.total()["tile_reads"] == 3 * one.total()["tile_reads"]
    assert many.total()["cell_read_x2g"] != 3 * one.total()["cell_read_x2g"]


def test_read_noise_differs_from_chip_to_chip() -> None:
    model = al.freeze_(
        convert_to_analog(nn.Sequential(nn.Linear(8, 6)), config(out_noise=0.1)),
        programmed_by="test",
    )
    many = noisy_outputs(model, torch.ones(2, 8), chips=3, sigma_siemens=0.0, mapping=SINGLE)
    assert not torch.equal(many[0], many[1])


def test_arrays_whose_cells_nobody_knows_are_refused() -> None:
    model, x = frozen(nn.Sequential(nn.Linear(6, 5))), torch.ones(1, 6)
    before = model(x)
    match = r"layer '0': expected to know the cells .*frozen as 'test'. Pass mapping=chip.mapping"
    with pytest.raises(al.StageError, match=match), noisy_chips(model):
        pass
    assert torch.equal(model(x), before)


def test_models_without_frozen_layers_are_refused() -> None:
    with pytest.raises(al.StageError, match="expected frozen layers, got none"):
        noisy_outputs(nn.Linear(2, 2), torch.ones(1, 2))


def test_a_noisy_chip_of_a_noisy_chip_is_refused() -> None:
    model = programmed(nn.Sequential(nn.Linear(6, 5)))
    match = r"layer '0': expected an array that is read as it was programmed, got one"
    with noisy_chips(model), pytest.raises(al.StageError, match=match):
        evaluate_noisy(model, lambda m: None, chips=1)
    assert model[0].analog_module.tensors is model[0].analog_module.programmed


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sigma_siemens": -1e-6}, r"expected sigma_siemens of 0 S or more, got -1e-06. 5 µS"),
        ({"sigma_siemens": float("nan")}, r"expected sigma_siemens of 0 S or more, got nan"),
        ({"seed": -1}, r"expected a seed of 0 or more, got -1"),
        ({"chip": -2}, r"expected a chip of 0 or more, got -2"),
    ],
)
def test_impossible_noise_is_refused(options: dict[str, Any], match: str) -> None:
    model = programmed(nn.Sequential(nn.Linear(6, 5)))
    with pytest.raises(al.ConfigurationError, match=match), noisy_chips(model, **options):
        pass


def test_impossible_numbers_of_chips_are_refused() -> None:
    model = programmed(nn.Sequential(nn.Linear(6, 5)))
    with pytest.raises(al.ConfigurationError, match="expected chips of 1 or more, got 0"):
        evaluate_noisy(model, lambda m: None, chips=0)
    with pytest.raises(al.ConfigurationError, match="expected at_once of 1 or more, got 0"):
        noisy_outputs(model, torch.ones(1, 6), at_once=0)
