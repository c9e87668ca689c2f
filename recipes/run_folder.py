"""Where a run keeps its finished stages, so that an interrupted one can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.reporting import StageRecord


@dataclass(frozen=True, eq=False)
class Finished:
    """A stage that is done.

    Args:
        model: The model as the stage left it.
        record: What the stage measured and counted.
    """

    model: nn.Module
    record: StageRecord


class RunFolder:
    """One run's folder: configuration, finished stages, logs, report.

    Args:
        path: Created if it is missing.
        recipe: Name of the recipe.
        config: The resolved configuration, plain values only.
        resume: Take over the finished stages of an earlier run of the same configuration instead
            of starting over.
        say: Told in a sentence what happens, for people who wait.
    Raises:
        StageError: There is nothing to resume.
        ConfigurationError: The earlier run had another configuration; the differences are named.
    """

    def __init__(
        self,
        path: Path,
        *,
        recipe: str,
        config: Mapping[str, Any],
        resume: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path, self.say = path, say
        self._stages = path / "stages"
        # JSON and back, so that tuples compare equal to what an earlier run stored.
        described = json.loads(json.dumps({"recipe": recipe, "config": dict(config)}))
        if resume:
            self._require_same(described)
        else:
            # What an earlier run has reported would look like the outcome of this one.
            for old in (*self._stages.glob("*.pt"), *path.glob("report.*")):
                old.unlink()
        self._stages.mkdir(parents=True, exist_ok=True)
        self._config_file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    @property
    def _config_file(self) -> Path:
        return self.path / "run.json"

    def finished(self) -> list[str]:
        """Names of the stages that are on disk, oldest first."""
        files = sorted(self._stages.glob("*.pt"), key=lambda file: file.stat().st_mtime_ns)
        return [file.stem for file in files]

    def stage(self, name: str, run: Callable[[], Finished]) -> Finished:
        """Run a stage and keep it on disk, or take it from there.

        The files are pickles of torch modules: resume only from folders that you trust.

        Args:
            name: Unique within the run; a file name.
            run: Does the work.
        """
        file = self._stages / f"{name}.pt"
        if file.exists():
            self.say(f"{name}: taken from {file}")
            stored: Finished = torch.load(file, weights_only=False)
            return stored
        self.say(f"{name}: running")
        start = time.perf_counter()
        finished = run()
        partial = file.with_suffix(".partial")
        torch.save(finished, partial)
        partial.replace(file)
        self.say(f"{name}: done in {time.perf_counter() - start:.1f} s")
        return finished

    def _require_same(self, described: Mapping[str, Any]) -> None:
        if not self._config_file.exists():
            raise StageError(
                f"'{self.path}': expected a run to resume, got none. Leave out --resume to start."
            )
        stored = json.loads(self._config_file.read_text(encoding="utf-8"))
        before = {"recipe": stored["recipe"], **stored["config"]}
        now = {"recipe": described["recipe"], **described["config"]}
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            differences = ", ".join(
                f"{key} = {before.get(key)} then and {now.get(key)} now" for key in changed
            )
            raise ConfigurationError(
                f"'{self.path}': expected the configuration of the run to resume, got another: "
                f"{differences}. Use the same options, or leave out --resume to start over."
            )
