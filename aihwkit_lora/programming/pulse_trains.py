"""How many pulses an update of a pulsed tile takes: trains on the lines, coincidences at the cells.

aihwkit 1.2.0 turns the outer product of an input vector x and a gradient vector d into trains of
pulses, one on each row and one on each column. A cell moves by one step whenever its row and its
column pulse at once. The rules here follow its C++ source (``rpu_pulsed_meta_parameter.cpp``,
``sparse_bit_line_maker.cpp``, ``dense_bit_line_maker.cpp``), in 32-bit floats as there, so that
deterministic trains come out equal and stochastic ones alike in law.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from aihwkit.simulator.parameters.enums import PulseType
from aihwkit.simulator.parameters.training import UpdateParameters
from numpy.typing import NDArray
from torch import Generator, Tensor

from aihwkit_lora.errors import ConfigurationError, UnsupportedTileError

_Floats = NDArray[np.float32]
_Whole = NDArray[np.int64]

_STOCHASTIC = (PulseType.STOCHASTIC_COMPRESSED, PulseType.STOCHASTIC)
_DETERMINISTIC = (PulseType.MEAN_COUNT, PulseType.DETERMINISTIC_IMPLICIT)
_ELEMENTS = 2**22
"""Numbers that are held at a time, to bound the memory."""


class Pulses(NamedTuple):
    """Pulses at each cross-point, shapes ``(out, in)``: whole numbers, or means as doubles."""

    set_pulses: Tensor
    reset_pulses: Tensor


class PulseTotals(NamedTuple):
    """Pulses at all cross-points together."""

    set_pulses: int
    reset_pulses: int


class _Lines(NamedTuple):
    """What a batch puts on the lines, scaled."""

    length: Tensor  # of the train of each vector
    x: Tensor  # size of each input, as a probability or a fraction of the train
    d: Tensor  # the same for gradients


@dataclass(frozen=True, kw_only=True)
class PulseTrains:
    """The pulse trains of one tile.

    A product x·d above zero lowers the weight (RESET), one below zero raises it (SET).

    Args:
        update: aihwkit's settings: type and length of the trains, and how both are managed.
        granularity: Mean change of a weight by one pulse, in weight units: what aihwkit calls the
            weight granularity of the device, usually ``dw_min``.
    Raises:
        UnsupportedTileError: With this pulse type, aihwkit changes weights without any pulse.
        ConfigurationError: The granularity is not positive, or a train would have no pulse.

    Example:
        >>> update = UpdateParameters(desired_bl=10, pulse_type=PulseType.DETERMINISTIC_IMPLICIT)
        >>> trains = PulseTrains(update=update, granularity=0.001)
        >>> x, d = torch.tensor([[1.0, -0.5, 0.0]]), torch.tensor([[1.0]])
        >>> trains.count(x, d, 0.004, Generator())
        PulseTotals(set_pulses=2, reset_pulses=4)
        >>> trains.count(x, d, 4.0, Generator())  # ten pulses are all that a train has
        PulseTotals(set_pulses=5, reset_pulses=10)
    """

    update: UpdateParameters
    granularity: float

    def __post_init__(self) -> None:
        if self.update.pulse_type not in (*_STOCHASTIC, *_DETERMINISTIC):
            raise UnsupportedTileError(
                f"update.pulse_type: expected trains of pulses, got {self.update.pulse_type.name}, "
                "with which aihwkit changes weights without any. Use STOCHASTIC_COMPRESSED."
            )
        if not self.granularity > 0.0:
            raise ConfigurationError(
                f"granularity: expected a step above 0, got {self.granularity!r}."
            )
        if self.update.desired_bl < 1:
            raise ConfigurationError(
                "update.desired_bl: expected trains of at least 1 pulse, got "
                f"{self.update.desired_bl}."
            )

    @property
    def stochastic(self) -> bool:
        """Whether each pulse of a train is drawn, so that a mean has a closed form."""
        return self.update.pulse_type in _STOCHASTIC

    @property
    def exact(self) -> bool:
        """Whether the same inputs always give the same pulses."""
        return not self.stochastic and not (self.update.sto_round and max(self._resolutions) > 0.0)

    def lengths(self, x: Tensor, d: Tensor, learning_rate: float) -> Tensor:
        """Length of the train of each vector.

        Args:
            x: Inputs, shape ``(vectors, in)``.
            d: Gradients of the outputs, shape ``(vectors, out)``.
            learning_rate: As set on the tile, 0 or more.
        Returns:
            Whole numbers of 0 or more, shape ``(vectors,)``.

        Example:
            >>> trains = PulseTrains(update=UpdateParameters(), granularity=0.001)
            >>> x, d = torch.tensor([[1.0], [0.2], [0.0]]), torch.ones(3, 1)
            >>> trains.lengths(x, d, 0.01), trains.lengths(x, d, 1.0)
            (tensor([10,  2,  0]), tensor([31, 31,  0]))
        """
        return self._lines(x, d, learning_rate).length

    def count(
        self, x: Tensor, d: Tensor, learning_rate: float, generator: Generator
    ) -> PulseTotals:
        """Draw the trains of a batch and count the pulses at all cross-points together.

        Args:
            x: Inputs, shape ``(vectors, in)``, a row of ones for an analogue bias included.
            d: Gradients of the outputs, shape ``(vectors, out)``.
            learning_rate: As set on the tile, 0 or more.
            generator: Source of randomness, on the device of the inputs.
        Returns:
            Whole numbers. With the same generator, the sums of what :meth:`simulate` gives.
        Raises:
            ConfigurationError: The learning rate is negative, or x and d have shapes that do not
                go together.
        """
        both = net = 0
        if not self.stochastic:
            for product in self._products(x, d, learning_rate, generator):
                both += int(product.abs().sum(dtype=torch.float64))
                net += int(product.sum(dtype=torch.float64))
            return _total(both, net)
        ins = x.shape[1]
        for hit, negative in self._trains(x, d, learning_rate, generator):
            down = hit & negative
            all_x, all_d = hit[:, :ins].sum(1), hit[:, ins:].sum(1)
            net_x, net_d = all_x - 2 * down[:, :ins].sum(1), all_d - 2 * down[:, ins:].sum(1)
            both += int((all_x * all_d).sum())
            net += int((net_x * net_d).sum())
        return _total(both, net)

    def simulate(self, x: Tensor, d: Tensor, learning_rate: float, generator: Generator) -> Pulses:
        """Draw the trains of a batch and count the pulses at each cross-point.

        Args:
            x: See :meth:`count`.
            d: See :meth:`count`.
            learning_rate: See :meth:`count`.
            generator: See :meth:`count`.
        Raises:
            ConfigurationError: The learning rate is negative, or x and d have shapes that do not
                go together.

        Example:
            >>> update = UpdateParameters(pulse_type=PulseType.MEAN_COUNT)
            >>> trains = PulseTrains(update=update, granularity=0.01)
            >>> x, d = torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0], [-1.0]]).T
            >>> trains.simulate(x, d, 0.1, Generator()).set_pulses
            tensor([[ 0,  0],
                    [10,  5]])
        """
        both = torch.zeros(d.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        net = both.clone()
        if not self.stochastic:
            for product in self._products(x, d, learning_rate, generator):
                both += product.abs().sum(0)
                net += product.sum(0)
            return _pulses(both.long(), net.long())
        ins = x.shape[1]
        for hit, negative in self._trains(x, d, learning_rate, generator):
            pulse = hit.float()  # sums of ones are exact up to 2²⁴, and a chunk has fewer vectors
            both += pulse[:, ins:].T @ pulse[:, :ins]
            pulse[negative] *= -1.0
            net += pulse[:, ins:].T @ pulse[:, :ins]
        return _pulses(both.long(), net.long())

    def expect(self, x: Tensor, d: Tensor, learning_rate: float) -> Pulses:
        """Mean pulses at each cross-point over all stochastic trains that a batch may cause.

        Args:
            x: Inputs, shape ``(vectors, in)``, a row of ones for an analogue bias included.
            d: Gradients of the outputs, shape ``(vectors, out)``.
            learning_rate: As set on the tile, 0 or more.
        Raises:
            ConfigurationError: The trains are not stochastic, the learning rate is negative, or x
                and d have shapes that do not go together.

        Example:
            >>> trains = PulseTrains(update=UpdateParameters(desired_bl=4), granularity=0.001)
            >>> x, d = torch.tensor([[1.0, 0.5]]), torch.tensor([[-1.0]])
            >>> trains.expect(x, d, 9.0).set_pulses
            tensor([[4., 2.]], dtype=torch.float64)
        """
        lines = self._means(x, d, learning_rate)
        some_x, some_d = lines.x.double(), lines.d.double() * lines.length[:, None]
        net = torch.copysign(some_d, d.double()).T @ torch.copysign(some_x, x.double())
        return _pulses(some_d.T @ some_x, net)

    def mean(self, x: Tensor, d: Tensor, learning_rate: float) -> tuple[float, float]:
        """Sums of what :meth:`expect` gives, SET and RESET, at the cost of two sums per vector.

        Args:
            x: See :meth:`expect`.
            d: See :meth:`expect`.
            learning_rate: See :meth:`expect`.
        Raises:
            ConfigurationError: See :meth:`expect`.

        Example:
            >>> trains = PulseTrains(update=UpdateParameters(desired_bl=4), granularity=0.001)
            >>> x, d = torch.tensor([[1.0, 0.5]]), torch.tensor([[-1.0]])
            >>> trains.mean(x, d, 9.0)
            (6.0, 0.0)
        """
        lines = self._means(x, d, learning_rate)
        both = net = lines.length.double()
        for size, value in ((lines.x, x), (lines.d, d)):
            both = both * size.sum(1)
            net = net * torch.copysign(size, value.float()).sum(1)
        total, more = float(both.sum()), float(net.sum())
        return (total - more) / 2, (total + more) / 2

    @property
    def _resolutions(self) -> tuple[float, float]:
        """Steps of a scaled input and a scaled gradient; 0 and below for any value."""
        if self.update.pulse_type is PulseType.DETERMINISTIC_IMPLICIT:
            return self.update.x_res_implicit, self.update.d_res_implicit
        return self.update.res, self.update.res

    def _lines(self, x: Tensor, d: Tensor, learning_rate: float) -> _Lines:
        """Scale a batch for the lines, before it is discretised."""
        _require_update(x, d, learning_rate)
        sizes = [value.float().abs() for value in (x, d)]
        # A few numbers for each vector, on which numpy takes a third of the time of torch.
        x_max, d_max = (size.amax(1).cpu().numpy() for size in sizes)
        with np.errstate(all="ignore"):
            length, *scales = self._scaling(x_max, d_max, np.float32(learning_rate))
        for size, scale in zip(sizes, scales, strict=True):
            size *= torch.from_numpy(scale).to(x.device)[:, None]
        return _Lines(torch.from_numpy(length).to(x.device), *sizes)

    def _scaling(
        self, x_max: _Floats, d_max: _Floats, lr: np.float32
    ) -> tuple[_Whole, _Floats, _Floats]:
        """Length of each train, and the factors that make probabilities of x and of d.

        ``performUpdateManagement`` of aihwkit 1.2.0, one entry for each vector.
        """
        up, step = self.update, np.float32(self.granularity)
        most = np.float32(up.desired_bl)
        managed = up.update_management or up.update_bl_management
        d_scaled = np.float32(up.um_grad_scale) * d_max
        needed = lr * x_max * d_scaled / step
        length = np.full_like(x_max, most)
        if up.update_bl_management:
            length = np.minimum(np.ceil(needed), most)
        for_x = for_d = np.sqrt(lr / (step * length))
        if not (up.fixed_bl or up.update_bl_management) and step * most < lr:
            length[:], for_x, for_d = np.ceil(lr / step), np.ones_like(x_max), np.ones_like(x_max)
        if managed:
            d_scaled = np.where(needed > most, d_scaled * (most / needed), d_scaled)
            for_x, for_d = for_x * np.sqrt(d_scaled / x_max), for_d * np.sqrt(x_max / d_scaled)
        idle = np.zeros_like(x_max)
        pulses = (np.minimum(x_max, d_max) > 0.0) if managed else idle == 0.0
        pulses &= lr > 0.0
        length, for_x, for_d = (np.where(pulses, value, idle) for value in (length, for_x, for_d))
        return length.astype(np.int64), for_x, for_d

    def _drawn(self, x: Tensor, d: Tensor, learning_rate: float, generator: Generator) -> _Lines:
        """Scaled and discretised, by stochastic rounding if asked for."""
        lines = self._lines(x, d, learning_rate)
        source = generator if self.update.sto_round else None
        x_res, d_res = self._resolutions
        return lines._replace(
            x=_discrete(lines.x, x_res, source), d=_discrete(lines.d, d_res, source)
        )

    def _means(self, x: Tensor, d: Tensor, learning_rate: float) -> _Lines:
        """Mean probabilities of a pulse."""
        if not self.stochastic:
            raise ConfigurationError(
                "update.pulse_type: expected stochastic trains, got "
                f"{self.update.pulse_type.name}. Use count or simulate."
            )
        lines, res = self._lines(x, d, learning_rate), self.update.res
        if self.update.sto_round and res > 0.0:
            x_mean, d_mean = (_mean_of_rounding(v, res) for v in (lines.x, lines.d))
        else:
            x_mean, d_mean = (_discrete(v, res).clamp_(max=1.0) for v in (lines.x, lines.d))
        return lines._replace(x=x_mean, d=d_mean)

    def _trains(
        self, x: Tensor, d: Tensor, learning_rate: float, generator: Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Stochastic trains, and where they stand for something negative.

        Shapes ``(slots, in + out)``, some slots of all trains at a time.
        """
        lines = self._drawn(x, d, learning_rate, generator)
        chance, negative = torch.cat([lines.x, lines.d], 1), torch.cat([x, d], 1) < 0.0
        vector = torch.arange(len(x), device=x.device).repeat_interleave(lines.length)
        for part in vector.split(max(1, _ELEMENTS // chance.shape[1])):
            shape = (len(part), chance.shape[1])
            drawn = torch.rand(shape, generator=generator, device=x.device)
            yield drawn < chance.index_select(0, part), negative.index_select(0, part)

    def _products(
        self, x: Tensor, d: Tensor, learning_rate: float, generator: Generator
    ) -> Iterator[Tensor]:
        """Coincidences of deterministic trains, below zero for SET.

        Shapes ``(vectors, out, in)``, some vectors at a time.
        """
        lines = self._drawn(x, d, learning_rate, generator)
        length = lines.length[:, None].float()
        if self.update.pulse_type is PulseType.MEAN_COUNT:
            x_size = torch.minimum((length * lines.x).round(), length)
            d_size = torch.minimum((length * lines.d).round(), length) / length.clamp(min=1.0)
        else:
            x_size, d_size = lines.x.clamp(max=1.0), lines.d.clamp(max=1.0) * length
        x_size, d_size = torch.copysign(x_size, x.float()), torch.copysign(d_size, d.float())
        vectors = max(1, _ELEMENTS // (x.shape[1] * d.shape[1]))
        for some_x, some_d in zip(x_size.split(vectors), d_size.split(vectors), strict=True):
            yield (some_d[:, :, None] * some_x[:, None, :]).round()


def _require_update(x: Tensor, d: Tensor, learning_rate: float) -> None:
    if x.dim() != 2 or d.dim() != 2 or len(x) != len(d):
        raise ConfigurationError(
            "pulse trains: expected inputs (vectors, in) and gradients (vectors, out), got shapes "
            f"{tuple(x.shape)} and {tuple(d.shape)}."
        )
    if not learning_rate >= 0.0:
        raise ConfigurationError(
            f"pulse trains: expected a learning rate of 0 or more, got {learning_rate}. aihwkit "
            "takes no other; turn the sign of the loss instead."
        )


def _discrete(value: Tensor, resolution: float, source: Generator | None = None) -> Tensor:
    if resolution <= 0.0:
        return value
    steps = value / resolution
    if source is not None:
        drawn = torch.rand(value.shape, generator=source, device=value.device)
        steps = steps + (drawn - 0.5)
    return steps.round() * resolution


def _mean_of_rounding(value: Tensor, resolution: float) -> Tensor:
    """Mean of a stochastically rounded probability, which is at most 1."""
    below = (value / resolution).floor()
    low, high = ((steps * resolution).clamp(max=1.0) for steps in (below, below + 1.0))
    return torch.lerp(low, high, value / resolution - below)


def _pulses(both: Tensor, net: Tensor) -> Pulses:
    """SET and RESET from their sum and from what RESET has more."""
    halves = [(both - net) / 2, (both + net) / 2]
    return Pulses(*(half.to(both.dtype) for half in halves))


def _total(both: int, net: int) -> PulseTotals:
    return PulseTotals((both - net) // 2, (both + net) // 2)
