"""The command ``aihwkit-lora run``: which recipe, with which options, for one seed or several."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes import RECIPES, Recipe, progress
from aihwkit_lora.recipes.options import (
    Parser,
    add_arguments,
    build,
    field_types,
    read_run,
    shipped,
)
from aihwkit_lora.recipes.recipe import run_recipe, run_seeds
from aihwkit_lora.registry import nearest
from aihwkit_lora.reporting import compare, print_comparison, print_summary

_USAGE = (
    "usage: aihwkit-lora run RECIPE [--out DIR] [--config FILE] [--seeds N …] [--resume] [OPTION …]"
    "\n       aihwkit-lora run --config FILE …"
)


def run_command(options: argparse.Namespace, console: Console) -> int:
    """Run what the command line asks for.

    Args:
        options: ``help``, ``out``, ``config`` and ``resume``; ``rest`` has the recipe's name, if it
            is given, and then the recipe's own options.
        console: Where to print.
    Returns:
        0, since everything else raises.
    Raises:
        ConfigurationError: No recipe is named, or two; an option is unknown; or its value is wrong.
        AihwkitLoraError: Whatever the recipe raises. Finished stages stay on disk.
    """
    name, rest = _named_first(options.rest)
    in_file, from_file = read_run(options.config) if options.config else (None, {})
    if name is None and in_file is None:
        return _help(options, console)
    recipe = _recipe(name, in_file, options.config)
    parser = _parser(recipe)
    if options.help:
        parser.print_help()
        return 0
    chosen = _parsed(parser, rest)
    seeds = _seeds(recipe, chosen)
    config: Any = build(recipe.config, {**from_file, **chosen})
    out = options.out or Path("runs") / recipe.name
    try:
        _run(recipe, config, out, seeds, resume=options.resume, console=console)
    except BaseException:
        _say_how_to_resume(out, recipe.name, rest, options.config)
        raise
    return 0


def list_recipes(console: Console) -> None:
    """Print all recipes, and the configurations that come with the package.

    Args:
        console: Where to print.
    """
    for name in RECIPES:
        console.print(f"{name}: {RECIPES.get(name).summary}", highlight=False, markup=False)


def _run(
    recipe: Recipe,
    config: Any,
    out: Path,
    seeds: Sequence[int] | None,
    *,
    resume: bool,
    console: Console,
) -> None:
    torch.set_num_threads(recipe.threads)

    def say(sentence: str) -> None:
        console.print(sentence, markup=False)

    with progress.showing():
        if seeds is not None:
            reports = run_seeds(recipe, config, out, seeds, resume=resume, say=say)
            print_comparison(compare(reports), console)
            console.print(f"\nreports: {out}/seed-*/report.json\npage:    aihwkit-lora page {out}")
            return
        report = run_recipe(recipe, config, out, resume=resume, say=say)
    print_summary(report, console)
    console.print(f"\nreport:  {out / 'report.json'}")
    if (out / "report.png").exists():
        console.print(f"picture: {out / 'report.png'}")


def _named_first(rest: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if it is named before all options of its own; and those."""
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    return None, rest


def _help(options: argparse.Namespace, console: Console) -> int:
    if not options.help:
        raise ConfigurationError(
            f"expected a recipe. {nearest('', RECIPES)} Name it, or a configuration that names "
            "one. Try: aihwkit-lora run --help"
        )
    console.print(_USAGE, markup=False, highlight=False)
    list_recipes(console)
    console.print(f"FILE is YAML, or one of: {', '.join(shipped())}", highlight=False)
    return 0


def _recipe(named: str | None, in_file: str | None, file: str | None) -> Recipe:
    if named is not None and in_file is not None and named != in_file:
        raise ConfigurationError(
            f"'{file}': expected options of '{named}', found those of '{in_file}'. Leave out the "
            "name of the recipe, or choose another file."
        )
    return RECIPES.get(named or in_file or "")


def _parser(recipe: Recipe) -> Parser:
    # --out, --config and --resume were taken by the parser before; they are here for the help.
    parser = Parser(
        prog=f"aihwkit-lora run {recipe.name}",
        description=recipe.summary,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--out", metavar="DIR", help=f"default: runs/{recipe.name}")
    parser.add_argument("--config", metavar="FILE", help=f"YAML, or of: {', '.join(shipped())}")
    parser.add_argument("--resume", action="store_true", help="go on after the last stage")
    if "seeds" not in field_types(recipe.config):
        parser.add_argument(
            "--seeds",
            type=int,
            nargs="+",
            metavar="N",
            help="run once for each, in sub-folders; with --resume, finished ones are skipped",
        )
    add_arguments(parser, recipe.config)
    return parser


def _parsed(parser: Parser, rest: list[str]) -> dict[str, Any]:
    options, unknown = parser.parse_known_args(rest)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigurationError(f"unknown option '{unknown[0]}'. {nearest(unknown[0], known)}")
    return vars(options)


def _seeds(recipe: Recipe, chosen: dict[str, Any]) -> list[int] | None:
    """Take the seeds out of what was chosen, where they are no option of the recipe's own."""
    if "seeds" in field_types(recipe.config):
        return None
    seeds: list[int] | None = chosen.pop("seeds", None)
    if seeds is not None and "seed" in chosen:
        raise ConfigurationError("expected --seed or --seeds, found both. Leave one out.")
    return seeds


def _say_how_to_resume(out: Path, recipe: str, rest: list[str], config: str | None) -> None:
    finished = [*out.glob("stages/*.pt"), *out.glob("seed-*/stages/*.pt")]
    if not finished:
        return
    command = ["aihwkit-lora", "run", recipe, "--out", str(out), "--resume", *rest]
    if config is not None:
        command += ["--config", config]
    names = ", ".join(sorted(str(f.parents[1].relative_to(out) / f.stem) for f in finished))
    Console(stderr=True).print(
        f"finished stages are kept in {out}: {names}.\nResume with: {shlex.join(command)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
