"""The record of one verification: what was measured, against what, and what that does not show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.registry import nearest
from aihwkit_lora.unlearning.levels import ForgettingLevel

SCHEMA = 1
"""Version of the file. Fields may be added under one version, never renamed."""


class Verdict(StrEnum):
    """What a criterion says about a finding.

    Example:
        >>> str(Verdict.NOT_JUDGED)
        'not judged'
    """

    PASS = "pass"
    FAIL = "fail"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of a report: a number, its interval, the retrained models', and a verdict.

    Args:
        name: Key, the same in every report.
        title: What was measured, in words.
        unit: ``"fraction"``, ``"nats"``, ``"steps"`` or ``"ratio"``.
        value: What was measured; None where it was not reached, as with steps.
        low: Lower end of the interval, None if there is none.
        high: Upper end of the interval, None if there is none.
        interval: How the interval came about, for example ``"Wilson, 95 %"``.
        retrained: The same number of each retrained model; empty without any.
        criterion: What the verdict goes by, in words.
        verdict: Whether the criterion is met.
        attack: Whether somebody tries to get the forgotten data back.
        note: What else the reader should know.
    Raises:
        ConfigurationError: A number is not finite, or only one end of the interval is given.

    Example:
        >>> finding = Finding(name="forget_accuracy", title="forgotten", unit="fraction", value=0.0)
        >>> finding.verdict, finding.retrained_mean
        (<Verdict.NOT_JUDGED: 'not judged'>, None)
    """

    name: str
    title: str
    unit: str
    value: float | None
    low: float | None = None
    high: float | None = None
    interval: str = ""
    retrained: tuple[float | None, ...] = ()
    criterion: str = ""
    verdict: Verdict = Verdict.NOT_JUDGED
    attack: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "retrained", tuple(self.retrained))
        object.__setattr__(self, "verdict", Verdict(self.verdict))
        for number in (self.value, self.low, self.high, *self.retrained):
            if number is not None and not math.isfinite(number):
                raise ConfigurationError(
                    f"finding '{self.name}': expected finite numbers, got {number!r}. Leave out "
                    "what does not exist."
                )
        if (self.low is None) != (self.high is None):
            raise ConfigurationError(
                f"finding '{self.name}': expected both ends of an interval or none, got "
                f"{self.low!r} and {self.high!r}."
            )

    @property
    def retrained_mean(self) -> float | None:
        """Mean of the retrained models; None if there is none, or one never reached it."""
        known = [number for number in self.retrained if number is not None]
        return sum(known) / len(known) if known and len(known) == len(self.retrained) else None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Undo ``dataclasses.asdict``.

        Args:
            stored: Fields by name; unknown ones, of a later version, do not matter.
        """
        return cls(**{name: stored[name] for name in cls.__dataclass_fields__ if name in stored})


@dataclass(frozen=True, kw_only=True)
class ForgettingReport:
    """What a verification found, and what it does not show.

    Args:
        level: How far the forgotten data is out of reach.
        references: How many retrained models the findings are compared with; 0 means that nothing
            here is compared with anything.
        findings: In the order in which they are shown.
        does_not_show: Sentences about the limits; never empty.
        samples: Number of samples in each set.
        settings: What the attacks were run with: chips, deviations, steps, seeds.
        series: Numbers behind a finding, such as one accuracy for each chip.
        retraining: What making the retrained models took, counted; None if nobody counted.
        reads: What the verification itself took; None if nobody counted.
    Raises:
        ConfigurationError: Two findings have one name, or no limit is named.

    Example:
        >>> report = ForgettingReport(
        ...     level="suppressed", references=0, findings=(), does_not_show=("It is a test.",)
        ... )
        >>> ForgettingReport.from_dict(report.to_dict()) == report
        True
    """

    level: ForgettingLevel
    references: int
    findings: tuple[Finding, ...]
    does_not_show: tuple[str, ...]
    samples: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    retraining: Counts | None = None
    reads: Counts | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", ForgettingLevel(self.level))
        object.__setattr__(self, "findings", tuple(self.findings))
        object.__setattr__(self, "does_not_show", tuple(self.does_not_show))
        object.__setattr__(self, "series", {k: tuple(v) for k, v in self.series.items()})
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))
        names = [finding.name for finding in self.findings]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigurationError(
                f"forgetting report: expected one finding of each name, got {', '.join(twice)} "
                "more than once."
            )
        if not self.does_not_show:
            raise ConfigurationError(
                "forgetting report: expected at least one sentence about what it does not show, "
                "got none. Every test has limits."
            )

    @property
    def metrics(self) -> tuple[Finding, ...]:
        """Findings about the model as it is used."""
        return tuple(finding for finding in self.findings if not finding.attack)

    @property
    def attacks(self) -> tuple[Finding, ...]:
        """Findings about the model under attack."""
        return tuple(finding for finding in self.findings if finding.attack)

    @property
    def reference(self) -> str:
        """What the findings are compared with, in words."""
        if not self.references:
            return "no reference"
        return f"{self.references} retrained model{'s' * (self.references > 1)}"

    def count(self, verdict: Verdict | str) -> int:
        """How many findings have a verdict.

        Args:
            verdict: ``"pass"``, ``"fail"`` or ``"not judged"``.
        """
        return sum(finding.verdict == Verdict(verdict) for finding in self.findings)

    def finding(self, name: str) -> Finding:
        """Return the finding of a name.

        Args:
            name: Its key.
        Raises:
            UnknownNameError: There is none.
        """
        found = {each.name: each for each in self.findings}
        if name not in found:
            raise UnknownNameError(f"unknown finding '{name}'. {nearest(name, found)}")
        return found[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "level": str(self.level),
            "level_means": self.level.meaning,
            "reference": self.reference,
            "references": self.references,
            "findings": [_stored(finding) for finding in self.findings],
            "does_not_show": list(self.does_not_show),
            "samples": dict(self.samples),
            "settings": dict(self.settings),
            "series": {name: list(values) for name, values in self.series.items()},
            "retraining": None if self.retraining is None else self.retraining.to_dict(),
            "reads": None if self.reads is None else self.reads.to_dict(),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`.

        Args:
            stored: What :meth:`to_dict` gave.
        Raises:
            DataError: It is of another schema, or incomplete.
        """
        if stored.get("schema") != SCHEMA:
            raise DataError(
                f"forgetting report: expected schema {SCHEMA}, got {stored.get('schema')!r}. Read "
                "it with the version of aihwkit_lora that wrote it."
            )
        try:
            return cls(
                level=ForgettingLevel(stored["level"]),
                references=stored["references"],
                findings=tuple(Finding.from_dict(each) for each in stored["findings"]),
                does_not_show=tuple(stored["does_not_show"]),
                samples=stored["samples"],
                settings=stored["settings"],
                series=stored["series"],
                retraining=_counts(stored["retraining"]),
                reads=_counts(stored["reads"]),
            )
        except KeyError as error:
            raise DataError(
                f"forgetting report: expected the field {error}, got a file without it. Write it "
                "anew with report.write(path)."
            ) from error

    def write(self, path: Path | str) -> Path:
        """Write the report as JSON, all of it or nothing.

        Args:
            path: File to write, replaced if it is there.
        """
        path = Path(path)
        part = path.with_name(path.name + ".part")
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
        return path

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a report.

        Args:
            path: File that :meth:`write` wrote.
        Raises:
            DataError: It is no such file.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"'{path}': expected a forgetting report as JSON, got none ({error})."
            ) from error
        if not isinstance(stored, dict):
            raise DataError(
                f"'{path}': expected a forgetting report as JSON, got a list or number."
            )
        return cls.from_dict(stored)


def _stored(finding: Finding) -> dict[str, Any]:
    mean = finding.retrained_mean
    return asdict(finding) | {"verdict": str(finding.verdict), "retrained_mean": mean}


def _counts(stored: Mapping[str, Any] | None) -> Counts | None:
    return None if stored is None else Counts.from_dict(stored)
