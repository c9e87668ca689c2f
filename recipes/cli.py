"""The command line: run recipes, list chips, look at the environment, print reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from aihwkit_lora._environment import doctor
from aihwkit_lora.errors import AihwkitLoraError, ConfigurationError
from aihwkit_lora.registry import nearest

if TYPE_CHECKING:
    from aihwkit_lora.chips import Chip


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing usage, so that every error looks the same."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. Try: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Instead of ``sys.argv[1:]``.
    Returns:
        0 if all went well, 1 if ``doctor`` found something broken, 2 for errors of use or data,
        130 if interrupted.
    """
    console, errors = Console(), Console(stderr=True)
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments), console)
    except AihwkitLoraError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted", style="red")
        return 130


def _dispatch(arguments: list[str], console: Console) -> int:
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        raise ConfigurationError(
            f"unknown command '{arguments[0]}'. {nearest(arguments[0], _COMMANDS)}"
        )
    options, unknown = parser.parse_known_args(arguments)
    if unknown and options.command != "run":
        raise ConfigurationError(f"unknown argument '{unknown[0]}'. Try: aihwkit-lora --help")
    if options.command is None:
        parser.print_help()
        return 0
    options.rest = unknown
    return _COMMANDS[options.command](options, console)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="aihwkit-lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    run = commands.add_parser("run", help="run a recipe", add_help=False)
    run.add_argument("recipe", nargs="?", metavar="RECIPE", help="see: aihwkit-lora recipes")
    run.add_argument("-h", "--help", action="store_true", help="with a recipe: show its options")
    run.add_argument("--out", type=Path, default=None, help="folder of the run")
    run.add_argument("--config", type=Path, help="YAML file with options of the recipe")
    run.add_argument("--resume", action="store_true", help="go on after the last finished stage")
    commands.add_parser("recipes", help="list recipes")
    chips = commands.add_parser("chips", help="compare chips, or show all numbers of one")
    which = chips.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", metavar="NAME", help="of a chip, or a YAML file")
    which.add_argument("--check", type=Path, metavar="FILE", help="check a chip in a YAML file")
    chips.add_argument("--yaml", action="store_true", help="write the chip as YAML")
    commands.add_parser("doctor", help="check what is installed")
    coverage = commands.add_parser("coverage", help="try all layers, tiles and PEFT methods")
    coverage.add_argument("--out", type=Path, help="write the page there instead of printing it")
    report = commands.add_parser("report", help="print the report of a run")
    report.add_argument("folder", type=Path, help="folder of the run, or its report.json")
    comparing = commands.add_parser("compare", help="put runs of one recipe side by side")
    comparing.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its report.json"
    )
    ratios = commands.add_parser("ratios", help="named ratios of published workloads, from shapes")
    ratios.add_argument("chips", nargs="*", metavar="CHIP", help="name or YAML file; all if none")
    ratios.add_argument(
        "--utilisation", type=float, required=True, help="part of its peak that the GPU reaches"
    )
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.recipes import RECIPES, run_recipe
    from aihwkit_lora.recipes.options import build, read_yaml
    from aihwkit_lora.reporting import print_summary

    if options.recipe is None:
        if options.help:
            console.print("usage: aihwkit-lora run RECIPE [--out DIR] [--config FILE] [--resume]")
            return _recipes(options, console)
        raise ConfigurationError(
            f"expected a recipe. {nearest('', RECIPES)} Try: aihwkit-lora run --help"
        )
    recipe = RECIPES.get(options.recipe)
    parser = _recipe_parser(recipe)
    if options.help:
        parser.print_help()
        return 0
    given = vars(_parse_known_only(parser, options.rest))
    from_file = read_yaml(options.config) if options.config else {}
    config: Any = build(recipe.config, {**from_file, **given})
    out = options.out or Path("runs") / recipe.name
    # Layers of a few thousand weights gain nothing from threads, and lose much where two
    # processes share two cores.
    torch.set_num_threads(1)
    try:
        report = run_recipe(recipe, config, out, resume=options.resume, say=console.print)
    except BaseException:
        _say_how_to_resume(out, recipe.name, options.rest, options.config)
        raise
    print_summary(report, console)
    console.print(f"\nreport:  {out / 'report.json'}\npicture: {out / 'report.png'}")
    return 0


def _recipe_parser(recipe: Any) -> argparse.ArgumentParser:
    from aihwkit_lora.recipes.options import add_arguments

    # --out, --config and --resume were taken by the parser before; they are here for the help.
    parser = _Parser(
        prog=f"aihwkit-lora run {recipe.name}",
        description=recipe.summary,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--out", metavar="DIR", help=f"default: runs/{recipe.name}")
    parser.add_argument("--config", metavar="FILE", help="YAML file with options")
    parser.add_argument("--resume", action="store_true", help="go on after the last stage")
    add_arguments(parser, recipe.config)
    return parser


def _parse_known_only(parser: argparse.ArgumentParser, rest: list[str]) -> argparse.Namespace:
    options, unknown = parser.parse_known_args(rest)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigurationError(f"unknown option '{unknown[0]}'. {nearest(unknown[0], known)}")
    return options


def _say_how_to_resume(out: Path, recipe: str, rest: list[str], config: Path | None) -> None:
    finished = sorted(file.stem for file in (out / "stages").glob("*.pt"))
    if not finished:
        return
    command = ["aihwkit-lora", "run", recipe, "--out", str(out), "--resume", *rest]
    if config is not None:
        command += ["--config", str(config)]
    Console(stderr=True).print(
        f"finished stages are kept in {out / 'stages'}: {', '.join(finished)}.\n"
        f"Resume with: {' '.join(command)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _recipes(_: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.recipes import RECIPES

    for name in RECIPES:
        console.print(f"{name}: {RECIPES.get(name).summary}", highlight=False, markup=False)
    return 0


def _chips(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora import chips
    from aihwkit_lora.recipes import chip_tables

    if options.check is not None:
        chip = chips.load(options.check)
    elif options.name is not None:
        chip = chips.find(options.name)
    elif options.yaml:
        raise ConfigurationError(f"expected a chip to write. {nearest('', chips.names())}")
    else:
        known = [chips.get(name) for name in chips.names()]
        for each in known:
            console.print(f"{each.name}: {each.title}", highlight=False, markup=False)
        console.print(chip_tables.overview(known), chip_tables.LEGEND, highlight=False)
        for each in known:
            _numbers(each, console)
        return 0
    if options.yaml:
        sys.stdout.write(_yaml(chips.to_dict(chip)))
        return 0
    console.print(chip_tables.overview([chip]), highlight=False)
    _numbers(chip, console)
    return 0


def _numbers(chip: Chip, console: Console) -> None:
    from aihwkit_lora.recipes import chip_tables

    console.print(chip_tables.numbers(chip), highlight=False)
    legend = (chip_tables.LEGEND, *chip_tables.gaps(chip))
    console.print(*legend, sep="\n", highlight=False, soft_wrap=True)


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=100)


def _doctor(_: argparse.Namespace, console: Console) -> int:
    checks = doctor()
    table = Table()
    for heading in ("what", "works", "detail"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        works = "yes" if check.ok else "NO" if check.required else "no (optional)"
        table.add_row(check.name, works, check.detail)
    console.print(table)
    return int(any(check.fatal for check in checks))


def _coverage(options: argparse.Namespace, _: Console) -> int:
    from aihwkit_lora.recipes.coverage.page import page

    if options.out is None:
        sys.stdout.write(page())
    else:
        options.out.write_text(page(), encoding="utf-8")
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.reporting import RunReport, print_summary

    print_summary(RunReport.read(_report_of(options.folder)), console)
    return 0


def _report_of(run: Path) -> Path:
    return run if run.suffix == ".json" else run / "report.json"


def _compare(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.reporting import RunReport, compare, print_comparison

    print_comparison(compare(RunReport.read(_report_of(run)) for run in options.runs), console)
    return 0


def _ratios(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora import chips
    from aihwkit_lora.reporting import print_published_ratios, rtx_4090

    found = [chips.find(name) for name in options.chips or chips.names()]
    print_published_ratios(found, rtx_4090(utilisation=options.utilisation), console)
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "run": _run,
    "recipes": _recipes,
    "chips": _chips,
    "doctor": _doctor,
    "report": _report,
    "compare": _compare,
    "ratios": _ratios,
    "coverage": _coverage,
}


if __name__ == "__main__":
    sys.exit(main())
