"""The record of a run: one JSON file that the summary, the picture and comparisons are made of."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.registry import nearest
from aihwkit_lora.reporting.records import Ratio, StageRecord

SCHEMA = 1
"""Version of the file. Fields may be added under one version, never renamed."""

_DISTRIBUTIONS = ("aihwkit-lora", "aihwkit", "torch", "peft", "pytorch-lightning")


def environment() -> dict[str, str]:
    """Name the versions that a result may depend on.

    Returns:
        Versions by distribution, of Python, and the kind of machine; nothing that tells whose.

    Example:
        >>> sorted(environment())[:4]
        ['aihwkit', 'aihwkit-lora', 'peft', 'platform']
    """
    found = {"python": platform.python_version()}
    for distribution in _DISTRIBUTIONS:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    return found | {"platform": f"{platform.system()} {platform.machine()}"}


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that a run leaves behind.

    Args:
        recipe: Name of the recipe.
        chip: Name of the chip that it was priced for.
        seed: Of all random numbers.
        config: The resolved configuration: anything that JSON can hold; tuples become lists.
        environment: Versions, see :func:`environment`.
        arms: Finished stages in order, by arm: ``hybrid``, ``reprogram``, …
        ratios: Comparisons between arms.
    Raises:
        ConfigurationError: The configuration holds something that JSON cannot, or an arm has two
            stages of one name.

    Example:
        >>> report = RunReport(
        ...     recipe="face_recognition",
        ...     chip="rm-180nm",
        ...     seed=0,
        ...     config={"rank": 6},
        ...     environment=environment(),
        ...     arms={"hybrid": ()},
        ...     ratios=(),
        ... )
        >>> RunReport.from_dict(report.to_dict()) == report
        True
    """

    recipe: str
    chip: str
    seed: int
    config: Mapping[str, Any]
    environment: Mapping[str, str]
    arms: Mapping[str, tuple[StageRecord, ...]]
    ratios: tuple[Ratio, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _plain(self.config))
        object.__setattr__(self, "arms", {k: tuple(v) for k, v in self.arms.items()})
        object.__setattr__(self, "ratios", tuple(self.ratios))
        for arm, stages in self.arms.items():
            names = [stage.name for stage in stages]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ConfigurationError(
                    f"arm '{arm}': expected one stage of each name, got {', '.join(twice)} more "
                    "than once. Rename one."
                )

    def stage(self, arm: str, name: str) -> StageRecord:
        """Find one stage.

        Args:
            arm: Name of the arm.
            name: Name of the stage.
        Raises:
            UnknownNameError: The report has no such arm, or the arm no such stage.
        """
        if arm not in self.arms:
            raise UnknownNameError(f"unknown arm '{arm}'. {nearest(arm, self.arms)}")
        stages = {stage.name: stage for stage in self.arms[arm]}
        if name not in stages:
            raise UnknownNameError(
                f"unknown stage '{name}' of arm '{arm}'. {nearest(name, stages)}"
            )
        return stages[name]

    def with_stage(self, arm: str, stage: StageRecord) -> RunReport:
        """Return this report with one more stage, or with one replaced by another of its name.

        Args:
            arm: Name of the arm; a new one if the report has none of this name.
            stage: What is added at the end of the arm, or put in the old one's place.
        """
        stages = list(self.arms.get(arm, ()))
        places = [place for place, old in enumerate(stages) if old.name == stage.name]
        place = places[0] if places else len(stages)
        stages[place : place + 1] = [stage]
        return replace(self, arms={**self.arms, arm: tuple(stages)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "chip": self.chip,
            "seed": self.seed,
            "config": self.config,
            "environment": dict(self.environment),
            "arms": {
                arm: {"stages": [stage.to_dict() for stage in stages]}
                for arm, stages in self.arms.items()
            },
            "ratios": [ratio.to_dict() for ratio in self.ratios],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunReport:
        """Undo :meth:`to_dict`.

        Args:
            stored: What :meth:`to_dict` gave.
        """
        return cls(
            recipe=stored["recipe"],
            chip=stored["chip"],
            seed=stored["seed"],
            config=stored["config"],
            environment=stored["environment"],
            arms={
                arm: tuple(StageRecord.from_dict(stage) for stage in found["stages"])
                for arm, found in stored["arms"].items()
            },
            ratios=tuple(Ratio.from_dict(ratio) for ratio in stored["ratios"]),
        )

    def write(self, path: str | Path) -> None:
        """Write the report at once or not at all: who reads it meanwhile sees the old one.

        Args:
            path: File to write; its folder is made if need be.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: str | Path) -> RunReport:
        """Read a report.

        Args:
            path: A file that :meth:`write` made.
        Raises:
            DataError: There is no such file, or it is not a report of this version.
        """
        path = Path(path)
        stored = _read_json(path)
        found = stored.get("schema") if isinstance(stored, dict) else None
        if found != SCHEMA:
            raise DataError(
                f"{path}: expected a report of schema {SCHEMA}, got {found!r}. Read it with the "
                "version of aihwkit-lora that wrote it, or run the recipe again."
            )
        try:
            return cls.from_dict(stored)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: expected a complete report, got one that fails with "
                f"{type(error).__name__}: {error}. Run the recipe again."
            ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: expected a report, got '{error.strerror}'. Give the path of a report.json."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: expected JSON, got '{error}'. Give the path of a report.json."
        ) from error


def _plain(config: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(config), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"config: expected values that JSON can hold, got '{error}'. Turn it into a string or "
            "a finite number."
        ) from error
