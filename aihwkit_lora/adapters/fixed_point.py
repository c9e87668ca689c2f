"""Fixed point: numbers on power-of-two grids, and layers that compute with them exactly.

A fixed-point tensor is ``code * 2**e`` with integer codes of ``bits`` bits, symmetric around zero.
Such numbers, their products and the sums of these are exact in 64-bit floats as long as they span
at most 53 bits, which 16-bit codes do for up to 2²³ inputs. So nothing here needs integers to be
equal, bit for bit, to hardware that has nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aihwkit_lora.adapters.digital_unit import DigitalUnit


def fixed_point(x: Tensor, bits: int, dims: tuple[int, ...] | None = None) -> Tensor:
    """Round to the nearest fixed-point number; gradients pass straight through.

    The grid is the finest whose largest code, ``2**(bits - 1) - 1``, reaches the largest magnitude,
    so nothing is clipped. Halves go to the even code.

    Args:
        x: Any shape.
        bits: Width of a code, sign included, 2 to 16.
        dims: What shares one grid; everything if None.
    Returns:
        64-bit floats in the shape of ``x``. Not a number where ``x`` is not finite.

    Example:
        >>> fixed_point(torch.tensor([0.9, -0.3, 7.0]), bits=4).tolist()
        [1.0, 0.0, 7.0]
    """
    wide = x.double()
    held = wide.detach()
    step = _step(held, bits, tuple(range(x.dim())) if dims is None else dims)
    # The difference is zero, and carries the gradient.
    return (held / step).round() * step + (wide - held)


def _step(x: Tensor, bits: int, dims: tuple[int, ...]) -> Tensor:
    peak = x.abs().amax(dims, keepdim=True)
    peak = torch.where(peak == 0, 1.0, peak)
    codes = 2 ** (bits - 1)
    mantissa = torch.frexp(peak).mantissa  # peak = mantissa * 2**k, with 0.5 <= mantissa < 1
    step = peak / mantissa / codes  # a power of two, without a rounded logarithm
    return torch.where(mantissa * codes > codes - 1, 2.0 * step, step)


class OnUnit(nn.Module):
    """A layer that the digital unit executes: weights, inputs and outputs in fixed point.

    Its ``weight`` stays what the optimiser trains, a float; what the unit holds is rounded from it
    whenever the layer runs. Weights share one grid, every input and output vector (every image of
    a convolution) has its own, and the sums in between are exact.
    """

    unit: DigitalUnit
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in fixed point.

        Args:
            x: As the layer without a unit takes it.
        """
        bits = self.unit.bits
        if bits is None:
            y: Tensor = super().forward(x)
            return y
        inputs, bias = fixed_point(x, bits, self._vector(x)), self._parameters["bias"]
        held = None if bias is None else fixed_point(bias, bits)
        with torch.autocast(x.device.type, enabled=False):
            sums = self._product(inputs, fixed_point(self.weight, bits), held)
        return fixed_point(sums, bits, self._vector(sums)).to(self.weight.dtype)

    def _vector(self, x: Tensor) -> tuple[int, ...]:
        """Dimensions of ``x`` that share one grid."""
        raise NotImplementedError

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Let ``weight`` be, inside the block, what the unit holds."""
        master = self._parameters["weight"]
        if self.unit.bits is None or master is None:
            yield
            return
        held: Any = fixed_point(master, self.unit.bits).to(master.dtype)
        self._parameters["weight"] = held
        try:
            yield
        finally:
            self._parameters["weight"] = master

    @property
    def mac_event(self) -> str:
        """Under which name its multiply–accumulates are counted."""
        if self.unit.bits is None:
            return "forward_macs"
        return "forward_macs_int8" if self.unit.bits <= 8 else "forward_macs_int16"

    def memory_traffic(self, x: Tensor, y: Tensor) -> dict[str, int]:
        """Count the bits that a pass moves between SRAM and multipliers.

        Args:
            x: Input of the layer.
            y: Its output.
        """
        vectors = y.numel() // self.weight.shape[0]
        fetches = vectors if self.unit.reuse == "none" else min(vectors, 1)
        weights = sum(parameter.numel() for parameter in self.parameters())
        width = self.unit.stored_bits
        return {
            "sram_read_bits": (weights * fetches + x.numel()) * width,
            "sram_write_bits": y.numel() * width,
        }


class DigitalLinear(OnUnit, nn.Linear):
    """A linear layer on the digital unit."""

    def _vector(self, x: Tensor) -> tuple[int, ...]:
        return (-1,)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)


class _DigitalConv(OnUnit, nn.modules.conv._ConvNd):
    def _vector(self, x: Tensor) -> tuple[int, ...]:
        batched = x.dim() == self.weight.dim()
        return tuple(range(int(batched), x.dim()))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


class DigitalConv1d(_DigitalConv, nn.Conv1d):
    """A one-dimensional convolution on the digital unit."""


class DigitalConv2d(_DigitalConv, nn.Conv2d):
    """A two-dimensional convolution on the digital unit."""


class DigitalConv3d(_DigitalConv, nn.Conv3d):
    """A three-dimensional convolution on the digital unit."""


ON_UNIT: dict[type[nn.Module], type[OnUnit]] = {
    nn.Linear: DigitalLinear,
    nn.Conv1d: DigitalConv1d,
    nn.Conv2d: DigitalConv2d,
    nn.Conv3d: DigitalConv3d,
}
"""What a layer becomes on the unit, by its exact class: a subclass may compute anything."""
