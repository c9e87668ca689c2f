"""What a recipe is: a name, a configuration and a function that runs it into a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aihwkit_lora.recipes.run_folder import RunFolder
from aihwkit_lora.registry import Registry
from aihwkit_lora.reporting import RunReport, draw


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run that the command line offers.

    Args:
        name: What it is called.
        summary: What it does, in one line.
        config: Frozen dataclass of its options; all have defaults.
        run: From configuration and folder to a report.
    """

    name: str
    summary: str
    config: type
    run: Callable[[Any, RunFolder], RunReport]


RECIPES: Registry[Recipe] = Registry("recipe")
"""All recipes by name."""


def run_recipe(
    recipe: Recipe,
    config: Any,
    out: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> RunReport:
    """Run a recipe; leave ``report.json`` and ``report.png`` in a folder.

    Args:
        recipe: What to run.
        config: Its configuration.
        out: Folder of the run.
        resume: Go on after the stages that an earlier run has finished there.
        say: Told what happens, sentence by sentence.
    Returns:
        The report, as written.
    Raises:
        AihwkitLoraError: Whatever the recipe or the folder raises; finished stages stay on disk.
    """
    folder = RunFolder(
        out, recipe=recipe.name, config=dataclasses.asdict(config), resume=resume, say=say
    )
    report = recipe.run(config, folder)
    report.write(out / "report.json")
    draw(report, out / "report.png")
    return report
