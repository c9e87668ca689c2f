"""Write-verify without the loop: pulse counts from published statistics instead of pulses.

Both estimates give the same kind of result as :func:`write_verify` and say how they came about:
their counts carry the level ``sampled`` or ``mean``. A cell that verifies at the first read costs
no pulses at either level.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Level
from aihwkit_lora.programming.devices import normal
from aihwkit_lora.programming.response import CellState
from aihwkit_lora.programming.write_verify import WriteResult, require_matching


def write_sampled(
    target: Tensor,
    state: CellState,
    policy: WritePolicy,
    generator: Generator,
    *,
    median_pulses: float = 5.0,
    sigma_ln: float = 1.06,
) -> WriteResult:
    """Write cells with pulse counts drawn from a log-normal distribution.

    The defaults describe IBM's 14 nm OM ReRAM array at a tolerance of 0.02: the statistics of a
    simulated closed loop on the device parameters of Gong et al., IEDM 2022, not a measured
    histogram. Other tolerances and devices need other numbers; :func:`write_verify` gives them.

    Args:
        target: Wanted weight per cell, in cell-state units.
        state: Where the cells stand now. Cells in tolerance are not touched.
        policy: Tolerance, budget and verify reads. A cell whose drawn count exceeds
            ``max_pulses`` spends all of these and fails (0.95 % of the cells at 60).
        generator: Source of randomness.
        median_pulses: Median of the log-normal distribution; above 0.
        sigma_ln: Standard deviation of the logarithm of the count; 0 or more.
    Returns:
        Written cells lie anywhere in the tolerance with equal probability; failed cells stay
        where they were, the pessimistic end. SET and RESET share a cell's pulses equally, an odd
        one goes towards the target.
    Raises:
        ConfigurationError: Shapes differ, a target is not a number, or a statistic is out of
            range.

    Example:
        >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
        >>> policy = WritePolicy(device=ReRamArrayOMPresetDevice, tolerance=0.02, max_pulses=60)
        >>> seeded, blank = Generator().manual_seed(0), torch.zeros(100, 100)
        >>> result = write_sampled(blank + 0.5, CellState(blank, blank), policy, seeded)
        >>> float(result.pulses.float().median())
        5.0
    """
    if not (median_pulses > 0.0 and sigma_ln >= 0.0):
        raise ConfigurationError(
            "write_sampled: expected median_pulses above 0 and sigma_ln of 0 or more, got "
            f"{median_pulses} and {sigma_ln}."
        )
    waiting = _out_of_tolerance(target, state, policy, generator)
    drawn = (math.log(median_pulses) + sigma_ln * normal(target, generator)).exp()
    drawn = drawn.round().clamp(min=1.0)
    failed = waiting & (drawn > policy.max_pulses)
    pulses = torch.where(waiting, drawn.clamp(max=policy.max_pulses), 0.0).int()
    place = torch.rand(target.shape, generator=generator, device=target.device, dtype=target.dtype)
    weight = target + policy.tolerance * (2.0 * place - 1.0)
    written = torch.where(waiting & ~failed, weight, state.apparent)
    return _result(target, state, written, pulses, failed, policy, Level.SAMPLED)


def write_mean(
    target: Tensor, state: CellState, policy: WritePolicy, *, mean_pulses: float = 8.52
) -> WriteResult:
    """Write cells exactly to their targets, at a mean number of pulses for each.

    The default is the mean behind the ``SetPulse`` of 8520 ns, in pulses of 1 us, that CiMLoop's
    cell file ``rram_wan_nature_2022`` gives for NeuRRAM (Wan et al., Nature 2022).

    Args:
        target: Wanted weight per cell, in cell-state units.
        state: Where the cells stand now. Cells in tolerance are not touched.
        policy: Tolerance and verify reads. The budget plays no role: no cell fails.
        mean_pulses: Mean over the cells that need writing; 0 or more. Each cell gets a whole
            number of pulses, and all cells together the mean, rounded down once.
    Raises:
        ConfigurationError: Shapes differ, a target is not a number, or the mean is negative.

    Example:
        >>> from aihwkit.simulator.presets.devices import ReRamArrayOMPresetDevice
        >>> policy = WritePolicy(device=ReRamArrayOMPresetDevice, tolerance=0.02)
        >>> blank = torch.zeros(10, 10)
        >>> int(write_mean(blank + 0.5, CellState(blank, blank), policy).pulses.sum())
        852
    """
    if not mean_pulses >= 0.0:
        raise ConfigurationError(
            f"write_mean: expected mean_pulses of 0 or more, got {mean_pulses}."
        )
    waiting = _out_of_tolerance(target, state, policy)
    # Differences of the rounded running total: whole pulses per cell, and the right sum.
    order = waiting.flatten().cumsum(0).double()
    total = (order * mean_pulses + 1e-9).floor()
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
        level=level,
    )
