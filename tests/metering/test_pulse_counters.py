"""aihwkit's counters on CUDA, by a stand-in, and every tile whose pulses cannot be counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aihwkit.nn import AnalogConv2d, AnalogLinear
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import (
    BufferedTransferCompound,
    ChoppedTransferCompound,
    DigitalRankUpdateRPUConfig,
    DynamicTransferCompound,
    FloatingPointRPUConfig,
    InferenceRPUConfig,
    MixedPrecisionCompound,
    OneSidedUnitCell,
    PulseType,
    ReferenceUnitCell,
    SingleRPUConfig,
    TransferCompound,
    UnitCellRPUConfig,
    UpdateParameters,
    VectorUnitCell,
    VectorUnitCellUpdatePolicy,
)
from aihwkit.simulator.configs.compounds import UnitCell
from aihwkit.simulator.configs.devices import ConstantStepDevice, SoftBoundsDevice
from aihwkit.simulator.rpu_base import tiles
from aihwkit.simulator.tiles import AnalogTile
from aihwkit.simulator.tiles.custom import CustomRPUConfig
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import StageError, UnsupportedTileError
from aihwkit_lora.metering.insitu import watch_pulses
from aihwkit_lora.metering.pulse_counters import (
    CounterReader,
    CrossPoint,
    Site,
    Update,
    counter_of,
)

NONE = torch.empty(0, dtype=torch.int64)


class Chip:
    """Has the counters of a C++ tile on CUDA; ``pulse`` adds to them."""

    def __init__(self, counters: Tensor | None = NONE) -> None:
        self.counters = counters

    def get_pulse_counters(self) -> Tensor | None:
        return self.counters

    def pulse(self, added: Any) -> None:
        new = torch.tensor(added)
        if self.counters is not None and self.counters.numel():
            new[: len(self.counters)] += self.counters
        self.counters = new


@pytest.mark.parametrize("empty", [NONE, None])
def test_counters_are_read_as_differences(empty: Tensor | None) -> None:
    chip = Chip(empty)
    reader = CounterReader(chip, "layer '0'")
    chip.pulse([[[1, 2], [3, 4]], [[10, 0], [0, 7]]])
    assert reader.difference() == (17, 10)
    assert reader.difference() == (0, 0)
    chip.pulse([[[0, 0], [0, 5]], [[0, 1], [0, 0]]])
    assert reader.difference() == (1, 5)


def test_pulses_before_the_first_read_are_not_counted() -> None:
    chip = Chip(torch.tensor([[[100]], [[200]]]))
    reader = CounterReader(chip, "layer '0'")
    chip.pulse([[[3]], [[4]]])
    assert reader.difference() == (4, 3)


def test_cells_of_a_weight_come_into_being_one_after_another() -> None:
    chip = Chip()
    reader = CounterReader(chip, "layer '0'")
    chip.pulse([[[5]], [[6]]])
    assert reader.difference() == (6, 5)
    chip.pulse([[[1]], [[2]], [[30]], [[40]]])
    assert reader.difference() == (42, 31)
    chip.pulse([[[0]], [[0]], [[1]], [[0]]])
    assert reader.difference() == (0, 1)


def test_a_read_is_not_changed_by_later_pulses() -> None:
    counters = torch.zeros(2, 1, 1, dtype=torch.int64)
    reader = CounterReader(Chip(counters), "layer '0'")
    counters += 3
    assert reader.difference() == (3, 3)


@pytest.mark.parametrize("counters", [NONE, None])
def test_an_update_without_counters_is_no_zero(counters: Tensor | None) -> None:
    reader = CounterReader(Chip(counters), "layer '0' (AnalogTile)")
    with pytest.raises(StageError, match=r"layer '0' \(AnalogTile\): .* after an update, got none"):
        reader.difference()


def test_counters_do_not_go_backwards() -> None:
    chip = Chip(torch.tensor([[[5]], [[5]]]))
    reader = CounterReader(chip, "layer '0'")
    chip.pulse([[[-2]], [[1]]])
    with pytest.raises(StageError, match="got 1 SET and -2 RESET pulses since the last read"):
        reader.difference()


# ------------------------------------------------------------------ a model as if on CUDA


def counting(**fields: Any) -> ConstantStepDevice:
    return ConstantStepDevice(count_pulses=True, **fields)


def on_cuda(monkeypatch: pytest.MonkeyPatch, chips: dict[int, Chip]) -> None:
    """Let tiles of the CPU look like tiles on CUDA whose counters are those of ``chips``."""
    monkeypatch.setattr(AnalogTile, "is_cuda", property(lambda tile: True))
    monkeypatch.setattr(
        tiles.FloatingPointTile,
        "get_pulse_counters",
        lambda handle: chips.setdefault(id(handle), Chip()).counters,
    )
    update = tiles.FloatingPointTile.update

    def pulse(handle: Any, *inputs: Any) -> None:
        update(handle, *inputs)
        chip = chips.setdefault(id(handle), Chip())
        chip.pulse([[[2, 0]], [[3, 1]]])

    monkeypatch.setattr(tiles.FloatingPointTile, "update", pulse)


def test_counters_of_a_model_go_into_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    chips: dict[int, Chip] = {}
    on_cuda(monkeypatch, chips)
    config = SingleRPUConfig(device=counting())
    model = nn.Sequential(*(AnalogLinear(2, 2, rpu_config=config) for _ in range(3)))
    optimizer, ledger = AnalogSGD(model.parameters(), lr=0.1), al.Ledger()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()  # before the watch
    with watch_pulses(model, ledger, phase="learn", wear=True) as watch:
        for _ in range(2):
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
        saved = model.state_dict()
        handles = [tile.tile for tile in model[0].analog_tiles()]
        model.load_state_dict(saved)
        assert handles != [tile.tile for tile in model[0].analog_tiles()]
        AnalogSGD(model.parameters(), lr=0.1).step()  # nothing queued
        model[1](torch.ones(4, 2)).sum().backward()
        AnalogSGD(model.parameters(), lr=0.1).step()
    two = al.Counts({"set_pulses": 8, "reset_pulses": 4})
    three = al.Counts({"set_pulses": 12, "reset_pulses": 6})
    assert ledger.by_layer() == {"0": two, "1": three, "2": two}
    assert ledger.total().level == "exact"
    assert watch.wear() == {"0": 10, "1": 15, "2": 10}


# ------------------------------------------------------------------ what cannot be counted


def pair() -> list[ConstantStepDevice]:
    return [counting(), counting()]


POLICIES = VectorUnitCellUpdatePolicy
ANYWHERE: list[tuple[Any, str]] = [
    (DigitalRankUpdateRPUConfig(device=MixedPrecisionCompound(device=counting())), "digital sum"),
    (
        UnitCellRPUConfig(device=OneSidedUnitCell(pair(), refresh_every=3)),
        r"refresh resets .*refresh_every",
    ),
    (
        UnitCellRPUConfig(device=ChoppedTransferCompound(pair())),
        "transfers follow|do not tell SET from RESET",
    ),
    (
        UnitCellRPUConfig(device=DynamicTransferCompound(pair())),
        "transfers follow|do not tell SET from RESET",
    ),
    (
        UnitCellRPUConfig(device=VectorUnitCell([OneSidedUnitCell(pair()), counting()])),
        "only pulsed devices and unit cells made of them",
    ),
    *(
        (
            SingleRPUConfig(device=counting(), update=UpdateParameters(pulse_type=pulse_type)),
            f"pulse type {pulse_type.value}, aihwkit changes weights without pulses",
        )
        for pulse_type in (PulseType.NONE, PulseType.NONE_WITH_DEVICE)
    ),
]
CPU_ONLY: list[tuple[Any, str]] = [
    (UnitCellRPUConfig(device=TransferCompound(pair())), "transfers follow from weights"),
    (UnitCellRPUConfig(device=BufferedTransferCompound(pair())), "transfers follow from weights"),
]
CUDA_ONLY: list[tuple[Any, str]] = [
    (SingleRPUConfig(device=ConstantStepDevice()), "count_pulses is off"),
    (UnitCellRPUConfig(device=VectorUnitCell([counting(), SoftBoundsDevice()])), "count_pulses"),
    (UnitCellRPUConfig(device=OneSidedUnitCell(pair())), "on CUDA, aihwkit counts none of it"),
    (
        UnitCellRPUConfig(device=TransferCompound(pair(), with_reset_prob=0.5)),
        "reset without a count .with_reset_prob",
    ),
]


def model_of(config: Any) -> nn.Module:
    layer = AnalogLinear(3, 2, rpu_config=config)
    return nn.ModuleDict({"body": nn.Sequential(layer)})


@pytest.mark.parametrize(("config", "reason"), ANYWHERE + CPU_ONLY)
def test_what_cannot_be_counted_on_the_cpu_is_named(config: Any, reason: str) -> None:
    device = type(config.device).__name__
    with pytest.raises(
        UnsupportedTileError,
        match=rf"layer 'body\.0': .* got AnalogTile with {device} on cpu: .*({reason})",
    ):
        watch_pulses(model_of(config), al.Ledger(), phase="learn").start()


@pytest.mark.parametrize(("config", "reason"), ANYWHERE + CUDA_ONLY)
def test_what_cannot_be_counted_on_cuda_is_named(
    config: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda(monkeypatch, {})
    with pytest.raises(UnsupportedTileError, match=rf"layer 'body\.0': .*({reason})"):
        watch_pulses(model_of(config), al.Ledger(), phase="learn").start()


@pytest.mark.parametrize(
    "device",
    [
        counting(),
        VectorUnitCell(pair()),
        ReferenceUnitCell(pair()),
        TransferCompound(pair()),
        BufferedTransferCompound(pair()),
    ],
)
def test_what_aihwkit_counts_on_cuda_is_read(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda(monkeypatch, {})
    kind = SingleRPUConfig if isinstance(device, ConstantStepDevice) else UnitCellRPUConfig
    (tile,) = AnalogLinear(3, 2, rpu_config=kind(device=device)).analog_tiles()
    assert isinstance(counter_of(Site("0", tile, tile), wear=True), CounterReader)


@pytest.mark.parametrize("policy", [POLICIES.SINGLE_RANDOM, POLICIES.SINGLE_SEQUENTIAL])
def test_wear_of_cells_that_take_turns_is_not_known(policy: Any) -> None:
    config = UnitCellRPUConfig(device=VectorUnitCell(pair(), update_policy=policy))
    watch_pulses(model_of(config), al.Ledger(), phase="learn").start().stop()
    with pytest.raises(UnsupportedTileError, match="which cell of a weight takes a pulse"):
        watch_pulses(model_of(config), al.Ledger(), phase="learn", wear=True).start()


def test_simulators_of_ones_own_are_not_known() -> None:
    with pytest.raises(UnsupportedTileError, match="CustomSimulatorTile, is unknown here"):
        watch_pulses(model_of(CustomRPUConfig()), al.Ledger(), phase="learn").start()


def test_unit_cells_of_ones_own_are_not_known() -> None:
    config = SingleRPUConfig(device=counting())
    (tile,) = AnalogLinear(3, 2, rpu_config=config).analog_tiles()
    tile.rpu_config.device = UnitCell(unit_cell_devices=pair())
    with pytest.raises(UnsupportedTileError, match="this unit cell is unknown here"):
        counter_of(Site("0", tile, tile), wear=False)


def test_weights_that_an_optimiser_of_torch_writes_take_no_pulses() -> None:
    (tile,) = AnalogLinear(3, 2, rpu_config=SingleRPUConfig()).analog_tiles()
    tile.shared_weights = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(UnsupportedTileError, match="writes its shared weights"):
        counter_of(Site("0", tile, tile), wear=False)


@pytest.mark.parametrize("config", [InferenceRPUConfig, FloatingPointRPUConfig])
def test_tiles_that_take_no_pulses_need_no_counter(config: Any) -> None:
    (tile,) = AnalogLinear(3, 2, rpu_config=config()).analog_tiles()
    assert counter_of(Site("0", tile, tile), wear=True) is None


def test_pulses_of_a_cross_point_go_to_its_cells() -> None:
    assert CrossPoint().totals(3, 4) == (3, 4)
    assert CrossPoint(copies=3).totals(3, 4) == (9, 12)
    assert CrossPoint(one_sided=True).totals(3, 4) == (7, 0)


def test_index_matrices_of_layers_of_ones_own_are_not_known() -> None:
    (tile,) = AnalogConv2d(1, 1, 2, rpu_config=SingleRPUConfig()).analog_tiles()
    update = Update(tile.tile, torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), indexed=True)
    with pytest.raises(UnsupportedTileError, match=r"'0': .* indexed update of Identity, whose"):
        update.vectors(Site("0", nn.Identity(), tile))
