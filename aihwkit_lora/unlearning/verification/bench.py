"""What a verification works with: the model, the sets, the retrained models, and their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from aihwkit_lora.unlearning.metrics.evaluation import Batch
from aihwkit_lora.unlearning.verification.criteria import Criteria, Judgement
from aihwkit_lora.unlearning.verification.intervals import wilson
from aihwkit_lora.unlearning.verification.report import Finding
from aihwkit_lora.unlearning.verification.samples import Answers

WILSON = "Wilson, 95 %"
BOOTSTRAP = "bootstrap over samples, 95 %"


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything that metrics and attacks need.

    Args:
        model: Under test.
        sets: Batches by name: ``forget``, ``retain``, ``test`` and perhaps ``forget_test``.
        retrained: Models that never saw the forgotten data.
        criteria: When a finding passes.
        seed: Of read noise, resampling and the choice of samples.
    """

    model: nn.Module
    sets: dict[str, tuple[Batch, ...]]
    retrained: tuple[nn.Module, ...]
    criteria: Criteria
    seed: int

    @cached_property
    def answers(self) -> dict[str, Answers]:
        """What the model says, by set."""
        return self._of(self.model)

    @cached_property
    def references(self) -> tuple[dict[str, Answers], ...]:
        """What each retrained model says, by set."""
        return tuple(self._of(model) for model in self.retrained)

    def _of(self, model: nn.Module) -> dict[str, Answers]:
        return {name: Answers.of(model, data, self.seed) for name, data in self.sets.items()}

    @property
    def unseen(self) -> str:
        """Set of samples that were never trained on and are most like the forgotten ones."""
        return "forget_test" if "forget_test" in self.sets else "test"

    def known(self, name: str) -> tuple[float, ...]:
        """Accuracy of each retrained model on a set.

        Args:
            name: Of the set.
        """
        return tuple(reference[name].accuracy for reference in self.references)


def share(
    name: str,
    title: str,
    value: float,
    samples: int,
    *,
    retrained: Sequence[float],
    judge: Callable[[float, Sequence[float]], Judgement],
    attack: bool = False,
    note: str = "",
) -> Finding:
    """Record a share of samples, with its Wilson interval.

    Args:
        name: Key of the finding.
        title: What was measured.
        value: The share, 0 to 1.
        samples: Of how many.
        retrained: That of each retrained model.
        judge: From both to a criterion and a verdict.
        attack: Whether it is an attack.
        note: What else to know.

    Example:
        >>> share("a", "A", 0.0, 20, retrained=[0.0], judge=Criteria().near).verdict
        <Verdict.PASS: 'pass'>
    """
    low, high = wilson(value * samples, samples)
    criterion, verdict = judge(value, retrained)
    return Finding(
        name=name,
        title=title,
        unit="fraction",
        value=value,
        low=min(low, value),
        high=max(high, value),
        interval=WILSON,
        retrained=tuple(retrained),
        criterion=criterion,
        verdict=verdict,
        attack=attack,
        note=note,
    )
