"""How weights become conductances: one cell around an offset, or pairs of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from aihwkit.inference.converter.base import BaseConductanceConverter
from aihwkit.inference.converter.conductance import (
    NPairConductanceConverter,
    SinglePairConductanceConverter,
)
from torch import Tensor

from aihwkit_lora.errors import ConductanceWindowError, ConfigurationError

_MICRO = 1e6


@dataclass(frozen=True, kw_only=True)
class ConductanceMapping:
    """The cells of a weight, and the window of conductances that their positions span.

    A cell's *position* in the window runs from -1 (``g_min_siemens``) to 1 (``g_max_siemens``).

    ``pairs=0``: single-ended. One cell around an offset, at the position w; a digital subtraction
    of ``middle · Σx`` takes the offset out again (code of arXiv:2601.10037: G = 50 + 30·w/max|w|
    µS). ``pairs=1``: a differential pair, ``w ∝ G₊ - G₋``; the cell on the other side of the sign
    stays at the window's lower end. ``pairs=2`` and more: pairs of equal significance, of which the
    next is used once the one before is full, as in aihwkit's ``NPairConductanceConverter``.

    Args:
        g_min_siemens: Lower end of the window, 0 or more.
        g_max_siemens: Upper end of the window, above ``g_min_siemens``.
        pairs: Differential pairs per weight; 0 for a single cell around an offset.
    Raises:
        ConductanceWindowError: The window is empty, inverted or negative.
        ConfigurationError: The number of pairs is negative.

    Example:
        >>> window = ConductanceMapping(g_min_siemens=20e-6, g_max_siemens=80e-6)
        >>> round(window.middle_siemens * 1e6), round(window.half_width_siemens * 1e6)
        (50, 30)
        >>> pair = ConductanceMapping(g_min_siemens=0.0, g_max_siemens=40e-6, pairs=1)
        >>> pair.positions(torch.tensor([0.5, -1.0])).tolist()
        [[0.0, -1.0], [-1.0, 1.0]]
    """

    g_min_siemens: float
    g_max_siemens: float
    pairs: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.g_min_siemens < self.g_max_siemens:
            raise ConductanceWindowError(
                "conductance window: expected 0 <= g_min_siemens < g_max_siemens, got "
                f"{self.g_min_siemens * 1e6:g} µS to {self.g_max_siemens * 1e6:g} µS. "
                "Swap or correct the two."
            )
        if self.pairs < 0:
            raise ConfigurationError(
                f"conductance mapping: expected pairs of 0 or more, got {self.pairs}. Give 0 for "
                "one cell around an offset, 1 for a differential pair."
            )

    @property
    def cells_per_weight(self) -> int:
        """Cells that store one weight."""
        return 2 * self.pairs or 1

    @property
    def middle_siemens(self) -> float:
        """Conductance halfway between the ends of the window."""
        return 0.5 * (self.g_min_siemens + self.g_max_siemens)

    @property
    def half_width_siemens(self) -> float:
        """Conductance between the middle and an end of the window."""
        return 0.5 * (self.g_max_siemens - self.g_min_siemens)

    @property
    def weight_per_position(self) -> float:
        """Change of the weight when one of its cells moves by one unit of position."""
        return 1.0 / self.cells_per_weight

    def single_ended(self) -> ConductanceMapping:
        """The same window with one cell per weight."""
        return ConductanceMapping(
            g_min_siemens=self.g_min_siemens, g_max_siemens=self.g_max_siemens
        )

    def positions(self, weight: Tensor) -> Tensor:
        """Where the cells of normalised weights belong.

        Args:
            weight: Normalised weights of any shape; -1 to 1 fills the window.
        Returns:
            Shape ``(cells_per_weight, *weight.shape)``; plus and minus cells in turn.
        """
        if self.pairs == 0:
            return weight[None]
        filled = torch.stack([weight, -weight]).clamp(min=0.0) * self.pairs
        parts = [(filled - pair).clamp(0.0, 1.0) for pair in range(self.pairs)]
        return 2.0 * torch.cat(parts) - 1.0

    def weights(self, positions: Tensor) -> Tensor:
        """Undo :meth:`positions`, for cells anywhere in the window.

        Args:
            positions: Shape ``(cells_per_weight, ...)``.
        """
        if self.pairs == 0:
            return positions[0]
        return (positions[0::2] - positions[1::2]).sum(0) * self.weight_per_position

    def to_siemens(self, positions: Tensor) -> Tensor:
        """Conductance of cells, same shape, in siemens.

        Args:
            positions: Positions in the window; -1 to 1 fills it.
        """
        return self.middle_siemens + self.half_width_siemens * positions

    def to_positions(self, siemens: Tensor) -> Tensor:
        """Undo :meth:`to_siemens`.

        Args:
            siemens: Conductances of any shape.
        """
        return (siemens - self.middle_siemens) / self.half_width_siemens

    def converter(self) -> BaseConductanceConverter:
        """Make aihwkit's converter of this mapping, for its noise models.

        Returns:
            ``SinglePairConductanceConverter`` or ``NPairConductanceConverter`` of aihwkit for
            pairs. aihwkit has none for a single cell around a fixed offset, so that one is ours.
        """
        g_max, g_min = self.g_max_siemens * _MICRO, self.g_min_siemens * _MICRO
        if self.pairs == 0:
            return OffsetConverter(self)
        if self.pairs == 1:
            return SinglePairConductanceConverter(g_max=g_max, g_min=g_min)
        return NPairConductanceConverter([1.0] * self.pairs, g_max=g_max, g_min=g_min)

    def require_fits(self, weight: Tensor, layer: str) -> None:
        """Check that every weight has a conductance within the window.

        Args:
            weight: Normalised weights of any shape.
            layer: Full name of the layer, for the error message.
        Raises:
            ConductanceWindowError: A weight is beyond -1 to 1, or not a number.
        """
        if weight.numel() == 0:
            return
        lowest, highest = float(weight.min()), float(weight.max())
        # One part in a million: aihwkit's scaling divides and multiplies in float32.
        if lowest >= -1.000001 and highest <= 1.000001:
            return
        raise ConductanceWindowError(
            f"layer '{layer}': expected normalised weights from -1 to 1, which fill the window of "
            f"{self.g_min_siemens * 1e6:g} to {self.g_max_siemens * 1e6:g} µS, got {lowest:.3g} "
            f"to {highest:.3g}. Call the layer's remap_analog_weights(), or convert with "
            "rpu_config.mapping.weight_scaling_omega = 1.0."
        )


class OffsetConverter(BaseConductanceConverter):
    """One cell per weight around a fixed offset, for aihwkit's noise models.

    aihwkit's ``SingleDeviceConductanceConverter`` moves the offset with the smallest and largest
    weight of each call; on a chip it is fixed.

    Args:
        mapping: The window.

    Example:
        >>> window = ConductanceMapping(g_min_siemens=20e-6, g_max_siemens=80e-6)
        >>> cells, params = window.converter().convert_to_conductances(torch.tensor([-1.0, 0.5]))
        >>> cells[0]
        tensor([20., 65.])
        >>> window.converter().convert_back_to_weights(cells, params)
        tensor([-1.0000,  0.5000])
    """

    def __init__(self, mapping: ConductanceMapping) -> None:
        self.mapping = mapping
        self.g_max, self.g_min = mapping.g_max_siemens * _MICRO, mapping.g_min_siemens * _MICRO

    def __str__(self) -> str:
        return f"OffsetConverter(g_max={self.g_max:.2f}, g_min={self.g_min:.2f})"

    def convert_to_conductances(self, weights: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
        """Conductances in µS, in a list of one."""
        return [self.mapping.to_siemens(weights) * _MICRO], {}

    def convert_back_to_weights(self, conductances: list[Tensor], params: dict[str, Any]) -> Tensor:
        """Normalised weights."""
        return self.mapping.to_positions(conductances[0] / _MICRO)


@dataclass(frozen=True, kw_only=True)
class CellEncoding:
    """Between normalised weights and the states of the cells that store them.

    A *cell state* is aihwkit's normalised conductance of a pulsed device.

    Args:
        mapping: Which cells a weight has, and their window.
        states: Cell states that stand for the window's lower and upper end, in this order.
    Raises:
        ConfigurationError: The states are not in order.

    Example:
        >>> window = ConductanceMapping(g_min_siemens=20e-6, g_max_siemens=80e-6)
        >>> encoding = CellEncoding(mapping=window, states=(-0.6, 0.6))
        >>> encoding.to_states(torch.tensor([0.5, -1.0])).tolist()[0]
        [0.30000001192092896, -0.6000000238418579]
        >>> f"{encoding.siemens_per_state * 1e6:.0f} µS"
        '50 µS'
    """

    mapping: ConductanceMapping
    states: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.states
        if not low < high:
            raise ConfigurationError(
                f"cell encoding: expected the cell state of the window's lower end below that of "
                f"the upper end, got {self.states}. Swap or correct the two."
            )

    @property
    def _middle(self) -> float:
        return 0.5 * (self.states[0] + self.states[1])

    @property
    def _half_width(self) -> float:
        return 0.5 * (self.states[1] - self.states[0])

    @property
    def siemens_per_state(self) -> float:
        """Conductance of one unit of cell state."""
        return self.mapping.half_width_siemens / self._half_width

    @property
    def weight_per_state(self) -> float:
        """Change of the weight when one of its cells moves by one unit of state."""
        return self.mapping.weight_per_position / self._half_width

    def weight_tolerance(self, tolerance: float) -> float:
        """How far a weight may be off if each of its cells may, each in its own direction.

        Args:
            tolerance: Accepted error of a cell, in cell-state units.
        """
        return tolerance * self.weight_per_state * self.mapping.cells_per_weight

    def to_states(self, weight: Tensor) -> Tensor:
        """Cell states that stand for normalised weights.

        Args:
            weight: Normalised weights, shape ``(out_size, rows)``.
        Returns:
            Shape ``(cells_per_weight, out_size, rows)``.
        """
        return self._middle + self._half_width * self.mapping.positions(weight)

    def to_weights(self, states: Tensor) -> Tensor:
        """Normalised weights that cells stand for, shape ``(out_size, rows)``.

        Args:
            states: Cell states, shape ``(cells_per_weight, out_size, rows)``.
        """
        return self.mapping.weights(self._to_positions(states))

    def to_siemens(self, states: Tensor) -> Tensor:
        """Conductances of cells, same shape, in siemens.

        Args:
            states: Cell states of any shape.
        """
        return self.mapping.to_siemens(self._to_positions(states))

    def from_siemens(self, siemens: Tensor) -> Tensor:
        """Undo :meth:`to_siemens`.

        Args:
            siemens: Conductances of any shape.
        """
        return self._middle + self._half_width * self.mapping.to_positions(siemens)

    def _to_positions(self, states: Tensor) -> Tensor:
        return (states - self._middle) / self._half_width
