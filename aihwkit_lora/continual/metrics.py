"""Metrics of learning one task after the other, and forgetting some of them on request.

All of them read an accuracy matrix ``a``: ``a[t, i]`` is the accuracy on task ``i`` after phase
``t``, a fraction; NaN where it was not measured. Phases and tasks count from 0. Most functions want
one phase for each task, so a square matrix of which the lower triangle is measured; with ``T``
tasks, the last phase is ``T - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.metrics.checks import predicted_labels


def average_accuracy(matrix: Tensor) -> Tensor:
    """Mean accuracy on all tasks after the last one (AA).

    ``AA = 1/T sum_i a[T-1, i]``, from 0 to 1. Ideal: that of training on all tasks at once. Source:
    Lopez-Paz and Ranzato, arXiv:1706.08840.

    Args:
        matrix: Accuracies, shape ``(T, T)``.
    Raises:
        DataError: The matrix is not square, or the last row has gaps.

    Example:
        >>> average_accuracy(torch.tensor([[1.0, torch.nan], [0.5, 1.0]]))
        tensor(0.7500, dtype=torch.float64)
    """
    return _measured("last row", _square(matrix)[-1]).mean()


def average_incremental_accuracy(matrix: Tensor) -> Tensor:
    """Mean over phases of the mean accuracy on the tasks learnt so far (AIA).

    ``AIA = 1/T sum_t (1/(t+1) sum_{i<=t} a[t, i])``, from 0 to 1. Ideal: that of training anew on
    all tasks so far in each phase. Source: iCaRL, arXiv:1611.07725.

    Args:
        matrix: Accuracies, shape ``(T, T)``.
    Raises:
        DataError: The matrix is not square, or the lower triangle has gaps.

    Example:
        >>> average_incremental_accuracy(torch.tensor([[1.0, torch.nan], [0.5, 1.0]]))
        tensor(0.8750, dtype=torch.float64)
    """
    rows = _triangle(matrix)
    return torch.stack([row[: phase + 1].mean() for phase, row in enumerate(rows)]).mean()


def backward_transfer(matrix: Tensor) -> Tensor:
    """Mean change of a task's accuracy from when it was learnt to the end (BWT).

    ``BWT = 1/(T-1) sum_{i<T-1} (a[T-1, i] - a[i, i])``, from -1 to 1. Ideal: 0 or more. Source:
    Lopez-Paz and Ranzato, arXiv:1706.08840.

    Args:
        matrix: Accuracies, shape ``(T, T)``, two tasks or more.
    Raises:
        DataError: The matrix is not square, is too small, or the lower triangle has gaps.

    Example:
        >>> backward_transfer(torch.tensor([[1.0, torch.nan], [0.75, 1.0]]))
        tensor(-0.2500, dtype=torch.float64)
    """
    rows = _triangle(matrix, at_least=2)
    return (rows[-1] - rows.diagonal())[:-1].mean()


def forward_transfer(matrix: Tensor, untrained: Tensor) -> Tensor:
    """Mean head start that a task has from what was learnt before it (FWT).

    ``FWT = 1/(T-1) sum_{i>0} (a[i-1, i] - b[i])`` with ``b[i]`` the accuracy of the untrained
    model, from -1 to 1. Ideal: 0 or more. Source: Lopez-Paz and Ranzato, arXiv:1706.08840.

    Args:
        matrix: Accuracies, shape ``(T, T)``, two tasks or more, with those above the diagonal.
        untrained: Accuracy of the model on each task before any learning, shape ``(T,)``.
    Raises:
        DataError: The matrix is not square, is too small, lacks a value above the diagonal, or the
            untrained accuracies do not fit.

    Example:
        >>> forward_transfer(torch.tensor([[1.0, 0.5], [0.75, 1.0]]), torch.tensor([0.25, 0.25]))
        tensor(0.2500, dtype=torch.float64)
    """
    rows = _square(matrix, at_least=2)
    if untrained.shape != rows.shape[:1]:
        raise DataError(
            f"untrained: expected one accuracy for each of {len(rows)} tasks, got shape "
            f"{tuple(untrained.shape)}."
        )
    before = _measured("values above the diagonal", rows.diagonal(1))
    return (before - _measured("untrained", untrained.double()[1:])).mean()


def forgetting(matrix: Tensor, *, include_last: bool = False) -> Tensor:
    """Mean drop of a task's accuracy from the best it ever had to the end.

    ``F = 1/(T-1) sum_{i<T-1} (max_{i<=t<T-1} a[t, i] - a[T-1, i])``. By default the best is taken
    over the phases before the last one, the convention of Chaudhry et al., so that a task that
    improves at the end counts negative: from -1 to 1. With ``include_last`` it is taken over all
    phases, as in Mammoth: from 0 to 1. Ideal: 0. Where each task is at its best right after it was
    learnt, ``F = -BWT``. Source: Chaudhry et al., arXiv:1801.10112.

    Args:
        matrix: Accuracies, shape ``(T, T)``, two tasks or more.
        include_last: Let the last phase count for the best.
    Raises:
        DataError: The matrix is not square, is too small, or the lower triangle has gaps.

    Example:
        >>> rows = torch.tensor([[0.5, torch.nan], [0.75, 1.0]])
        >>> forgetting(rows), forgetting(rows, include_last=True)
        (tensor(-0.2500, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    rows = _triangle(matrix, at_least=2)
    end = len(rows) if include_last else len(rows) - 1
    best = torch.stack([rows[task:end, task].max() for task in range(len(rows) - 1)])
    return (best - rows[-1, :-1]).mean()


def relapse(matrix: Tensor, forgotten: Mapping[int, int]) -> dict[int, float]:
    """How much later phases brought back of each task that was forgotten on request.

    ``relapse_i = max_{t>s} a[t, i] - a[s, i]`` for a task forgotten in phase ``s``: its accuracy
    after later learning minus that right after unlearning, at the worst of all later phases; from
    -1 to 1. Ideal: 0 or less. Tasks forgotten in the last phase are absent. Source: UnCLe,
    arXiv:2509.17530.

    Args:
        matrix: Accuracies, shape ``(phases, tasks)``, where phases learn or forget.
        forgotten: The phase in which each forgotten task was forgotten, by task.
    Returns:
        Relapse by task.
    Raises:
        ConfigurationError: A task or phase is not in the matrix.
        DataError: A value from that phase on is not measured.

    Example:
        >>> relapse(torch.tensor([[1.0], [0.0], [0.25], [0.125]]), {0: 1})
        {0: 0.25}
    """
    rows = _requests(matrix, forgotten)
    found = {}
    for task, phase in forgotten.items():
        since = _measured(f"task {task} from phase {phase} on", rows[phase:, task])
        if len(since) > 1:
            found[task] = float(since[1:].max() - since[0])
    return found


def spill(matrix: Tensor, forgotten: Mapping[int, int]) -> dict[int, float]:
    """How much each unlearning took from tasks that were to be kept.

    ``spill_s = mean_i (a[s-1, i] - a[s, i])`` over the tasks that are measured before and after
    phase ``s`` and are not forgotten by then: what unlearning took from retained accuracy; from
    -1 to 1. Ideal: 0 or less. Source: UnCLe, arXiv:2509.17530.

    Args:
        matrix: Accuracies, shape ``(phases, tasks)``, where phases learn or forget.
        forgotten: The phase in which each forgotten task was forgotten, by task; 1 or more.
    Returns:
        Spill by phase.
    Raises:
        ConfigurationError: A task or phase is not in the matrix, or there is none before it.
        DataError: No task was kept.

    Example:
        >>> spill(torch.tensor([[1.0, 1.0], [0.0, 0.75]]), {0: 1})
        {1: 0.25}
    """
    rows = _requests(matrix, forgotten)
    found = {}
    for phase in sorted(set(forgotten.values())):
        if phase == 0:
            raise ConfigurationError(
                "forgotten: expected phases of 1 or more, got 0, which has none before it. Put the "
                "accuracies before unlearning into phase 0."
            )
        gone = [task for task, when in forgotten.items() if when <= phase]
        drop = rows[phase - 1] - rows[phase]
        drop[gone] = torch.nan
        if bool(drop.isnan().all()):
            raise DataError(
                f"spill: expected a kept task measured in phases {phase - 1} and {phase}, got none."
            )
        found[phase] = float(drop.nanmean())
    return found


def _requests(matrix: Tensor, forgotten: Mapping[int, int]) -> Tensor:
    rows = _fractions(matrix)
    for task, phase in forgotten.items():
        if not (0 <= task < rows.shape[1] and 0 <= phase < rows.shape[0]):
            raise ConfigurationError(
                f"forgotten: expected tasks below {rows.shape[1]} and phases below {len(rows)}, "
                f"got task {task} in phase {phase}."
            )
    return rows


def _fractions(matrix: Tensor) -> Tensor:
    rows = matrix.detach().double()
    if rows.ndim != 2 or not rows.numel():
        raise DataError(
            f"matrix: expected shape (phases, tasks), one or more of each, got {tuple(rows.shape)}."
        )
    measured = rows[~rows.isnan()]
    if not bool(((measured >= 0) & (measured <= 1)).all()):
        raise DataError(
            f"matrix: expected fractions from 0 to 1, got {float(measured.min()):.3g} to "
            f"{float(measured.max()):.3g}. Divide per cent by 100."
        )
    return rows


def _square(matrix: Tensor, at_least: int = 1) -> Tensor:
    rows = _fractions(matrix)
    if rows.shape[0] != rows.shape[1] or len(rows) < at_least:
        raise DataError(
            f"matrix: expected one phase for each of {at_least} or more tasks, shape (T, T), got "
            f"{tuple(rows.shape)}. Pick the rows of the phases that learnt a task."
        )
    return rows


def _triangle(matrix: Tensor, at_least: int = 1) -> Tensor:
    rows = _square(matrix, at_least)
    lower = torch.ones_like(rows, dtype=torch.bool).tril()
    _measured("lower triangle", rows[lower])
    return rows


def _measured(where: str, values: Tensor) -> Tensor:
    if bool(values.isnan().any()):
        raise DataError(
            f"matrix: expected all of {where} to be measured, got {int(values.isnan().sum())} "
            "values that are not. Evaluate those tasks after those phases."
        )
    return values


class AccuracyMatrix(Metric):
    """Count right answers by phase and task; ``compute`` gives the accuracy matrix.

    Shape ``(phases, tasks)``, from 0 to 1, NaN where nothing was counted. The functions of this
    module read it; :func:`average_accuracy` of its first ``t + 1`` rows and columns is the state
    after phase ``t``.

    Args:
        tasks: How many tasks there are, 1 or more.
        phases: How many phases; as many as tasks if None.
        **kwargs: Of ``torchmetrics.Metric``.
    Raises:
        ConfigurationError: There is no task or no phase.

    Example:
        >>> matrix = AccuracyMatrix(tasks=2)
        >>> matrix.update(torch.tensor([1, 1]), torch.tensor([1, 1]), phase=0, task=0)
        >>> matrix.update(torch.tensor([1, 0]), torch.tensor([1, 1]), phase=1, task=0)
        >>> matrix.update(torch.tensor([2, 2]), torch.tensor([2, 2]), phase=1, task=1)
        >>> matrix.compute().tolist()
        [[1.0, nan], [0.5, 1.0]]
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    right: Tensor
    samples: Tensor

    def __init__(self, tasks: int, phases: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = (tasks if phases is None else phases, tasks)
        if min(self.shape) < 1:
            raise ConfigurationError(
                f"AccuracyMatrix: expected a task and a phase or more, got {tasks} and {phases}."
            )
        zeros = torch.zeros(self.shape, dtype=torch.int64)
        self.add_state("right", zeros, dist_reduce_fx="sum")
        self.add_state("samples", zeros.clone(), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, *, phase: int, task: int) -> None:
        """Add samples of a task, evaluated after a phase.

        Args:
            preds: Scores, shape ``(N, classes)``, or labels, shape ``(N,)``.
            target: True labels, shape ``(N,)``.
            phase: Number of the phase, from 0.
            task: Number of the task, from 0.
        Raises:
            ConfigurationError: There is no such phase or task.
            DataError: Shapes do not fit, or there is no sample.
        """
        if not (0 <= phase < self.shape[0] and 0 <= task < self.shape[1]):
            raise ConfigurationError(
                f"AccuracyMatrix: expected a phase below {self.shape[0]} and a task below "
                f"{self.shape[1]}, got phase {phase} and task {task}."
            )
        right, samples = torch.zeros_like(self.right), torch.zeros_like(self.samples)
        right[phase, task] = (predicted_labels(preds, target) == target).sum()
        samples[phase, task] = len(target)
        self.right, self.samples = self.right + right, self.samples + samples

    def compute(self) -> Tensor:
        """The matrix so far."""
        matrix: Tensor = self.right.double() / self.samples.double()
        return matrix
