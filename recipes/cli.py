"""The command line: run recipes, list chips, look at the environment, print reports."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from aihwkit_lora._environment import doctor
from aihwkit_lora.errors import AihwkitLoraError, ConfigurationError
from aihwkit_lora.recipes.options import Parser
from aihwkit_lora.registry import nearest

if TYPE_CHECKING:
    from aihwkit_lora.chips import Chip
    from aihwkit_lora.reporting import RunReport


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
    parser = Parser(prog="aihwkit-lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    # Its first free argument is the recipe, and the others are options of the recipe.
    run = commands.add_parser("run", help="run a recipe", add_help=False)
    run.add_argument("-h", "--help", action="store_true")
    run.add_argument("--out", type=Path, default=None)
    run.add_argument("--config")
    run.add_argument("--resume", action="store_true")
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
    page = commands.add_parser("page", help="one page of all recipes and chips, with a chart")
    page.add_argument("--out", type=Path, metavar="FILE.md", help="also write it there")
    for reader in (comparing, page):
        reader.add_argument(
            "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of many runs"
        )
    ratios = commands.add_parser("ratios", help="named ratios of published workloads, from shapes")
    ratios.add_argument("chips", nargs="*", metavar="CHIP", help="name or YAML file; all if none")
    ratios.add_argument(
        "--utilisation", type=float, required=True, help="part of its peak that the GPU reaches"
    )
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.recipes.run_command import run_command

    return run_command(options, console)


def _recipes(_: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.recipes.run_command import list_recipes

    list_recipes(console)
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


def _reports(runs: Sequence[Path]) -> list[RunReport]:
    """All reports in some folders and below, each once."""
    from aihwkit_lora.reporting import RunReport

    found: dict[Path, Path] = {}
    for run in runs:
        # A folder without any report is read as a run, which says what is missing.
        below = sorted(run.rglob("report.json")) if run.is_dir() else []
        found |= {file.resolve(): file for file in below or [_report_of(run)]}
    return [RunReport.read(file) for file in found.values()]


def _compare(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.reporting import compare, print_comparison

    print_comparison(compare(_reports(options.runs)), console)
    return 0


def _page(options: argparse.Namespace, console: Console) -> int:
    from aihwkit_lora.reporting import overview, page, write_page

    found = overview(_reports(options.runs))
    # Written as it is, for a file or a pager: a console would wrap the tables.
    sys.stdout.write(page(found) if options.out is None else write_page(found, options.out))
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
    "page": _page,
    "ratios": _ratios,
    "coverage": _coverage,
}


if __name__ == "__main__":
    sys.exit(main())
