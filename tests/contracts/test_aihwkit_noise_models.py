"""aihwkit's two ReRAM noise models for inference, and the traps in them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from aihwkit.exceptions import ArgumentError
from aihwkit.inference.noise.reram import ReRamCMONoiseModel, ReRamWan2022NoiseModel

ANY_NOISE_MODEL = "reproducing published write and relaxation errors with aihwkit's noise models"

# Standard deviations are measured on so many samples that a deviation by 1.5 % is 6 of its own
# standard deviations: a right model fails in 2 of 10⁹ runs, and torch's seed is fixed besides.
SAMPLES, CLOSE = 80_000, 0.015

# numpy's logarithm of a tensor, in the drift of ReRamCMONoiseModel.
NUMPY_ON_TENSORS = "ignore:__array_wrap__ must accept:DeprecationWarning"


def error_of(model, conductance):
    """Standard deviation of the write error at one conductance, in µS."""
    target = torch.full((SAMPLES,), conductance)
    return float((model.apply_programming_noise_to_conductance(target) - target).std())


def polynomial(coefficients, x):
    return sum(c * x**power for power, c in enumerate(coefficients))


# ------------------------------------------------------------------ Wan et al. 2022


def test_wan_noise_of_40_microsiemens_is_not_scaled_to_another_window(aihwkit_fact):
    fact = aihwkit_fact(
        "ReRamWan2022NoiseModel notes prog_coeff_g_max_reference = 40 but scales by "
        "coeff_g_max_reference = g_max, so that noise measured on 40 µS is applied unscaled to any "
        "window",
        ANY_NOISE_MODEL,
        "if it is scaled now, drift_ must no more mend the model before it uses it",
    )
    model = ReRamWan2022NoiseModel()
    assert model.g_max == 25.0, fact
    assert model.coeff_g_max_reference == 25.0, fact
    assert model.prog_coeff_g_max_reference == 40.0, fact
    at_one_second = polynomial(model.coeff_dic[1.0], 0.4)
    assert error_of(model, 10.0) == pytest.approx(at_one_second, rel=CLOSE), fact
    wide = ReRamWan2022NoiseModel(g_max=40.0)
    assert error_of(wide, 16.0) == pytest.approx(at_one_second, rel=CLOSE), fact


def test_wan_noise_can_be_scaled_through_the_attribute(aihwkit_fact):
    fact = aihwkit_fact(
        "setting coeff_g_max_reference = 40 on a ReRamWan2022NoiseModel scales its noise to g_max",
        "drift_, which mends the model this way before it uses it",
        "mend it in another way, such as noise_scale = g_max / 40",
    )
    model = ReRamWan2022NoiseModel()
    model.coeff_g_max_reference = 40.0
    scaled = polynomial(model.coeff_dic[1.0], 0.4) * 25.0 / 40.0
    assert error_of(model, 10.0) == pytest.approx(scaled, rel=CLOSE), fact


def test_wan_reference_as_an_argument_is_lost(aihwkit_fact):
    fact = aihwkit_fact(
        "ReRamWan2022NoiseModel(coeff_g_max_reference=…) is accepted, not stored, and raises "
        "AttributeError on first use",
        ANY_NOISE_MODEL,
        "if the argument works now, pass 40 through it",
    )
    model = ReRamWan2022NoiseModel(coeff_g_max_reference=40.0)
    assert not hasattr(model, "coeff_g_max_reference"), fact
    with fact.raises(AttributeError, "no attribute 'coeff_g_max_reference'"):
        model.apply_programming_noise_to_conductance(torch.ones(3))


@pytest.mark.parametrize("seconds", [0.0, 2.0, 3600.0, 604800.0])
def test_wan_knows_three_times_only(seconds, aihwkit_fact):
    fact = aihwkit_fact(
        "ReRamWan2022NoiseModel knows 1 s, 1 day and 2 days, and raises ArgumentError in between",
        "drift_, which says that there is no data for other times",
        "if it interpolates now, say so where times are chosen",
    )
    model = ReRamWan2022NoiseModel()
    assert list(model.coeff_dic) == [1.0, 86400.0, 172800.0], fact
    g = torch.ones(3)
    for known in model.coeff_dic:
        assert model.apply_drift_noise_to_conductance(g, g, known).shape == (3,), fact
    with fact.raises(ArgumentError, r"should be one of `\[1\.0, 86400\.0, 172800\.0\]`"):
        model.apply_drift_noise_to_conductance(g, g, seconds)


def test_wan_draws_each_time_anew_around_the_target(aihwkit_fact):
    fact = aihwkit_fact(
        "ReRamWan2022NoiseModel computes a later time from the target, not from what was "
        "programmed, with independent noise",
        "drift_, where write errors of programmed cells add to relaxation only as targets",
        "see what drift_ has to pass for what was programmed",
    )
    model = ReRamWan2022NoiseModel()
    target = torch.full((SAMPLES,), 10.0)
    programmed = target + 5.0
    later = model.apply_drift_noise_to_conductance(programmed, target, 86400.0)
    # The mean of so many samples has a standard error of 0.012 µS; 0.1 µS is 8 of them.
    assert float(later.mean()) == pytest.approx(10.0, abs=0.1), fact


# ------------------------------------------------------------------ CMO/HfOx


def test_cmo_default_of_two_percent_means_a_fifth_of_one(aihwkit_fact):
    fact = aihwkit_fact(
        "acceptance_range of ReRamCMONoiseModel is looked up in {0.2, 2} percent; anything else, "
        "its default 2e-2 included, silently means 0.2 %",
        ANY_NOISE_MODEL,
        "if the default means 2 % now, stop passing acceptance_range=2",
    )
    ranges = [
        ReRamCMONoiseModel(acceptance_range=asked).acceptance_range for asked in (0.2, 2, 2e-2, 5)
    ]
    assert ranges == [0.2, 2, 0.2, 0.2], fact
    assert ReRamCMONoiseModel().acceptance_range == 0.2, fact


@pytest.mark.parametrize("accepted", [0.2, 2])
def test_cmo_write_error_is_linear_in_the_conductance(accepted, aihwkit_fact):
    fact = aihwkit_fact(
        "the write error of ReRamCMONoiseModel is a polynomial of the conductance in µS, not of "
        "its part of the window",
        ANY_NOISE_MODEL,
        "re-derive write errors from the new coefficients",
    )
    model = ReRamCMONoiseModel(acceptance_range=accepted)
    expected = polynomial(model.coeff_dict[accepted], 50.0)
    assert error_of(model, 50.0) == pytest.approx(expected, rel=CLOSE), fact


@pytest.mark.filterwarnings(NUMPY_ON_TENSORS)
@pytest.mark.parametrize(("seconds", "sign"), [(1e-3, 1.0), (1e4, -1.0)])
def test_cmo_decay_is_a_growth_before_one_second(seconds, sign, aihwkit_fact):
    fact = aihwkit_fact(
        "ReRamCMONoiseModel moves the mean by -0.089 µS · ln(t / s), upwards before one second",
        "drift_, which refuses times at which a model gives no finite conductance",
        "if short times make sense now, say in the guide which",
    )
    target = torch.full((SAMPLES,), 50.0)
    model = ReRamCMONoiseModel()
    moved = model.apply_drift_noise_to_conductance(target, target, seconds) - target
    # The mean has a standard error below 0.003 µS; the shift is 0.61 and 0.82 µS.
    assert float(moved.mean()) * sign > 0.5, fact


@pytest.mark.filterwarnings(NUMPY_ON_TENSORS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt:RuntimeWarning")
@pytest.mark.parametrize(
    ("seconds", "all_nan"), [(0.0, False), (1e-7, True), (1e-6, False), (1.0, False), (1e9, False)]
)
def test_cmo_is_not_a_number_before_its_read_time_of_a_microsecond(seconds, all_nan, aihwkit_fact):
    fact = aihwkit_fact(
        "ReRamCMONoiseModel returns NaN everywhere at 0 < t < 1 µs, and numbers at 0 and later",
        "drift_, which refuses times at which a model gives no finite conductance",
        "if it is a number now, drift_ serves such times too: check the physics",
    )
    target = torch.linspace(9.0, 88.0, 500)
    later = ReRamCMONoiseModel().apply_drift_noise_to_conductance(target, target, seconds)
    assert bool(later.isnan().all()) == all_nan, fact
    assert bool(later.isnan().any()) == all_nan, fact


@pytest.mark.filterwarnings(NUMPY_ON_TENSORS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in log10:RuntimeWarning")
def test_cmo_is_not_a_number_where_a_cell_drifts_below_zero(aihwkit_fact):
    fact = aihwkit_fact(
        "ReRamCMONoiseModel takes the logarithm of conductances before it clamps them, so cells "
        "near 0 µS become NaN; its own window from 9 µS is safe",
        "drift_, which refuses conductances that are not finite",
        "if it clamps first now, allow such windows",
    )
    to_zero, own = ReRamCMONoiseModel(g_min=0.0, g_max=25.0), ReRamCMONoiseModel()
    at_zero, at_nine = torch.zeros(1000), torch.full((1000,), own.g_min)
    assert own.g_min == 9.0, fact
    # Each cell falls below zero with probability 1/2; none or all of 1000: below 1e-300.
    broken = to_zero.apply_drift_noise_to_conductance(at_zero, at_zero, 1.0).isnan()
    assert 0 < int(broken.sum()) < 1000, fact
    # After ten years nine µS are 5.9 standard deviations from zero: 2 in 10⁶ for 1000 cells.
    safe = own.apply_drift_noise_to_conductance(at_nine, at_nine, 3.2e8)
    assert not bool(safe.isnan().any()), fact
    # Not only conductances: one such cell makes weights of a whole model NaN.
    weights = to_zero.apply_noise(torch.zeros(100, 100) + torch.eye(100), 1.0)
    assert bool(weights.isnan().any()), fact


def test_cmo_calls_numpy_on_tensors(aihwkit_fact):
    fact = aihwkit_fact(
        "the drift of ReRamCMONoiseModel passes a tensor to numpy.log10, which warns of an end to "
        "that and cannot work on a GPU",
        "drift_, which calls noise models on the CPU only, and filters of this warning in tests",
        "drop the filters, and see whether drift_ can stay on a GPU",
    )
    g = torch.full((3,), 50.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ReRamCMONoiseModel().apply_drift_noise_to_conductance(g, g, 1.0)
    assert [warning.category for warning in caught] == [DeprecationWarning], fact
    assert str(caught[0].message).startswith("__array_wrap__ must accept"), fact


# ------------------------------------------------------------------ the polynomial of both


def models():
    wan, cmo = ReRamWan2022NoiseModel(), ReRamCMONoiseModel()
    return [(wan, wan.coeff_dic), (cmo, cmo.coeff_dict)]


@pytest.mark.parametrize("model", [0, 1], ids=["Wan", "CMO"])
def test_noise_changes_neither_targets_nor_coefficients(model, aihwkit_fact):
    fact = aihwkit_fact(
        "_apply_poly multiplies in place but starts from plain numbers, so targets and "
        "coefficients stay as they are from call to call",
        ANY_NOISE_MODEL,
        "pass clones, and make a new noise model for each use",
    )
    noise, coefficients = models()[model]
    before = copy.deepcopy(coefficients)
    target = torch.linspace(9.0, 25.0, 5)
    for chosen in coefficients.values():
        for _ in range(2):
            noise._apply_poly(target, chosen)
    assert torch.equal(target, torch.linspace(9.0, 25.0, 5)), fact
    assert coefficients == before, fact


@pytest.mark.parametrize("model", [0, 1], ids=["Wan", "CMO"])
def test_noise_overwrites_coefficients_that_are_tensors(model, aihwkit_fact):
    fact = aihwkit_fact(
        "_apply_poly adds into its first coefficient if that is a tensor of the target's shape, "
        "and raises RuntimeError if it is a tensor without shape",
        "passing coefficients as plain floats only",
        "tensors are safe as coefficients now",
    )
    noise, _ = models()[model]
    target = torch.full((3,), noise.g_max)
    coefficients = [torch.zeros(3), 2.0]
    noise._apply_poly(target, coefficients)
    step = 2.0 if model == 0 else 2.0 * noise.g_max
    assert torch.equal(coefficients[0], torch.full((3,), step)), fact
    with fact.raises(RuntimeError, r"output with shape \[\] doesn't match"):
        noise._apply_poly(target, [torch.tensor(0.0), 2.0])
