"""The whole protocol, from one call: metrics, attacks, verdicts, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from torch import nn

from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.errors import ConfigurationError, SealError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.metering.observe import observe
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.reference import adapted_layers
from aihwkit_lora.unlearning.verification.attacks import (
    NoiseAttack,
    RelearnAttack,
    Series,
    Watch,
    adapter_off,
    noisy,
    probed,
    quantised,
    relearned,
)
from aihwkit_lora.unlearning.verification.bench import Bench
from aihwkit_lora.unlearning.verification.criteria import Criteria
from aihwkit_lora.unlearning.verification.limits import limits
from aihwkit_lora.unlearning.verification.outputs import output_findings
from aihwkit_lora.unlearning.verification.references import Retrained, RetrainedReferences
from aihwkit_lora.unlearning.verification.report import Finding, ForgettingReport
from aihwkit_lora.unlearning.verification.samples import Data, batches_of

PHASE = "verify"
"""Phase of the ledger that reads of a verification are counted under."""


def verify_forgetting(
    model: nn.Module,
    *,
    forget: Data,
    retain: Data,
    test: Data,
    forget_test: Data | None = None,
    retrained: RetrainedReferences | Retrained | Sequence[nn.Module] = (),
    level: ForgettingLevel | str = ForgettingLevel.SUPPRESSED,
    relearn: RelearnAttack | None = RelearnAttack(),  # noqa: B008 — frozen
    bits: Sequence[int] = (8, 7, 6, 5, 4, 3, 2),
    chips: int = 100,
    sigma_siemens: float = 5e-6,
    mapping: ConductanceMapping | None = None,
    features: str | None = None,
    criteria: Criteria = Criteria(),  # noqa: B008 — frozen
    audit_reason: str = "",
    ledger: Ledger | None = None,
    seed: int = 0,
) -> ForgettingReport:
    """Measure whether a classifier has forgotten, against retrained models and under attack.

    The model is left as it was. Metrics: accuracies, Tug-of-War, Jensen-Shannon divergence with
    the floor between retrained models, two membership attacks, the adapters' share of the weights.
    Attacks: adapters off, relearning, a linear probe, adapters in few bits, many noisy
    programmings. What a model cannot be asked (no adapter, no frozen array) is left out and named.

    Source: the protocol of SalUn (arXiv:2310.12508) and RUM (arXiv:2406.01257), attacks of
    arXiv:2406.13356, arXiv:2604.08271, arXiv:2410.16454 and the noise of arXiv:2601.10037.

    Args:
        model: Gives logits, or an object with ``logits``; usually a PEFT model on frozen layers.
        forget: Forgotten training samples: inputs and labels ``(n,)``, or batches of them.
        retain: Training samples that stay.
        test: Samples that were never trained on, without what is forgotten.
        forget_test: Samples like the forgotten ones that were never trained on.
        retrained: Models that never saw the forgotten data, with the same outputs. Pass
            :class:`RetrainedReferences` to have them cached and their cost counted.
        level: How far the data is claimed to be out of reach.
        relearn: How relearning is tried; None for not at all.
        bits: Widths of the adapters that are tried, each 2 to 16; empty for none.
        chips: Number of noisy programmings; 0 for none.
        sigma_siemens: Standard deviation of each cell's error, 0 or more.
        mapping: Cells and window of layers whose programming does not say.
        features: Layer whose inputs the probe gets; the last one that runs if None.
        criteria: When a finding passes.
        audit_reason: Why adapters are switched off, for the log of a sealed model.
        ledger: Counts what the frozen arrays and adapters did, under the phase ``"verify"``, and
            the writing of retrained models under ``"retrain"``. Counting is slower than not.
        seed: Of read noise, chips, and the choice of samples.
    Returns:
        A report with a verdict for each finding.
    Raises:
        DataError: A set is empty, or too small for an attack.
        ConfigurationError: A setting is out of range, or a model lacks the layer to probe.
        SealError: The model is sealed and ``audit_reason`` is empty.

    Example:
        >>> import torch
        >>> import aihwkit_lora as al
        >>> from peft import get_peft_model
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(6, 3)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> model = get_peft_model(model, al.AnalogLoraConfig.for_model(model, r=2))
        >>> x, y = torch.randn(24, 6), torch.arange(24) % 3
        >>> report = verify_forgetting(
        ...     model,
        ...     forget=(x[y == 2], y[y == 2]),
        ...     retain=(x[y < 2], y[y < 2]),
        ...     test=(x[y < 2].flip(0), y[y < 2].flip(0)),
        ...     relearn=None,
        ...     bits=(8,),
        ...     chips=2,
        ...     mapping=chip.mapping,
        ... )
        >>> str(report.level), report.reference, len(report.attacks)
        ('suppressed', 'no reference', 6)
    """
    if chips < 0:
        raise ConfigurationError(f"verify_forgetting: expected chips of 0 or more, got {chips}.")
    level, audit = ForgettingLevel(level), _audit(model, audit_reason)
    known = _loaded(retrained, ledger)
    sets = {"forget": forget, "retain": retain, "test": test, "forget_test": forget_test}
    batches = {name: batches_of(name, data) for name, data in sets.items() if data is not None}
    bench = Bench(model, batches, known.models, criteria, seed)
    noise = NoiseAttack(chips=chips, sigma_siemens=sigma_siemens, mapping=mapping)
    series: Series = {}
    reads, watch = _counting(ledger, mapping)
    with watch(model):
        findings = [*output_findings(bench), *adapter_off(bench, audit)]
        for finding, numbers in _with_series(bench, relearn, features, bits, noise, watch):
            findings.append(finding)
            series |= numbers
    return ForgettingReport(
        level=level,
        references=len(known.models),
        findings=tuple(findings),
        does_not_show=limits(level, len(known.models), tuple(findings)),
        samples={name: sum(len(y) for _, y in data) for name, data in batches.items()},
        settings={
            "relearn": None if relearn is None else asdict(relearn),
            "bits": list(bits),
            "chips": chips,
            "sigma_siemens": sigma_siemens,
            "criteria": asdict(criteria),
            "seed": seed,
        },
        series=series,
        retraining=known.counts,
        reads=reads(),
    )


def _with_series(
    bench: Bench,
    relearn: RelearnAttack | None,
    features: str | None,
    bits: Sequence[int],
    noise: NoiseAttack,
    watch: Watch,
) -> Iterator[tuple[Finding, Series]]:
    if relearn is not None:
        yield from relearned(bench, relearn)
    for finding in probed(bench, features):
        yield finding, {}
    yield from quantised(bench, bits, watch)
    if noise.chips:
        yield from noisy(bench, noise)


def _loaded(
    retrained: RetrainedReferences | Retrained | Sequence[nn.Module], ledger: Ledger | None
) -> Retrained:
    if isinstance(retrained, RetrainedReferences):
        return retrained.load(ledger)
    return retrained if isinstance(retrained, Retrained) else Retrained(tuple(retrained))


def _audit(model: nn.Module, reason: str) -> Callable[[], AbstractContextManager[Any]]:
    """Make the block in which adapters can be off: on the record where the model is sealed."""
    if not any(True for _ in adapted_layers(model)):
        return nullcontext
    # Late, since it imports PEFT.
    from aihwkit_lora.unlearning.auditing import audit
    from aihwkit_lora.unlearning.seal import seals

    sealed = seals(model)
    if not sealed:
        return nullcontext
    if not reason:
        raise SealError(
            f"verify_forgetting: expected a reason for the log, since the model has {sealed[0]} "
            "sealed and switching adapters off is part of the protocol, got none. Pass "
            "audit_reason='…'."
        )
    return lambda: audit(model, reason=reason)


def _counting(
    ledger: Ledger | None, mapping: ConductanceMapping | None
) -> tuple[Callable[[], Counts | None], Watch]:
    """Make what counts a model's reads, and what tells them at the end."""
    if ledger is None:
        return (lambda: None), (lambda _: nullcontext())
    before = ledger.total(phase=PHASE)
    return (
        lambda: ledger.since(before, phase=PHASE),
        lambda model: observe(model, ledger, phase=PHASE, mapping=mapping),
    )
