"""When a finding passes: always a comparison with retrained models, never an absolute number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.unlearning.verification.report import Verdict

NO_REFERENCE = "no reference"
"""What stands in the place of a criterion when there is no retrained model."""

Judgement = tuple[str, Verdict]
"""A criterion in words, and whether it is met."""


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """How close to retrained models is close enough. Choose them before looking at results.

    The range of the retrained models, from the lowest to the highest, always counts as close.

    Args:
        accuracy: Tolerance of accuracies, as a fraction, 0 to 1.
        membership: Tolerance of what membership attacks give, as a fraction, 0 to 1.
        divergence: Largest Jensen-Shannon divergence, as a multiple of the largest that two
            retrained models have between them; 1 or more.
        tug_of_war: How far below the least of two retrained models Tug-of-War may be, 0 to 1.
        relearn: Least share of the retrained models' relearning steps, 0 to 1.
        blind: Accuracy at telling retained from unseen samples up to which a membership attacker
            is at chance, 0 to 1; what a blind one says is not judged.
    Raises:
        ConfigurationError: A field is out of its range.

    Example:
        >>> Criteria().near(0.93, [0.95, 0.97])
        ('within 5 points of retrained', <Verdict.PASS: 'pass'>)
    """

    accuracy: float = 0.05
    membership: float = 0.10
    divergence: float = 1.5
    tug_of_war: float = 0.05
    relearn: float = 0.5
    blind: float = 0.55

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            low, high = (1.0, math.inf) if each.name == "divergence" else (0.0, 1.0)
            if not (low <= value <= high and math.isfinite(value)):
                expected = "1 or more" if each.name == "divergence" else "0 to 1"
                raise ConfigurationError(
                    f"criteria: expected {each.name} of {expected}, got {value!r}."
                )

    def near(self, value: float, retrained: Sequence[float]) -> Judgement:
        """Ask that an accuracy is that of the retrained models.

        Args:
            value: A fraction.
            retrained: That of each retrained model.
        """
        return self._near(value, retrained, self.accuracy)

    def near_membership(
        self, value: float, retrained: Sequence[float], sight: float = 1.0
    ) -> Judgement:
        """Ask that a membership attack finds what it finds on retrained models.

        Args:
            value: A fraction.
            retrained: That of each retrained model.
            sight: How well the attacker tells apart what it was trained to; 0.5 is chance.
        """
        if retrained and sight <= self.blind:
            return "the attacker is at chance", Verdict.NOT_JUDGED
        return self._near(value, retrained, self.membership)

    @staticmethod
    def _near(value: float, retrained: Sequence[float], tolerance: float) -> Judgement:
        if not retrained:
            return NO_REFERENCE, Verdict.NOT_JUDGED
        inside = min(retrained) - tolerance <= value <= max(retrained) + tolerance
        return f"within {_points(tolerance)} of retrained", _verdict(inside)

    def at_most(self, value: float, retrained: Sequence[float]) -> Judgement:
        """Ask that an attack does not get more out than there is in a retrained model.

        Args:
            value: A fraction.
            retrained: That of each retrained model.
        """
        if not retrained:
            return NO_REFERENCE, Verdict.NOT_JUDGED
        inside = value <= max(retrained) + self.accuracy
        return f"at most {_points(self.accuracy)} above retrained", _verdict(inside)

    def near_floor(self, value: float, floors: Sequence[float]) -> Judgement:
        """Ask that the divergence is about that between two retrained models.

        Args:
            value: Divergence from the retrained models.
            floors: Divergences between pairs of retrained models.
        """
        if not floors:
            return "needs two retrained models", Verdict.NOT_JUDGED
        criterion = f"at most {self.divergence:g} × retrained against retrained"
        return criterion, _verdict(value <= self.divergence * max(floors))

    def near_ceiling(self, value: float, ceilings: Sequence[float]) -> Judgement:
        """Ask that Tug-of-War is about that of one retrained model against another.

        Args:
            value: Tug-of-War against the retrained models.
            ceilings: That of pairs of retrained models.
        """
        if not ceilings:
            return "needs two retrained models", Verdict.NOT_JUDGED
        criterion = f"at most {_points(self.tug_of_war)} below retrained against retrained"
        return criterion, _verdict(value >= min(ceilings) - self.tug_of_war)

    def slow_enough(self, steps: int | None, retrained: Sequence[int | None]) -> Judgement:
        """Ask that relearning takes about as long as learning takes a retrained model.

        Args:
            steps: Until the accuracy is reached; None if it never is.
            retrained: The same of each retrained model.
        """
        if not retrained:
            return NO_REFERENCE, Verdict.NOT_JUDGED
        fastest = min(math.inf if each is None else each for each in retrained)
        if fastest == 0:
            return "retrained models need no step, so nothing follows", Verdict.NOT_JUDGED
        taken = math.inf if steps is None else steps
        slow = taken == math.inf or taken >= self.relearn * fastest
        return f"at least {self.relearn:g} × the fastest retrained model's steps", _verdict(slow)


def _points(fraction: float) -> str:
    return f"{100 * fraction:g} points"


def _verdict(met: bool) -> Verdict:
    return Verdict.PASS if met else Verdict.FAIL
