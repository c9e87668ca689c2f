"""Counting the pulses of one tile: by aihwkit's counters on CUDA, by drawn trains on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any, Literal, Protocol, cast

import torch
from aihwkit.simulator import rpu_base
from aihwkit.simulator.configs.compounds import (
    BufferedTransferCompound,
    DigitalRankUpdateCell,
    OneSidedUnitCell,
    ReferenceUnitCell,
    TransferCompound,
    UnitCell,
    VectorUnitCell,
)
from aihwkit.simulator.configs.devices import FloatingPointDevice, IdealDevice, PulsedDevice
from aihwkit.simulator.parameters.enums import PulseType, VectorUnitCellUpdatePolicy
from aihwkit.simulator.parameters.training import UpdateParameters
from aihwkit.simulator.tiles.module import TileModule
from aihwkit.simulator.tiles.torch_tile import TorchSimulatorTile
from aihwkit.simulator.tiles.transfer import TransferSimulatorTile
from torch import Generator, Tensor, nn

from aihwkit_lora.errors import StageError, UnsupportedTileError
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.pulse_trains import Pulses, PulseTrains

Method = Literal["simulated", "mean"]


class Draws(Protocol):
    """How trains are drawn on the CPU."""

    @property
    def method(self) -> Method:
        """``"simulated"`` or ``"mean"``."""

    @property
    def tracks_wear(self) -> bool:
        """Whether the pulses of each cell are wanted."""

    def generator(self) -> Generator:
        """Random numbers for one update."""


@dataclass(frozen=True)
class Site:
    """Where a tile stands in a model.

    Attributes:
        layer: Full name of the layer.
        owner: The layer.
        tile: One of its tiles.
    """

    layer: str
    owner: nn.Module
    tile: TileModule

    def index_matrix(self) -> Tensor:
        """Give aihwkit's indices from the patches of a convolution to the values of an image.

        Raises:
            UnsupportedTileError: The layer is none of aihwkit's convolutions.
        """
        own = getattr(self.owner, "fold_indices", None)
        if own is not None:
            return cast(Tensor, own)
        # Mapped: the tiles of a row of the array read the same channels.
        shared = getattr(self.owner, "fold_indices_lst", [])
        for indices, row in zip(shared, getattr(self.owner, "array", []), strict=False):
            if any(tile is self.tile for tile in row):
                return cast(Tensor, indices)
        raise UnsupportedTileError(
            f"layer '{self.layer}': expected a convolution of aihwkit, got an indexed update of "
            f"{type(self.owner).__name__}, whose index matrix is unknown. Make the layer with "
            "use_indexed=False."
        )


@dataclass(frozen=True)
class Update:
    """One update of a C++ tile, with what it was given.

    Attributes:
        handle: The C++ tile.
        x: Inputs, ``(..., in)``; ``(in, ...)`` if transposed; images if indexed.
        d: Gradients of the outputs: ``(..., out)`` and so on.
        bias: Whether the tile adds an input of 1.
    """

    handle: Any
    x: Tensor
    d: Tensor
    bias: bool = False
    x_transposed: bool = False
    d_transposed: bool = False
    indexed: bool = False

    def vectors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Inputs ``(vectors, in)``, an input of 1 included, and gradients ``(vectors, out)``.

        Args:
            site: Where the tile stands.
        Raises:
            UnsupportedTileError: See :meth:`Site.index_matrix`.
        """
        if self.indexed:
            positions = self.d[0, 0].numel()
            # Behind the rows of the tile, aihwkit 1.2.0 lists more that it never reads.
            used = site.index_matrix()[: self.handle.get_x_size() * positions]
            x = _patches(self.x, used.view(-1, positions).long())
            return x, self.d.flatten(2).mT.flatten(0, 1)
        x, d = _rows(self.x, self.x_transposed), _rows(self.d, self.d_transposed)
        return (torch.cat([x, x.new_ones(len(x), 1)], 1) if self.bias else x), d


@dataclass(frozen=True)
class Taken:
    """What one update did to one tile.

    Attributes:
        set_pulses: On all cells together.
        reset_pulses: On all cells together.
        level: How sure these are.
        cells: Pulses of each cell, one tensor ``(out, in)`` for each cell of a weight; empty unless
            wear is tracked.
    """

    set_pulses: int
    reset_pulses: int
    level: Level
    cells: list[Tensor] = field(default_factory=list)


class PulseCounter(Protocol):
    """Counts the pulses of one tile."""

    def begin(self, update: Update, draws: Draws) -> Callable[[], Taken]:
        """Get ready for an update.

        Args:
            update: What is about to happen.
            draws: How trains are drawn.
        Returns:
            Called after the update, tells what it took.
        """


@dataclass(frozen=True)
class CrossPoint:
    """The cells that hold one weight, and which of them a pulse reaches.

    Attributes:
        copies: Cells that each take every pulse.
        one_sided: Whether one cell takes all that raises the weight and another all that lowers it,
            both as SET pulses.
        alternating: Whether the pulses of a vector go to one of several cells, not known which.
    """

    copies: int = 1
    one_sided: bool = False
    alternating: bool = False

    def totals(self, raising: int, lowering: int) -> tuple[int, int]:
        """SET and RESET pulses of all its cells."""
        if self.one_sided:
            return raising + lowering, 0
        return self.copies * raising, self.copies * lowering

    def cells(self, pulses: Pulses) -> list[Tensor]:
        """Pulses of each of its cells; cells that always take the same are named once."""
        return [*pulses] if self.one_sided else [pulses.set_pulses + pulses.reset_pulses]


class TrainCounter:
    """Pulses of a tile on the CPU, where aihwkit 1.2.0 counts none: drawn, exact, or means.

    Args:
        site: The tile.
        cross_point: What holds a weight.
    """

    def __init__(self, site: Site, cross_point: CrossPoint) -> None:
        # What the tile was made with: its rpu_config may have been edited since, without effect.
        made_with = cast(Any, site.tile.tile).get_meta_parameters().update
        known = {f.name: getattr(made_with, f.name) for f in fields(UpdateParameters)}
        known["pulse_type"] = PulseType(made_with.pulse_type.name)
        self._update, self._cross_point = UpdateParameters(**known), cross_point
        self._site = site

    def begin(self, update: Update, draws: Draws) -> Callable[[], Taken]:
        """Count an update from its inputs. See :meth:`PulseCounter.begin`."""
        # set_hidden_parameters may change the granularity of a tile, so it is asked each time.
        extra = update.handle.dump_extra()
        rate = extra["rpu.learning_rate"][0] / extra["rpu.bwd_alpha"][0]
        step = extra["rpu.rpu_device.weight_granularity"][0]
        trains = PulseTrains(update=self._update, granularity=step)
        taken = self._count(trains, (*update.vectors(self._site), rate), draws)
        return lambda: taken

    def _count(
        self, trains: PulseTrains, batch: tuple[Tensor, Tensor, float], draws: Draws
    ) -> Taken:
        level, generator = Level.EXACT if trains.exact else Level.SIMULATED, draws.generator()
        if draws.tracks_wear:
            pulses = trains.simulate(*batch, generator)
            totals = self._cross_point.totals(*(int(count.sum()) for count in pulses))
            return Taken(*totals, level, self._cross_point.cells(pulses))
        if draws.method == "mean" and trains.stochastic:
            rest = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            means = zip(trains.mean(*batch), rest, strict=True)
            # Rounded at random, so that on average no pulse is lost.
            totals = self._cross_point.totals(*(math.floor(mean + part) for mean, part in means))
            return Taken(*totals, Level.MEAN)
        return Taken(*self._cross_point.totals(*trains.count(*batch, generator)), level)


class CounterReader:
    """Pulses of a tile on CUDA, from aihwkit's own counters, as differences between two reads.

    The counters of aihwkit 1.2.0 have the shape ``(2 × cells of a weight, out, in)``, are
    cumulative since the tile was made, and come into being with its first update. For each cell
    there is a "positive" and a "negative" one, named by the sign of x·d: a positive pulse lowers
    the weight and is a RESET, a negative one is a SET.

    Args:
        handle: A C++ tile, or anything with its ``get_pulse_counters()``.
        whereabouts: The layer and its tile, for error messages.

    Example:
        >>> class Chip:
        ...     counters = torch.empty(0, dtype=torch.int64)
        ...
        ...     def get_pulse_counters(self):
        ...         return self.counters
        >>> chip = Chip()
        >>> reader = CounterReader(chip, "layer '0'")
        >>> chip.counters = torch.tensor([[[3, 1]], [[0, 5]]])
        >>> reader.difference()
        (5, 4)
    """

    def __init__(self, handle: Any, whereabouts: str) -> None:
        self._handle, self._whereabouts = handle, whereabouts
        self._seen = self._read()
        self._cells: list[Tensor] = []

    def begin(self, update: Update, draws: Draws) -> Callable[[], Taken]:
        """Count an update by reading afterwards. See :meth:`PulseCounter.begin`."""

        def finish() -> Taken:
            pulses = self.difference()
            return Taken(*pulses, Level.EXACT, self._cells if draws.tracks_wear else [])

        return finish

    def difference(self) -> tuple[int, int]:
        """SET and RESET pulses since the last read.

        Raises:
            StageError: There are no counters, or they went backwards.
        """
        now, before = self._read(), self._seen
        if not len(now):
            raise StageError(
                f"{self._whereabouts}: expected pulse counters after an update, got none. Set "
                "count_pulses=True on every device of the configuration before making the model."
            )
        added = now.clone()
        added[: len(before)] -= before  # a cell without a pulse so far was not listed
        set_pulses, reset_pulses = int(added[1::2].sum()), int(added[0::2].sum())
        if min(set_pulses, reset_pulses) < 0:
            raise StageError(
                f"{self._whereabouts}: expected pulse counters that grow, got {set_pulses} SET and "
                f"{reset_pulses} RESET pulses since the last read. Stop counting before a state is "
                "loaded into the tile."
            )
        self._seen, self._cells = now, [*(added[0::2] + added[1::2])]
        return set_pulses, reset_pulses

    def _read(self) -> Tensor:
        counters = self._handle.get_pulse_counters()
        if counters is None or counters.numel() == 0:
            return torch.zeros(0, 1, 1, dtype=torch.int64)
        return cast(Tensor, counters).detach().cpu().clone()


def counter_of(site: Site, *, wear: bool) -> PulseCounter | None:
    """Find out what counts the pulses of a tile.

    Args:
        site: A tile of aihwkit, and where it stands.
        wear: Whether the pulses of each cell are wanted.
    Returns:
        None for a tile that takes no pulses.
    Raises:
        UnsupportedTileError: It takes pulses that cannot be counted, or may do so.

    Example:
        >>> from aihwkit.nn import AnalogLinear
        >>> from aihwkit.simulator.configs import InferenceRPUConfig, SingleRPUConfig
        >>> for config in (SingleRPUConfig(), InferenceRPUConfig()):
        ...     layer = AnalogLinear(2, 1, rpu_config=config)
        ...     type(counter_of(Site("0", layer, layer.analog_module), wear=False)).__name__
        'TrainCounter'
        'NoneType'
    """
    tile = site.tile
    device = getattr(getattr(tile, "rpu_config", None), "device", None)
    pulsed = isinstance(tile.tile, PULSED_TILES)
    if pulsed and isinstance(device, IdealDevice | FloatingPointDevice):
        return None
    if not pulsed and isinstance(tile.tile, _WITHOUT_PULSES):
        return None
    found = _cross_point(tile, device, wear)
    if isinstance(found, str):
        raise UnsupportedTileError(
            f"layer '{site.layer}': expected a tile whose pulses can be counted, got "
            f"{type(tile).__name__} with {type(device).__name__} on {tile.device}: {found}. Call "
            "freeze_(model) if it is not to be trained in place, or use another device."
        )
    if tile.is_cuda:
        return CounterReader(tile.tile, f"layer '{site.layer}' ({type(tile).__name__})")
    return TrainCounter(site, found)


def _cpp_tiles(space: ModuleType, name: str) -> tuple[type, ...]:
    """C++ tiles of a name: on the CPU and on CUDA, in all number formats that were compiled."""
    found: tuple[type, ...] = ()
    for key, value in vars(space).items():
        if isinstance(value, ModuleType):
            found += _cpp_tiles(value, name)
        elif isinstance(value, type) and name in key:
            found += (value,)
    return found


PULSED_TILES: tuple[Any, ...] = _cpp_tiles(rpu_base.tiles, "AnalogTile")
"""aihwkit's C++ tiles that are updated by pulses."""

_WITHOUT_PULSES: tuple[Any, ...] = (
    *_cpp_tiles(rpu_base.tiles, "FloatingPointTile"),
    TorchSimulatorTile,  # weights of torch, for inference
    TransferSimulatorTile,  # made of two pulsed tiles, which are counted as such
)


def _cross_point(tile: TileModule, device: object, wear: bool) -> CrossPoint | str:
    """What holds a weight of a tile, or why its pulses cannot be counted."""
    handle: Any = tile.tile
    if not isinstance(handle, PULSED_TILES):
        return f"its simulator, {type(handle).__name__}, is unknown here"
    found = _by_device(device, on_cuda=tile.is_cuda)
    if isinstance(found, str):
        return found
    pulse_type = handle.get_meta_parameters().update.pulse_type.name
    if pulse_type in (PulseType.NONE.value, PulseType.NONE_WITH_DEVICE.value):
        return f"with pulse type {pulse_type}, aihwkit changes weights without pulses"
    if getattr(tile, "shared_weights", None) is not None:
        return "an optimiser of torch writes its shared weights, by steps that are no pulses"
    if wear and found.alternating:
        return "which cell of a weight takes a pulse is not known, and wear=True asks for it"
    return found


def _by_device(device: Any, *, on_cuda: bool) -> CrossPoint | str:
    if isinstance(device, DigitalRankUpdateCell):
        return "its pulses follow from a digital sum that aihwkit keeps to itself"
    members = device.unit_cell_devices if isinstance(device, UnitCell) else [device]
    if not members or not all(isinstance(member, PulsedDevice) for member in members):
        return "only pulsed devices and unit cells made of them are known here"
    if on_cuda and not all(member.count_pulses for member in members):
        return "count_pulses is off; it has to be on for every device when the model is made"
    if isinstance(device, TransferCompound):
        return _transfer(device, on_cuda)
    if isinstance(device, OneSidedUnitCell):
        if device.refresh_every > 0:
            return "a refresh resets and rewrites cells without a count (refresh_every)"
        # rpucuda_onesided_device.cu of 1.2.0 runs its kernels past the counters.
        return "on CUDA, aihwkit counts none of it" if on_cuda else CrossPoint(one_sided=True)
    if isinstance(device, VectorUnitCell | ReferenceUnitCell):
        return _vector(device)
    return CrossPoint() if isinstance(device, PulsedDevice) else "this unit cell is unknown here"


def _vector(device: VectorUnitCell | ReferenceUnitCell) -> CrossPoint:
    # A reference cell has two devices, whatever the length of its list.
    pair = isinstance(device, ReferenceUnitCell)
    cells = 2 if pair else len(device.unit_cell_devices)
    if device.update_policy is VectorUnitCellUpdatePolicy.ALL:
        return CrossPoint(copies=cells)
    fixed = device.update_policy is VectorUnitCellUpdatePolicy.SINGLE_FIXED
    return CrossPoint(alternating=not fixed and cells > 1)


def _transfer(device: TransferCompound, on_cuda: bool) -> CrossPoint | str:
    if not on_cuda:
        return "the pulses of its transfers follow from weights that aihwkit keeps to itself"
    if type(device) not in (TransferCompound, BufferedTransferCompound):
        return "aihwkit's counters do not tell SET from RESET behind a chopper"
    if device.with_reset_prob > 0.0:
        return "columns are reset without a count (with_reset_prob)"
    return CrossPoint()


def _rows(value: Tensor, transposed: bool) -> Tensor:
    return value.flatten(1).T if transposed else value.reshape(-1, value.shape[-1])


def _patches(images: Tensor, indices: Tensor) -> Tensor:
    """Inputs of each position of a convolution, by aihwkit's index matrix ``(in, positions)``.

    Index 0 stands for padding, 1 for the bias, and from 2 on for the values of an image.
    """
    flat = images.flatten(1)
    padded = torch.cat([flat.new_zeros(len(flat), 1), flat.new_ones(len(flat), 1), flat], 1)
    return padded[:, indices].mT.flatten(0, 1)
