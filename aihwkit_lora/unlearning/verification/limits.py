"""What a verification does not show, said in every report."""

from __future__ import annotations

from collections.abc import Iterator

from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.verification.report import Finding

_OF_LEVEL = {
    ForgettingLevel.SUPPRESSED: (
        "The arrays still hold what was forgotten: whoever reads them out, or runs the model "
        "without its adapter, gets it back.",
        "The adapter itself tells what was suppressed. Handle its file as personal data.",
    ),
    ForgettingLevel.EXACT_ADAPTER: (
        "Whether the data only ever lived in the adapter that is gone is for the request log to "
        "say; outputs cannot tell.",
    ),
    ForgettingLevel.REPROGRAMMED: (
        "Whether a cell keeps a trace of what it held before was not measured.",
    ),
}
_ALWAYS = (
    "There is no formal guarantee: an attack that finds nothing may be too weak. Membership "
    "attacks on a whole set overestimate protection (arXiv:2403.01218).",
    "Copies elsewhere were not looked at: data sets, checkpoints, replay items, logs, other chips.",
    "It is a measurement, no legal assessment.",
)
_PROBE = (
    "A new last layer, and relearning, succeed on retrained models too where the task is easy; "
    "alone these numbers prove nothing."
)
_CHIPS = (
    "Chips were simulated: each cell errs on its own, by a normal distribution. Drift, stuck cells "
    "and errors that cells share were not part of it."
)


def limits(
    level: ForgettingLevel, references: int, findings: tuple[Finding, ...]
) -> tuple[str, ...]:
    """Sentences for a report.

    Args:
        level: How far the data is out of reach.
        references: Number of retrained models.
        findings: What was measured; what was not is named.

    Example:
        >>> limits(ForgettingLevel.SUPPRESSED, 0, ())[0]
        'The arrays still hold what was forgotten: whoever reads them out, or runs the model ...
    """
    return (*_OF_LEVEL[level], *_of_references(references), *_of_attacks(findings), *_ALWAYS)


def _of_references(references: int) -> Iterator[str]:
    if references == 0:
        yield (
            "No reference: no retrained model was given, so nothing here says how a model behaves "
            "that never saw the data."
        )
    elif references == 1:
        yield (
            "One retrained model has no spread: how far two of them are apart, the best that can "
            "be expected, is not known."
        )


def _of_attacks(findings: tuple[Finding, ...]) -> Iterator[str]:
    names = {finding.name for finding in findings}
    missing = {
        "relearn_steps": "relearning",
        "linear_probe": "a linear probe",
        "quantised_accuracy": "quantised adapters",
        "noisy_worst_accuracy": "noisy programmings",
        "adapter_off_accuracy": "adapters off",
    }
    left_out = [title for name, title in missing.items() if name not in names]
    if left_out:
        yield f"Not tried: {', '.join(left_out)}."
    if names & {"linear_probe", "relearn_steps"}:
        yield _PROBE
    if "noisy_worst_accuracy" in names:
        yield _CHIPS
