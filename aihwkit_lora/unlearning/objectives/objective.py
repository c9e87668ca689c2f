"""What an objective is: a small frozen object that turns a model and a batch into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning.objectives.terms import nll, run

Batch = Mapping[str, tuple[Any, Tensor]]
"""``{"forget": (inputs, targets), "retain": (inputs, targets)}``; parts that nobody needs may lack.

Inputs are handed to the model: a tensor as it is, a tuple as positional arguments, a mapping as
keyword arguments.
"""


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What training an unlearning adapter minimises.

    Fields are its parameters. The class says what it is: ``name`` in the registry; ``summary``, one
    sentence; ``formula`` and ``source`` for the docs; ``needs``, of ``"forget"``, ``"retain"`` and
    ``"reference"``; ``bounded``, whether the loss has a lower bound. Without one, training has to
    be stopped after a fixed number of steps. An instance may need less than its class.

    Example:
        >>> import torch
        >>> from aihwkit_lora.unlearning import objectives
        >>> objective = objectives.get("bounded_ga")(bound=3.0)
        >>> batch = {
        ...     "forget": (torch.ones(2, 4), torch.tensor([0, 0])),
        ...     "retain": (torch.zeros(3, 4), torch.tensor([1, 2, 1])),
        ... }
        >>> objective.loss(nn.Linear(4, 3), batch).shape
        torch.Size([])
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    bounded: ClassVar[bool]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Compute what to minimise.

        Args:
            model: Its adapters in training are what shall forget.
            batch: Parts that the objective needs.
            progress: Fraction of the training that is done, 0 to 1, for schedules.
        Returns:
            A scalar.
        Raises:
            DataError: A part is missing, or outputs and targets do not go together.
        """

    def part(self, batch: Batch, key: str) -> tuple[Any, Tensor]:
        """Take a part out of a batch.

        Args:
            batch: What the loader gave.
            key: ``"forget"`` or ``"retain"``.
        Raises:
            DataError: It is not there.
        """
        if key not in batch:
            raise DataError(
                f"objective '{self.name}': expected a batch with '{key}', got {sorted(batch)}. "
                f"Give the loader a '{key}' part."
            )
        return batch[key]

    def require(self, field: str, expected: str, satisfied: bool) -> None:
        """Check a field.

        Args:
            field: Its name.
            expected: What it shall be.
            satisfied: Whether it is.
        Raises:
            ConfigurationError: It is not.
        """
        if not satisfied:
            raise ConfigurationError(
                f"objective '{self.name}': expected {field} {expected}, got "
                f"{getattr(self, field)!r}."
            )


@dataclass(frozen=True, kw_only=True)
class ForgetRetain(Objective):
    """A loss on the forget set plus ``retain_weight`` times a loss on the retain set.

    Args:
        retain_weight: 0 leaves the retain set out; then it is not needed either.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the weight, and need a retain set only with one."""
        self.require("retain_weight", "of 0 or more", self.retain_weight >= 0)
        retain = {"retain"} if self.retain_weight else set()
        object.__setattr__(self, "needs", self.needs - {"retain"} | retain)

    def loss(self, model: nn.Module, batch: Batch, *, progress: float = 0.0) -> Tensor:
        """Add both losses."""
        loss = self.forget_loss(model, *self.part(batch, "forget"))
        if self.retain_weight:
            retained = self.retain_loss(model, *self.part(batch, "retain"))
            loss = loss + self.retain_weight * retained
        return loss

    @abstractmethod
    def forget_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compute the loss on the forget set.

        Args:
            model: As for :meth:`loss`.
            inputs: What the model is given.
            targets: What it was taught to answer.
        """

    def retain_loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Compute the loss on the retain set, cross-entropy unless overridden.

        Args:
            model: As for :meth:`loss`.
            inputs: What the model is given.
            targets: What it shall answer.
        """
        return nll(run(model, inputs), targets).mean()
