"""The cells of one array as aihwkit's pulsed devices: their state, and how pulses move it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from aihwkit.simulator.configs.devices import PulsedDevice
from torch import Generator, Tensor

from aihwkit_lora.errors import UnsupportedTileError
from aihwkit_lora.programming.devices import (
    COMMON,
    draw_parameters,
    model_of,
    normal,
    resolved,
)


@dataclass(frozen=True, eq=False)
class CellState:
    """Where the cells of an array stand: what pulses act on, and what a read sees.

    aihwkit's devices separate the two when they have write noise: a pulse moves the *persistent*
    weight, and the *apparent* one is that plus a noise drawn at the pulse. The noise then stays
    until the cell is pulsed again, so averaging several reads does not remove it.

    Attributes:
        persistent: Hidden weight, in conductance units (-1 to 1 is the device's nominal range).
        apparent: Weight that reads and matrix-vector products see, same shape and units.
    """

    persistent: Tensor
    apparent: Tensor

    @classmethod
    def from_tile(cls, tile: Any) -> CellState:
        """Copy the state of an aihwkit pulsed tile.

        Args:
            tile: A tile of an ``RPUConfig`` with a single pulsed device.
        Example:
            >>> from aihwkit.simulator.configs import SingleRPUConfig
            >>> from aihwkit.simulator.presets.devices import ReRamESPresetDevice
            >>> from aihwkit.simulator.tiles import AnalogTile
            >>> tile = AnalogTile(2, 3, SingleRPUConfig(device=ReRamESPresetDevice()))
            >>> CellState.from_tile(tile).apparent.shape
            torch.Size([2, 3])
        """
        apparent = tile.tile.get_weights().detach().clone()
        hidden = tile.get_hidden_parameters().get("persistent_weights")
        return cls(persistent=apparent if hidden is None else hidden, apparent=apparent)

    def select(self, index: Tensor) -> CellState:
        """The state of some of the cells, as a flat array.

        Args:
            index: Boolean mask of the array's shape, or indices of a flat array.
        """
        return CellState(_select(self.persistent, index), _select(self.apparent, index))

    def flat(self) -> CellState:
        """The same cells as a flat array."""
        return CellState(self.persistent.flatten(), self.apparent.flatten())

    def span(self, first: int, end: int) -> CellState:
        """Neighbouring cells of a flat array, without a copy."""
        return CellState(self.persistent[first:end], self.apparent[first:end])


@dataclass(frozen=True, eq=False)
class PulseResponse:
    """The cells of one array: their device, and what sets each one apart from the others.

    Make one with :meth:`draw` (new cells) or :meth:`from_tile` (the cells of an existing tile).

    Attributes:
        device: aihwkit's description of the device, common to all cells.
        parameters: Device-to-device parameters by aihwkit's hidden-parameter name, one value per
            cell.
        abrupt_reset: Whether one RESET pulse takes a cell all the way back to its reset state, as
            melt-quenching does in phase-change memory, instead of one step down.
    """

    device: PulsedDevice
    parameters: Mapping[str, Tensor]
    abrupt_reset: bool = False

    @classmethod
    def draw(
        cls,
        device: PulsedDevice,
        shape: tuple[int, ...],
        generator: Generator,
        *,
        abrupt_reset: bool = False,
    ) -> PulseResponse:
        """Draw the cells of a new array.

        Args:
            device: One of aihwkit's pulsed devices or presets.
            shape: Shape of the array, for example ``(out_features, in_features)``.
            generator: Source of randomness; the cells live on its device.
            abrupt_reset: See the class.
        Raises:
            UnsupportedTileError: There is no update rule for this device.

        Example:
            >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
            >>> seeded = Generator().manual_seed(0)
            >>> cells = PulseResponse.draw(ReRamArrayOMPresetDevice(), (4, 5), seeded)
            >>> fresh = cells.fresh(seeded)
            >>> after = cells.pulse(fresh, torch.ones(4, 5, dtype=torch.bool), seeded)
            >>> bool(after.persistent.mean() > fresh.persistent.mean())
            True
        """
        parameters = draw_parameters(device, shape, generator)
        return cls(resolved(device), parameters, abrupt_reset)

    @classmethod
    def from_tile(cls, tile: Any) -> PulseResponse:
        """Take over the cells of an aihwkit pulsed tile, each with its own parameters.

        Args:
            tile: A tile of an ``RPUConfig`` with a single pulsed device, for example an
                ``AnalogTile`` of a ``SingleRPUConfig``.
        Raises:
            UnsupportedTileError: The tile has no pulsed device, or one without an update rule.

        Example:
            >>> from aihwkit.simulator.configs import SingleRPUConfig
            >>> from aihwkit.simulator.presets.devices import ReRamESPresetDevice
            >>> from aihwkit.simulator.tiles import AnalogTile
            >>> tile = AnalogTile(2, 3, SingleRPUConfig(device=ReRamESPresetDevice()))
            >>> PulseResponse.from_tile(tile).shape
            torch.Size([2, 3])
        """
        device = getattr(tile.rpu_config, "device", None)
        if not isinstance(device, PulsedDevice):
            raise UnsupportedTileError(
                f"expected a tile with a single pulsed device, got {type(tile).__name__} with "
                f"{type(tile.rpu_config).__name__} and device {type(device).__name__}. "
                "Draw new cells with PulseResponse.draw(device, shape, generator)."
            )
        names = (*COMMON, *model_of(device).names)
        hidden = tile.get_hidden_parameters()
        return cls(resolved(device), {name: hidden[name] for name in names})

    @property
    def shape(self) -> torch.Size:
        """Shape of the array."""
        return self.parameters["max_bound"].shape

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest persistent weight that pulses can reach, per cell."""
        reference = self.parameters.get("reference", 0.0)
        return self.parameters["min_bound"] - reference, self.parameters["max_bound"] - reference

    def select(self, index: Tensor) -> PulseResponse:
        """Some of the cells, as a flat array.

        Args:
            index: Boolean mask of the array's shape, or indices of a flat array.
        """
        chosen = {name: _select(value, index) for name, value in self.parameters.items()}
        return replace(self, parameters=chosen)

    def flat(self) -> PulseResponse:
        """The same cells as a flat array."""
        return replace(self, parameters={k: v.flatten() for k, v in self.parameters.items()})

    def span(self, first: int, end: int) -> PulseResponse:
        """Neighbouring cells of a flat array, without a copy."""
        return replace(self, parameters={k: v[first:end] for k, v in self.parameters.items()})

    def fresh(self, generator: Generator) -> CellState:
        """Reset every cell: the device's ``reset`` value with its spreads, and write noise.

        Args:
            generator: Source of randomness.
        Returns:
            State of the array after aihwkit's reset, around weight 0 for most devices. (A chip's
            first forming and reset are not part of write–verify, and no pulses are counted.)
        """
        return self._settled(self._reset(generator), generator)

    def hold(self, weight: Tensor, generator: Generator) -> CellState:
        """Cells that hold given weights, as aihwkit's ``set_weights`` would leave them.

        Args:
            weight: Conductance units, shape of the array. Clipped to each cell's bounds, before
                a reference is subtracted, as aihwkit 1.2.0 does.
            generator: Source of the write noise.
        """
        persistent = weight.clamp(self.parameters["min_bound"], self.parameters["max_bound"])
        if not getattr(self.device, "apply_write_noise_on_set", True):
            return CellState(persistent, persistent)
        return self._settled(persistent, generator)

    def pulse(
        self,
        state: CellState,
        up: Tensor,
        generator: Generator,
        *,
        strength: Tensor | float = 1.0,
    ) -> CellState:
        """Apply one pulse to every cell. To pulse some cells only, :meth:`select` them first.

        Args:
            state: State of the cells, in the shape of the array.
            up: Polarity per cell, boolean: True for SET (towards higher conductance), False for
                RESET.
            generator: Source of cycle-to-cycle and write noise.
            strength: Factor on the step that an identical pulse would have caused, for example
                from a ramp of the pulse's amplitude.
        Returns:
            The new state.
        """
        reference = self.parameters.get("reference", 0.0)
        model = model_of(self.device)
        weight = state.persistent + reference
        noise = normal(weight, generator)
        change = model.step(self.device, self.parameters, weight, up, noise) * strength
        lower, upper = self.parameters["min_bound"], self.parameters["max_bound"]
        persistent = (weight + change).clamp(lower, upper) - reference
        if self.abrupt_reset:
            persistent = torch.where(up, persistent, self._reset(generator))
        settled = self._settled(persistent, generator)
        if not model.inert_when_corrupt:
            return settled
        alive = upper > lower
        return CellState(
            torch.where(alive, settled.persistent, state.persistent),
            torch.where(alive, settled.apparent, state.apparent),
        )

    def _reset(self, generator: Generator) -> Tensor:
        bias = self.parameters["reset_bias"]
        spread: Tensor = bias + self.device.reset_std * normal(bias, generator)
        return spread.clamp(self.parameters["min_bound"], self.parameters["max_bound"])

    def _settled(self, persistent: Tensor, generator: Generator) -> CellState:
        """Draw the write noise that stays with the cells until their next pulse."""
        # aihwkit gives write noise as a multiple of dw_min (getScaledWriteNoise).
        std = getattr(self.device, "write_noise_std", 0.0) * self.device.dw_min
        if std <= 0.0:
            return CellState(persistent, persistent)
        return CellState(persistent, persistent + std * normal(persistent, generator))


def _select(values: Tensor, index: Tensor) -> Tensor:
    # In torch 2.15, index_select takes an eighth of the time of indexing, and does not start
    # threads for a few thousand cells.
    if index.dtype == torch.bool:
        index = index.flatten().nonzero().squeeze(1)
    return values.flatten().index_select(0, index)
