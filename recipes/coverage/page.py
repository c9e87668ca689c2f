"""The page docs/coverage.md, written by the command that found its tables out."""

from __future__ import annotations

from collections.abc import Sequence

_INTRODUCTION = """\
# What works on frozen arrays

This page is the output of `aihwkit-lora coverage`, with
{versions}.
Every cell was tried when the command ran; the tests assert the same tables.

## Layers × tiles

Each layer was converted by aihwkit, computed, frozen and computed again, with the noise of reads
off. **fused**: frozen, all tiles in one blocked product, equal to aihwkit's own tiles.
**reference**: frozen, read with aihwkit's own tiles, because the fused product lacks a
non-ideality that the configuration asks for; `al.engines(model)` tells which. **not in aihwkit**:
aihwkit itself cannot build or compute such a layer. Layers are split over several tiles where
aihwkit can do that.

{tiles}

Refused with `UnsupportedTileError`, before anything is replaced: classes of layers or tiles that
nobody has said how to freeze (the message names the hook), and configurations whose reads change
the tile (`NoiseManagementType.AVERAGE_ABS_MAX`). GPT-2's `Conv1D` becomes a Linear in `al.convert`.

## PEFT methods × tiles

Each method was attached to a frozen model with stock PEFT, trained for three steps, saved, and
loaded into an equal chip. **yes**: the arrays are read in every forward pass, and the adapter
computes beside them. **yes, reads weights**: as above, and each forward pass also computes with the
weights as digital numbers, which a chip would have to read out first. **yes, bypasses the array**:
it learns, but computes with a digital copy of the weights; no array is read. **refused**: it would
write the arrays; an error is raised before anything changes. **not applicable**: PEFT refuses an
ordinary digital model of the same shape too. Merging is refused unless it concerns digital parts.

{methods}
"""


def page() -> str:
    """Try everything, and write the page in Markdown."""
    from aihwkit_lora.recipes.coverage.peft_methods import rows
    from aihwkit_lora.recipes.coverage.tile_types import tile_rows

    return as_page(tile_rows(), rows())


def as_page(tiles: Sequence[Sequence[str]], methods: Sequence[Sequence[str]]) -> str:
    """Write the page around tables.

    Args:
        tiles: Header and rows of the first table.
        methods: Header and rows of the second.
    """
    from importlib.metadata import version

    packages = ("aihwkit", "peft", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return _INTRODUCTION.format(
        versions=versions, tiles=as_markdown(tiles), methods=as_markdown(methods)
    )


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Args:
        table: A header and rows of the same length.

    Example:
        >>> print(as_markdown([["a", "b"], ["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table)
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)
