"""Writes the cells of a chip: by which policy, how sure the counts are, and by whose randomness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from aihwkit.inference.noise.base import BaseNoiseModel
from torch import Generator, Tensor

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.chips.mapping import CellEncoding
from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.estimates import write
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.write_verify import WriteResult
from aihwkit_lora.registry import nearest

WriteLevel = Literal["simulated", "sampled", "mean"]
"""How the counts of a writing come about."""

_LEVELS = (Level.SIMULATED, Level.SAMPLED, Level.MEAN)
_MICRO = 1e6


@dataclass(frozen=True, eq=False)
class Writer:
    """Everything that writing the cells of a chip needs, besides the cells.

    Args:
        policy: The closed loop's settings.
        level: ``simulated`` pulse by pulse, ``sampled`` or ``mean``.
        generator: Source of all randomness.
        noise_model: Of the error that programming leaves at level ``sampled``; None for errors
            anywhere in the tolerance with equal probability.
    """

    policy: WritePolicy
    level: Level
    generator: Generator
    noise_model: BaseNoiseModel | None

    @classmethod
    def of(cls, chip: Chip, *, policy: WritePolicy | None, level: str, seed: int | None) -> Writer:
        """Take from a chip what is not given.

        Args:
            chip: Whose policy and programming noise to take.
            policy: Instead of the chip's.
            level: Name of a level.
            seed: Of all randomness; drawn from torch's generator if None.
        Raises:
            ConfigurationError: Cells cannot be written at that level.
        """
        if level not in _LEVELS:
            raise ConfigurationError(
                f"level: expected how to write cells, got {level!r}. {nearest(level, _LEVELS)}"
            )
        make = chip.programming_noise or chip.noise_model
        return cls(
            policy or chip.write_policy,
            Level(level),
            seeded(seed),
            None if make is None else make(),
        )

    def write(
        self, goal: Tensor, state: CellState, response: PulseResponse, encoding: CellEncoding
    ) -> WriteResult:
        """Write the cells of one tile.

        Args:
            goal: Wanted cell states, shape ``(cells_per_weight, out_size, rows)``.
            state: Where the cells stand now.
            response: The cells.
            encoding: What their states stand for.
        """
        noise = None if self.noise_model is None else _noise(self.noise_model, encoding)
        return write(
            goal, state, response, self.policy, self.generator, level=self.level, noise=noise
        )


def seeded(seed: int | None) -> Generator:
    """Make a generator from a seed, or from torch's own generator if None.

    Several processes that train together need the same chip. Without a seed, all of them take the
    one that rank 0 draws, so all of them have to call this; each draws once from torch's generator,
    as a process that is alone does. Before ``torch.distributed`` is initialised, nobody knows of
    the others: pass a seed there.

    Args:
        seed: Any whole number.
    """
    if seed is not None:
        return Generator().manual_seed(seed)
    drawn = [int(torch.randint(2**62, ()))]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(drawn, src=0)
    return Generator().manual_seed(drawn[0])


def _noise(model: BaseNoiseModel, encoding: CellEncoding) -> Callable[[Tensor, Generator], Tensor]:
    """Turn aihwkit's noise on conductances in µS into noise on cell states."""

    def written(states: Tensor, generator: Generator) -> Tensor:
        targets = encoding.to_siemens(states) * _MICRO
        seed = int(torch.randint(2**62, (), generator=generator))
        # aihwkit draws from torch's own generator, which nobody else shall notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = model.apply_programming_noise_to_conductance(targets)
        return encoding.from_siemens(found / _MICRO)

    return written
