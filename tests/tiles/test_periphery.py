"""Converters and noise taken over from aihwkit, and the settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from aihwkit.simulator.parameters.enums import (
    AnalogMVType,
    BoundManagementType,
    NoiseManagementType,
    WeightNoiseType,
)
from aihwkit.simulator.parameters.io import IOParameters, IOParametersIRDropT

from aihwkit_lora.errors import UnsupportedTileError
from aihwkit_lora.tiles.periphery import TileIO


def taken_over(whole_batch: bool = False, **settings: Any) -> TileIO:
    settings = {"w_noise": 0.01} | settings
    return TileIO.from_aihwkit(IOParameters(**settings), whole_batch=whole_batch, layer="fc")


REFUSED: dict[str, Any] = {
    "mv_type": AnalogMVType.POS_NEG_SEPARATE,
    "bound_management": BoundManagementType.SHIFT,
    "noise_management": NoiseManagementType.AVERAGE_ABS_MAX,
    "w_noise_type": WeightNoiseType.PCM_READ,
    "ir_drop": 1.0,
    "out_nonlinearity": 0.3,
    "slope_calibration": 0.5,
    "v_offset_std": 0.1,
    "r_series": 0.01,
    "w_read_asymmetry_dtod": 0.1,
    "bm_test_negative_bound": False,
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_non_ideality_without_counterpart_is_named(field: str) -> None:
    value = REFUSED[field]
    with pytest.raises(
        UnsupportedTileError, match=rf"layer 'fc': expected forward\.{field} = .*, got {value}"
    ):
        taken_over(**{field: value})


@pytest.mark.parametrize("field", REFUSED)
def test_a_perfect_forward_ignores_every_non_ideality(field: str) -> None:
    assert taken_over(is_perfect=True, **{field: REFUSED[field]}).perfect


def test_parameters_of_aihwkit_that_the_message_knows_exist() -> None:
    known = IOParameters()
    assert all(hasattr(known, field) for field in REFUSED)


def test_ideal_products_are_perfect() -> None:
    assert taken_over(mv_type=AnalogMVType.IDEAL).perfect
    assert not taken_over().perfect


@pytest.mark.parametrize(
    ("resolution", "bound", "step"),
    [(1 / 254, 1.0, 2 / 254), (254, 1.0, 2 / 254), (0.1, 5.0, 1.0), (-1.0, 1.0, 0.0)],
)
def test_resolutions_are_step_fractions_or_numbers_of_steps(
    resolution: float, bound: float, step: float
) -> None:
    io = taken_over(inp_res=resolution, inp_bound=bound, out_res=resolution, out_bound=bound)
    assert io.inp_step == pytest.approx(step, rel=1e-12)
    assert io.out_step == pytest.approx(step, rel=1e-12)


def test_no_bound_means_no_converter() -> None:
    io = taken_over(inp_bound=-1.0, out_bound=0.0)
    assert (io.inp_bound, io.inp_step, io.out_bound, io.out_step) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("management", "threshold", "scales", "constant", "ceiling"),
    [
        (NoiseManagementType.ABS_MAX, 0.0, True, 1.0, 0.0),
        (NoiseManagementType.ABS_MAX, 0.7, True, 1.0, 0.7),
        (NoiseManagementType.NONE, 0.7, False, 1.0, 0.7),
        (NoiseManagementType.CONSTANT, 0.7, False, 0.7, 0.0),
        (NoiseManagementType.CONSTANT, 0.0, False, 1.0, 0.0),
    ],
)
def test_input_scale_by_noise_management(
    management: NoiseManagementType,
    threshold: float,
    scales: bool,
    constant: float,
    ceiling: float,
) -> None:
    io = taken_over(noise_management=management, nm_thres=threshold)
    assert (io.scale_inputs, io.constant_scale, io.scale_ceiling) == (scales, constant, ceiling)


@pytest.mark.parametrize("whole_batch", [True, False])
def test_repeats_follow_bound_management_and_the_kind_of_tile(whole_batch: bool) -> None:
    iterative = taken_over(whole_batch, bound_management=BoundManagementType.ITERATIVE)
    none = taken_over(whole_batch, bound_management=BoundManagementType.NONE)
    assert (iterative.repeat_on_overflow, none.repeat_on_overflow) == (True, False)
    assert iterative.whole_batch is whole_batch


def test_inputs_are_halved_no_further_than_their_resolution() -> None:
    fine = taken_over(max_bm_factor=1000, max_bm_res=0.25, inp_res=0.001, inp_bound=1.0)
    assert fine.max_halving == pytest.approx(125.0)
    assert taken_over(max_bm_factor=10, max_bm_res=0.25, inp_res=0.001).max_halving == 10.0
    assert taken_over(max_bm_factor=1000, max_bm_res=0.25, inp_res=-1).max_halving == 1000.0


def test_noise_and_scale_are_taken_over() -> None:
    io = taken_over(inp_noise=0.1, out_noise=0.2, out_scale=3.0, inp_bound=0.5, out_bound=7.0)
    found = (io.inp_noise, io.out_noise, io.out_scale, io.inp_bound, io.out_bound)
    assert found == (0.1, 0.2, 3.0, 0.5, 7.0)


def test_fields_that_a_parameter_class_lacks_are_not_asked_for() -> None:
    config = IOParametersIRDropT(ir_drop=0.0)
    assert TileIO.from_aihwkit(config, whole_batch=True).whole_batch
