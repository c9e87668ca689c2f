"""What forgetting means: how far the forgotten data is out of reach."""

from __future__ import annotations

from enum import StrEnum


class ForgettingLevel(StrEnum):
    """How far forgotten data is out of reach; every result names its level.

    Example:
        >>> ForgettingLevel("suppressed").meaning
        'The arrays still hold it; an adapter keeps it out of the outputs.'
    """

    SUPPRESSED = "suppressed"
    EXACT_ADAPTER = "exact-adapter"
    REPROGRAMMED = "reprogrammed"

    @property
    def meaning(self) -> str:
        """One sentence for reports."""
        return _MEANINGS[self]


_MEANINGS = {
    ForgettingLevel.SUPPRESSED: "The arrays still hold it; an adapter keeps it out of the outputs.",
    ForgettingLevel.EXACT_ADAPTER: "It only ever lived in an adapter that is destroyed.",
    ForgettingLevel.REPROGRAMMED: "The arrays were written again without it; pulses are counted.",
}
