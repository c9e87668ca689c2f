"""What a recipe is: a name, a configuration and a function that runs it into a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.run_folder import RunFolder
from aihwkit_lora.registry import Registry
from aihwkit_lora.reporting import Ratio, RunReport, StageRecord, draw, environment


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run that the command line offers.

    Args:
        name: What it is called.
        summary: What it does, in one line.
        config: Frozen dataclass of its options; all have defaults.
        run: From configuration and folder to a report.
        threads: Threads of torch on the command line. Layers of a few thousand weights gain nothing
            from a second one, and lose much where two processes share two cores.
    """

    name: str
    summary: str
    config: type
    run: Callable[[Any, RunFolder], RunReport]
    threads: int = 1


RECIPES: Registry[Recipe] = Registry("recipe")
"""All recipes by name."""


def reported(
    recipe: str,
    config: Any,
    arms: Mapping[str, tuple[StageRecord, ...]],
    ratios: tuple[Ratio, ...] = (),
) -> RunReport:
    """Describe what a run has done.

    Args:
        recipe: Its name.
        config: What it was asked for, ``--quick`` and all; has a chip and a seed.
        arms: Finished stages in order, by arm.
        ratios: Comparisons between arms.
    """
    return RunReport(
        recipe=recipe,
        chip=config.chip,
        seed=config.seed,
        config=dataclasses.asdict(config),
        environment=environment(),
        arms=arms,
        ratios=ratios,
    )


def run_recipe(
    recipe: Recipe,
    config: Any,
    out: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> RunReport:
    """Run a recipe; leave ``report.json`` in a folder, and ``report.png`` if steps were recorded.

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
    if any(stage.steps for stages in report.arms.values() for stage in stages):
        draw(report, out / "report.png")
    return report


def run_seeds(
    recipe: Recipe,
    config: Any,
    out: Path,
    seeds: Sequence[int],
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[RunReport, ...]:
    """Run a recipe once for each seed, in folders ``seed-0``, ``seed-1``, … of one folder.

    Args:
        recipe: What to run.
        config: Its configuration; its own seed is not used.
        out: Folder of all runs.
        seeds: One or more, all different.
        resume: Skip seeds that have a report of this configuration already, and go on with the one
            that was interrupted.
        say: Told what happens, sentence by sentence.
    Returns:
        One report for each seed.
    Raises:
        ConfigurationError: There is no seed, one is given twice, or an earlier run had another
            configuration.
        AihwkitLoraError: Whatever the recipe raises; finished seeds and stages stay on disk.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigurationError(f"expected seeds, all different, found {list(seeds)}.")
    reports = []
    for number, seed in enumerate(seeds, start=1):
        say(f"seed {seed} ({number} of {len(seeds)})")
        seeded = dataclasses.replace(config, seed=seed)
        reports.append(_seed(recipe, seeded, out / f"seed-{seed}", resume=resume, say=say))
    return tuple(reports)


def _seed(
    recipe: Recipe, config: Any, out: Path, *, resume: bool, say: Callable[[str], None]
) -> RunReport:
    if not resume or not (out / "run.json").exists():
        return run_recipe(recipe, config, out, say=say)
    # Also refuses a run of another configuration.
    RunFolder(out, recipe=recipe.name, config=dataclasses.asdict(config), resume=True)
    if (out / "report.json").exists():
        say(f"finished already: {out / 'report.json'}")
        return RunReport.read(out / "report.json")
    return run_recipe(recipe, config, out, resume=True, say=say)
