"""Write–verify without the loop: pulse counts from published statistics instead of pulses.

Both estimates give the same kind of result as :func:`write_verify` and say how they came about:
their counts carry the level ``sampled`` or ``mean``. A cell that verifies at the first read costs
no pulses at any level. The statistics are those of the policy; what passes one after another
follows from the pulses of each cell by :func:`~aihwkit_lora.programming.slots.least_slots`.
:func:`write` is the one door to all levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.devices import normal
from aihwkit_lora.programming.response import CellState, PulseResponse
from aihwkit_lora.programming.slots import least_slots
from aihwkit_lora.programming.write_verify import WriteResult, require_matching, write_verify

Noise = Callable[[Tensor, Generator], Tensor]
"""Tells what written cells hold, given their targets, shape ``(cells,)``, in cell-state units."""


def write(
    target: Tensor,
    state: CellState,
    response: PulseResponse,
    policy: WritePolicy,
    generator: Generator,
    *,
    level: Level = Level.SIMULATED,
    noise: Noise | None = None,
) -> WriteResult:
    """Write every cell to its target, pulse by pulse or by statistics.

    Args:
        target: Wanted weight per cell, shape ``(..., columns, rows)``, in cell-state units.
        state: Where the cells stand now.
        response: The cells. Only the level ``simulated`` asks how they move.
        policy: How the chip writes them.
        generator: Source of all randomness.
        level: ``simulated`` runs the closed loop of :func:`write_verify`; ``sampled`` and ``mean``
            draw or spread the pulses of ``policy.statistics``.
        noise: Error of programming at the level ``sampled``, as in :func:`write_sampled`. The other
            levels leave errors of their own, or none, and do not use it.
    Returns:
        New state, and pulses, reads and failures per cell, at that level.
    Raises:
        ConfigurationError: Shapes differ, a target is not a number, or cells cannot be written at
            that level.

    Example:
        >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
        >>> policy = WritePolicy(device=ReRamArrayOMPresetDevice, tolerance=0.02)
        >>> seeded = Generator().manual_seed(0)
        >>> cells = PulseResponse.draw(policy.device(), (10, 10), seeded)
        >>> fresh, target = cells.hold(torch.zeros(10, 10), seeded), torch.full((10, 10), 0.9)
        >>> for level in (Level.SIMULATED, Level.SAMPLED, Level.MEAN):
        ...     result = write(target, fresh, cells, policy, seeded, level=level)
        ...     print(result.counts().level, result.counts()["programmed_cells"])
        simulated 100
        sampled 100
        mean 100
    """
    require_matching(target, state, response.shape)
    if level == Level.SIMULATED:
        return write_verify(target, state, response, policy, generator)
    if level == Level.SAMPLED:
        return write_sampled(target, state, policy, generator, noise=noise)
    if level == Level.MEAN:
        return write_mean(target, state, policy)
    raise ConfigurationError(
        f"write: expected level 'simulated', 'sampled' or 'mean', got {str(level)!r}."
    )


def write_sampled(
    target: Tensor,
    state: CellState,
    policy: WritePolicy,
    generator: Generator,
    *,
    noise: Noise | None = None,
) -> WriteResult:
    """Write cells with pulse counts drawn from the log-normal distribution of the policy.

    Args:
        target: Wanted weight per cell, in cell-state units.
        state: Where the cells stand now. Cells in tolerance are not touched.
        policy: Tolerance, budget, verify reads and statistics. A cell whose drawn count exceeds
            ``max_pulses`` spends all of these and fails (0.93 % of the cells at 60 with the default
            statistics).
        generator: Source of randomness.
        noise: Tells what written cells hold, given their targets, for example by a model of the
            errors that remain some time after programming. If None, they lie anywhere in the
            tolerance with equal probability.
    Returns:
        Failed cells stay where they were, the pessimistic end. SET and RESET share a cell's pulses
        equally, an odd one goes towards the target.
    Raises:
        ConfigurationError: Shapes differ, a target is not a number, or the noise gives another
            shape than it was given.

    Example:
        >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
        >>> policy = WritePolicy(device=ReRamArrayOMPresetDevice, tolerance=0.02, max_pulses=60)
        >>> seeded, blank = Generator().manual_seed(0), torch.zeros(100, 100)
        >>> result = write_sampled(blank + 0.5, CellState(blank, blank), policy, seeded)
        >>> float(result.pulses.float().median())
        5.0
    """
    waiting = _out_of_tolerance(target, state, policy, generator)
    statistics = policy.statistics
    drawn = math.log(statistics.median_pulses) + statistics.sigma_ln * normal(target, generator)
    drawn = drawn.exp().round().clamp(min=1.0)
    failed = waiting & (drawn > policy.max_pulses)
    pulses = torch.where(waiting, drawn.clamp(max=policy.max_pulses), 0.0).int()
    done = waiting & ~failed
    written = state.apparent.clone()
    written[done] = _held(target[done], policy, generator, noise)
    return _result(target, state, written, pulses, failed, policy, Level.SAMPLED)


def write_mean(target: Tensor, state: CellState, policy: WritePolicy) -> WriteResult:
    """Write cells exactly to their targets, at the policy's mean number of pulses for each.

    Args:
        target: Wanted weight per cell, in cell-state units.
        state: Where the cells stand now. Cells in tolerance are not touched.
        policy: Tolerance, verify reads and statistics. The budget plays no role: no cell fails.
            Each cell gets a whole number of pulses, and all cells together the mean, rounded down
            once.
    Raises:
        ConfigurationError: Shapes differ, or a target is not a number.

    Example:
        >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
        >>> policy = WritePolicy(device=ReRamArrayOMPresetDevice, tolerance=0.02)
        >>> blank = torch.zeros(10, 10)
        >>> int(write_mean(blank + 0.5, CellState(blank, blank), policy).pulses.sum())
        852
    """
    waiting = _out_of_tolerance(target, state, policy)
    # Differences of the rounded running total: whole pulses per cell, and the right sum.
    order = waiting.flatten().cumsum(0).double()
    total = (order * policy.statistics.mean_pulses + 1e-9).floor()
    pulses = torch.diff(total, prepend=total.new_zeros(1)).view(target.shape).int()
    written = torch.where(waiting, target, state.apparent)
    failed = torch.zeros_like(waiting)
    return _result(target, state, written, pulses, failed, policy, Level.MEAN)


def _out_of_tolerance(
    target: Tensor, state: CellState, policy: WritePolicy, generator: Generator | None = None
) -> Tensor:
    """The first verification of every cell; without noise if there is no generator."""
    require_matching(target, state)
    error = target - state.apparent
    if generator is not None and policy.verify_noise > 0.0:
        noise = policy.verify_noise / policy.verify_averages**0.5
        error = error + noise * normal(error, generator)
    return error.abs() > policy.tolerance


def _held(target: Tensor, policy: WritePolicy, generator: Generator, noise: Noise | None) -> Tensor:
    """What written cells hold, given their targets."""
    if noise is None:
        place = torch.rand(
            target.shape, generator=generator, device=target.device, dtype=target.dtype
        )
        return target + policy.tolerance * (2.0 * place - 1.0)
    held = noise(target, generator)
    if held.shape != target.shape:
        raise ConfigurationError(
            f"write_sampled: expected noise to give a weight for each of {target.numel()} targets, "
            f"got shape {tuple(held.shape)}."
        )
    return held.to(target.dtype)


def _result(
    target: Tensor,
    state: CellState,
    written: Tensor,
    pulses: Tensor,
    failed: Tensor,
    policy: WritePolicy,
    level: Level,
) -> WriteResult:
    rising = (target > state.apparent) & (pulses % 2 == 1)
    set_pulses = pulses // 2 + rising.int()
    touched = (pulses > 0) & ~failed
    return WriteResult(
        state=CellState(torch.where(touched, written, state.persistent), written),
        set_pulses=set_pulses,
        reset_pulses=pulses - set_pulses,
        verify_reads=(pulses + 1) * policy.reads_per_verify,
        failed=failed,
        slots=least_slots(set_pulses, pulses - set_pulses, policy),
        verify_with=policy.verify_with,
        level=level,
    )
