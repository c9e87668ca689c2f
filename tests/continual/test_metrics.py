"""Metrics of continual learning, against explicit loops and matrices worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aihwkit_lora.continual.metrics import (
    AccuracyMatrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    relapse,
    spill,
)
from aihwkit_lora.errors import ConfigurationError, DataError

NAN = math.nan
THREE = torch.tensor([[1.0, NAN, NAN], [0.5, 0.75, NAN], [0.25, 1.0, 0.5]])
# Learn tasks 0, 1, 2; forget 1; learn 3; forget 0.
STREAM = torch.tensor(
    [
        [0.9, NAN, NAN, NAN],
        [0.8, 0.9, NAN, NAN],
        [0.8, 0.9, 1.0, NAN],
        [0.7, 0.0, 0.9, NAN],
        [0.7, 0.2, 0.8, 0.9],
        [0.1, 0.1, 0.8, 1.0],
    ]
)
FORGOTTEN = {1: 3, 0: 5}
SQUARE = [average_accuracy, average_incremental_accuracy, backward_transfer, forgetting]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    size = draw(st.integers(2, 6))
    cells = st.lists(st.integers(0, 64), min_size=size, max_size=size)
    return torch.tensor(draw(st.lists(cells, min_size=size, max_size=size))) / 64


def test_three_tasks_by_hand():
    assert float(average_accuracy(THREE)) == pytest.approx((0.25 + 1.0 + 0.5) / 3)
    expected = (1.0 + (0.5 + 0.75) / 2 + (0.25 + 1.0 + 0.5) / 3) / 3
    assert float(average_incremental_accuracy(THREE)) == pytest.approx(expected)
    assert float(backward_transfer(THREE)) == ((0.25 - 1.0) + (1.0 - 0.75)) / 2
    assert float(forgetting(THREE)) == ((1.0 - 0.25) + (0.75 - 1.0)) / 2
    assert float(forgetting(THREE, include_last=True)) == (1.0 - 0.25) / 2


@given(matrices())
def test_explicit_loops_agree(matrix):
    a, tasks = matrix.tolist(), len(matrix)
    last = tasks - 1
    assert float(average_accuracy(matrix)) == pytest.approx(sum(a[last]) / tasks)
    incremental = sum(sum(a[t][: t + 1]) / (t + 1) for t in range(tasks)) / tasks
    assert float(average_incremental_accuracy(matrix)) == pytest.approx(incremental)
    transfer = sum(a[last][i] - a[i][i] for i in range(last)) / last
    assert float(backward_transfer(matrix)) == pytest.approx(transfer)
    ahead = sum(a[i - 1][i] - 0.25 for i in range(1, tasks)) / last
    untrained = torch.full((tasks,), 0.25)
    assert float(forward_transfer(matrix, untrained)) == pytest.approx(ahead)
    for include, end in ((False, last), (True, tasks)):
        best = [max(a[t][i] for t in range(i, end)) for i in range(last)]
        drop = sum(best[i] - a[last][i] for i in range(last)) / last
        assert float(forgetting(matrix, include_last=include)) == pytest.approx(drop)


@given(matrices())
def test_values_above_the_diagonal_do_not_matter(matrix):
    lower = torch.where(torch.ones_like(matrix).tril() > 0, matrix, NAN)
    for metric in SQUARE:
        assert metric(lower) == metric(matrix)


@given(matrices())
def test_forgetting_bounds_transfer(matrix):
    # The best accuracy is at least that right after learning.
    assert float(forgetting(matrix)) >= -float(backward_transfer(matrix)) - 1e-12
    assert float(forgetting(matrix, include_last=True)) >= 0.0


def test_relapse_is_the_worst_of_later_phases():
    assert relapse(STREAM, FORGOTTEN) == pytest.approx({1: 0.2})
    assert relapse(STREAM[:5], {1: 3}) == pytest.approx({1: 0.2})
    assert relapse(STREAM[:4], {1: 3}) == {}


def test_a_task_that_stays_forgotten_has_no_relapse():
    assert relapse(torch.tensor([[0.9], [0.25], [0.25], [0.0]]), {0: 1}) == {0: 0.0}


def test_spill_is_what_kept_tasks_lose():
    # Phase 3 costs tasks 0 and 2 a tenth each; in phase 5 task 2 keeps and task 3 gains a tenth,
    # while task 1 is gone already.
    assert spill(STREAM, FORGOTTEN) == pytest.approx({3: 0.1, 5: -0.05})


def test_two_tasks_forgotten_at_once_are_one_spill():
    matrix = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.75]])
    assert spill(matrix, {0: 1, 1: 1}) == {1: 0.25}


def test_spill_needs_a_kept_task():
    with pytest.raises(DataError, match="a kept task measured in phases 0 and 1"):
        spill(torch.tensor([[1.0], [0.0]]), {0: 1})


def test_spill_needs_a_phase_before():
    with pytest.raises(ConfigurationError, match="phases of 1 or more, got 0"):
        spill(STREAM, {0: 0})


@pytest.mark.parametrize("metric", [relapse, spill])
@pytest.mark.parametrize("forgotten", [{4: 1}, {0: 6}, {-1: 2}])
def test_requests_have_to_be_in_the_matrix(metric, forgotten):
    with pytest.raises(ConfigurationError, match="tasks below 4 and phases below 6, got task"):
        metric(STREAM, forgotten)


def test_relapse_needs_all_later_phases():
    gaps = torch.tensor([[1.0], [0.0], [NAN], [0.5]])
    with pytest.raises(DataError, match=r"task 0 from phase 1 on to be measured, got 1"):
        relapse(gaps, {0: 1})


@pytest.mark.parametrize("metric", SQUARE)
def test_a_stream_with_requests_is_not_square(metric):
    with pytest.raises(DataError, match=r"expected one phase for each.*\(6, 4\)"):
        metric(STREAM)


@pytest.mark.parametrize("metric", [backward_transfer, forgetting])
def test_one_task_is_too_few(metric):
    with pytest.raises(DataError, match="2 or more tasks"):
        metric(torch.ones(1, 1))
    assert float(average_accuracy(torch.ones(1, 1))) == 1.0


@pytest.mark.parametrize("metric", SQUARE)
def test_gaps_in_what_is_needed_are_refused(metric):
    with pytest.raises(DataError, match="to be measured, got 1 values"):
        metric(torch.tensor([[1.0, NAN], [NAN, 1.0]]))


def test_forward_transfer_needs_tasks_before_they_are_learnt():
    with pytest.raises(DataError, match="values above the diagonal to be measured, got 2"):
        forward_transfer(THREE, torch.zeros(3))
    with pytest.raises(DataError, match="untrained: expected one accuracy for each of 3 tasks"):
        forward_transfer(THREE, torch.zeros(2))


@pytest.mark.parametrize("metric", SQUARE)
def test_per_cent_is_refused(metric):
    with pytest.raises(DataError, match="fractions from 0 to 1, got 98 to 100"):
        metric(torch.tensor([[100.0, 99.0], [98.0, 99.0]]))


def test_an_empty_matrix_is_refused():
    with pytest.raises(DataError, match=r"expected shape \(phases, tasks\)"):
        average_accuracy(torch.zeros(0, 0))


def test_a_matrix_counts_exactly():
    matrix = AccuracyMatrix(tasks=2, phases=3)
    for _ in range(3):
        matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]), phase=2, task=1)
    matrix.right[2, 1] += 2**25
    matrix.samples[2, 1] += 2**25
    assert float(matrix.compute()[2, 1]) == (2**25 + 3) / (2**25 + 6)
    assert matrix.compute().isnan().sum() == 5


@pytest.mark.parametrize("options", [{"tasks": 0}, {"tasks": 2, "phases": 0}])
def test_a_matrix_has_a_task_and_a_phase(options):
    with pytest.raises(ConfigurationError, match="expected a task and a phase or more"):
        AccuracyMatrix(**options)


@pytest.mark.parametrize("where", [{"phase": 2, "task": 0}, {"phase": 0, "task": -1}])
def test_samples_belong_to_a_phase_and_task_of_the_matrix(where):
    with pytest.raises(ConfigurationError, match="a phase below 2 and a task below 2"):
        AccuracyMatrix(tasks=2).update(torch.tensor([0]), torch.tensor([0]), **where)
