"""Sums over DAC codes against sums written out in torch and in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aihwkit_lora.metering import code_sums
from aihwkit_lora.metering.code_sums import squared_codes, squared_codes_of_largest

FULL_SCALES = (1, 7, 127, 255)


def drawn(seed: int, *shape: int) -> Tensor:
    """Values in [-1, 1], about a quarter of them zero."""
    generator = torch.Generator().manual_seed(seed)
    values = 2.0 * torch.rand(shape, generator=generator) - 1.0
    return values.where(torch.rand(shape, generator=generator) > 0.25, 0.0)


def written_out(drive: Tensor, full: int) -> tuple[Tensor, int]:
    codes = (drive * full).round().long()
    return (codes * codes).sum(-2), int((codes != 0).sum())


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.integers(1, 33)),
    full=st.sampled_from(FULL_SCALES),
)
def test_squares_are_those_of_whole_numbers(seed, shape, full):
    drive = drawn(seed, *shape)
    sums, active = squared_codes(drive, full)
    expected, expected_active = written_out(drive, full)
    assert torch.equal(sums, expected)
    assert active == expected_active


def test_tiles_that_lie_side_by_side_in_memory_give_the_same():
    drive = drawn(0, 50, 3, 1, 17).permute(1, 2, 0, 3)
    assert not drive.is_contiguous()
    sums, active = squared_codes(drive, 127)
    again, active_again = squared_codes(drive.contiguous(), 127)
    assert torch.equal(sums, again)
    assert active == active_again


@pytest.mark.parametrize("full", FULL_SCALES)
def test_sums_beyond_the_reach_of_32_bit_floats_are_exact(full):
    # One below a full scale, so that a rounded sum would show in its last digit.
    drive = torch.full((70_000, 2), (full - 1) / full if full > 1 else 1.0)
    expected, _ = written_out(drive, full)
    assert torch.equal(squared_codes(drive, full)[0], expected)
    ones = torch.ones(1, 1, 2)
    largest = squared_codes_of_largest(torch.ones(70_000, 1, 2), ones, full)
    assert largest.tolist() == [[[70_000 * full**2] * 2]]


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(1, 33)),
    in_tiles=st.integers(1, 3),
    full=st.sampled_from(FULL_SCALES),
)
def test_each_vector_fills_the_scale_of_each_tile(seed, shape, in_tiles, full):
    drive, scale = drawn(seed, *shape), drawn(seed + 1, in_tiles, *shape[1:])
    products = drive[:, None] * scale
    largest = products.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    codes = (products / largest * full).round().long()
    expected = (codes * codes).sum(0)
    assert torch.equal(squared_codes_of_largest(drive, scale, full), expected)


def test_an_accelerator_gets_the_same_without_compiled_loops(monkeypatch):
    """The operations that run there, run here."""
    drive, scale = drawn(2, 300, 3, 40), drawn(3, 2, 3, 40)
    whole = squared_codes(drive.movedim(0, 1), 127)
    filled = squared_codes_of_largest(drive, scale, 127)
    monkeypatch.setattr(code_sums, "_COMPILED_FOR", "nothing")
    sums, active = squared_codes(drive.movedim(0, 1), 127)
    assert torch.equal(sums, whole[0])
    assert active == whole[1]
    assert torch.equal(squared_codes_of_largest(drive, scale, 127), filled)


def test_half_precision_is_taken():
    drive = drawn(4, 5, 6).bfloat16()
    assert torch.equal(squared_codes(drive, 7)[0], written_out(drive.float(), 7)[0])
