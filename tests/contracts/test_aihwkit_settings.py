"""aihwkit's settings: each one that exists is followed, refused, or left to aihwkit's tiles."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from aihwkit.simulator import configs
from aihwkit.simulator.parameters.enums import (
    AnalogMVType,
    BoundManagementType,
    NoiseManagementType,
    WeightNoiseType,
)
from aihwkit.simulator.parameters.io import IOParameters, IOParametersIRDropT
from aihwkit.simulator.parameters.mapping import MappingParameter
from aihwkit.simulator.parameters.pre_post import InputRangeParameter, PrePostProcessingParameter
from aihwkit.simulator.tiles.analog import AnalogTile
from aihwkit.simulator.tiles.custom import CustomRPUConfig, CustomSimulatorTile, CustomTile
from aihwkit.simulator.tiles.floating_point import FloatingPointTile
from aihwkit.simulator.tiles.inference import InferenceTile
from aihwkit.simulator.tiles.inference_torch import TorchInferenceTile
from aihwkit.simulator.tiles.quantized_inference_torch import QuantizedTorchInferenceTile
from aihwkit.simulator.tiles.torch_tile import TorchSimulatorTile
from aihwkit.simulator.tiles.torch_tile_irdrop_t import TorchSimulatorTileIRDropT

IO_FIELDS = {
    "bm_test_negative_bound",
    "bound_management",
    "inp_asymmetry",
    "inp_bound",
    "inp_noise",
    "inp_res",
    "inp_sto_round",
    "ir_drop",
    "ir_drop_g_ratio",
    "is_perfect",
    "max_bm_factor",
    "max_bm_res",
    "mv_type",
    "nm_thres",
    "noise_management",
    "out_asymmetry",
    "out_bound",
    "out_noise",
    "out_noise_std",
    "out_nonlinearity",
    "out_nonlinearity_std",
    "out_res",
    "out_scale",
    "out_sto_round",
    "r_series",
    "slope_calibration",
    "v_offset_std",
    "v_offset_w_min",
    "w_noise",
    "w_noise_type",
    "w_read_asymmetry_dtod",
}
IR_DROP_FIELDS = {
    "adc_frequency",
    "adc_quantization",
    "apply_xdep_pcm_read_noise",
    "ir_drop_integration_sum",
    "ir_drop_rs",
    "ir_drop_segments",
    "ir_drop_time_step_resolution_scale",
    "ir_drop_v_read",
    "xdep_pcm_read_noise_scale",
}
MAPPING_FIELDS = {
    "digital_bias",
    "learn_out_scaling",
    "max_input_size",
    "max_output_size",
    "out_scaling_columnwise",
    "weight_scaling_columnwise",
    "weight_scaling_lr_compensation",
    "weight_scaling_omega",
}
INPUT_RANGE_FIELDS = {
    "calibration_info",
    "decay",
    "enable",
    "gradient_relative",
    "gradient_scale",
    "init_from_data",
    "init_std_alpha",
    "init_value",
    "input_min_percentage",
    "learn_input_range",
    "manage_output_clipping",
    "output_min_percentage",
}


@pytest.mark.parametrize(
    ("parameters", "known"),
    [
        (IOParameters, IO_FIELDS),
        (IOParametersIRDropT, IO_FIELDS | IR_DROP_FIELDS),
        (MappingParameter, MAPPING_FIELDS),
        (PrePostProcessingParameter, {"input_range"}),
        (InputRangeParameter, INPUT_RANGE_FIELDS),
    ],
)
def test_fields_of_the_periphery_are_all_known(parameters, known, aihwkit_fact):
    found = {field.name for field in dataclasses.fields(parameters)}
    fact = aihwkit_fact(
        f"{parameters.__name__} has exactly the known fields (new: {sorted(found - known)}, "
        f"gone: {sorted(known - found)})",
        "the blocked product, which has to follow every setting or give way",
        "a new field is a non-ideality that the blocked product might silently lack: follow it in "
        "TileIO, or list it among the settings for which the fused engine gives way to aihwkit's "
        "own tiles, then add it here",
    )
    assert found == known, fact


@pytest.mark.parametrize(
    ("enum", "known"),
    [
        (AnalogMVType, "IDEAL ONE_PASS POS_NEG_SEPARATE POS_NEG_SEPARATE_DIGITAL_SUM SPLIT_MODE "
         "BIT_WISE"),
        (BoundManagementType, "NONE ITERATIVE ITERATIVE_WORST_CASE SHIFT"),
        (NoiseManagementType, "NONE ABS_MAX ABS_MAX_NP_SUM MAX CONSTANT AVERAGE_ABS_MAX"),
        (WeightNoiseType, "NONE ADDITIVE_CONSTANT PCM_READ"),
    ],
)  # fmt: skip
def test_choices_of_the_periphery_are_all_known(enum, known, aihwkit_fact):
    found, known = {member.name for member in enum}, set(known.split())
    fact = aihwkit_fact(
        f"{enum.__name__} has exactly the known members (new: {sorted(found - known)}, "
        f"gone: {sorted(known - found)})",
        "the blocked product, which follows some of these choices and leaves the others to "
        "aihwkit's own tiles",
        "decide for a new member whether TileIO follows it, then add it here",
    )
    assert found == known, fact


def test_every_configuration_uses_a_known_tile(aihwkit_fact):
    found = {
        name: (config.tile_class, getattr(config, "simulator_tile_class", None))
        for name, config in vars(configs).items()
        if inspect.isclass(config) and hasattr(config, "tile_class")
    }
    fact = aihwkit_fact(
        "the RPUConfig classes use five kinds of tile around three kinds of torch array",
        "the table of tiles that can be frozen, and what each is read with",
        "add a kind for a new tile to that table, or let freeze_ refuse it, then add it here",
    )
    assert found == {
        "DigitalRankUpdateRPUConfig": (AnalogTile, None),
        "FloatingPointRPUConfig": (FloatingPointTile, None),
        "InferenceRPUConfig": (InferenceTile, None),
        "QuantizedTorchInferenceRPUConfig": (QuantizedTorchInferenceTile, TorchSimulatorTile),
        "SingleRPUConfig": (AnalogTile, None),
        "TorchInferenceRPUConfig": (TorchInferenceTile, TorchSimulatorTile),
        "TorchInferenceRPUConfigIRDropT": (TorchInferenceTile, TorchSimulatorTileIRDropT),
        "UnitCellRPUConfig": (AnalogTile, None),
    }, fact
    assert CustomRPUConfig.tile_class is CustomTile, fact
    assert CustomRPUConfig.simulator_tile_class is CustomSimulatorTile, fact
