"""The tables of docs/coverage.md: what they say is what happens."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from aihwkit_lora.recipes import cli
from aihwkit_lora.recipes.coverage.page import as_markdown, as_page, page
from aihwkit_lora.recipes.coverage.peft_methods import TILE_KINDS, methods
from aihwkit_lora.recipes.coverage.tile_types import (
    LAYER_KINDS,
    TILE_TYPES,
    Found,
    LayerKind,
    tile_rows,
    try_freezing,
)
from aihwkit_lora.tiles.engines import TILES
from aihwkit_lora.tiles.layers import LAYERS

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def tables() -> list[list[list[str]]]:
    """The two tables of the page, cell by cell."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text(encoding="utf-8"), re.M):
        lines = block.strip().splitlines()
        del lines[1]
        found.append([[cell.strip() for cell in line[1:-1].split("|")] for line in lines])
    return found


@pytest.mark.parametrize("tile", TILE_TYPES)
def test_every_layer_on_these_tiles_does_what_the_page_says(tile: str) -> None:
    header, *rows = tables()[0]
    assert header == ["tiles", *LAYER_KINDS]
    (row,) = [row for row in rows if row[0] == tile]
    assert tile_rows(LAYER_KINDS, {tile: TILE_TYPES[tile]})[1] == row


def test_no_cell_is_refused_or_different() -> None:
    _, *rows = tables()[0]
    assert [row[0] for row in rows] == list(TILE_TYPES)
    cells = {cell for row in rows for cell in row[1:]}
    assert cells == {Found.FUSED, Found.REFERENCE, Found.NOT_IN_AIHWKIT}


def test_the_table_has_every_class_of_layers_and_tiles_that_can_be_frozen() -> None:
    layers, tiles = set(), set()
    for make in TILE_TYPES.values():
        tiles.add(make().tile_class)
    for kind in LAYER_KINDS.values():
        layers.update(
            type(layer) for layer in kind.build(TILE_TYPES["FloatingPointTile"]()).modules()
        )
    assert tiles == set(TILES)
    # The mapped forms of 1d and 3d differ from that of 2d by their kernel only.
    missing = {layer.__name__ for layer in LAYERS if layer not in layers}
    assert missing == {"AnalogConv1dMapped", "AnalogConv3dMapped"}


def test_a_layer_that_changes_what_it_computes_is_found_out(monkeypatch) -> None:
    from aihwkit_lora.tiles.array import FrozenTileArray

    right = FrozenTileArray.forward
    monkeypatch.setattr(FrozenTileArray, "forward", lambda self, *args: 1.01 * right(self, *args))
    kind: LayerKind = LAYER_KINDS["Linear"]
    assert try_freezing(kind, TILE_TYPES["InferenceTile"]) is Found.DIFFERENT


def test_methods_stand_in_the_page_as_the_matrix_expects_them() -> None:
    """``tests/test_peft_matrix.py`` tries each of them; here is that the page says the same."""
    header, *rows = tables()[1]
    assert header == ["method", "PEFT type", *TILE_KINDS, "merging", "note"]
    found = {row[0]: row[1 : 2 + len(TILE_KINDS)] for row in rows}
    assert found == {
        method.name: [method.peft_type, *[str(method.expected)] * len(TILE_KINDS)]
        for method in methods()
    }


def test_the_page_names_the_versions_it_was_made_with() -> None:
    text = as_page([["a"]], [["b"]])
    for name in ("aihwkit", "peft", "torch"):
        assert f"{name} {version(name)}" in text
    assert "| a |\n|---|" in text


def test_cells_may_hold_a_bar() -> None:
    assert as_markdown([["a|b", "c"]]) == "| a\\|b | c |\n|---|---|"


def test_the_command_prints_the_page_or_writes_it(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("aihwkit_lora.recipes.coverage.page.page", lambda: "the page\n")
    assert cli.main(["coverage"]) == 0
    assert capsys.readouterr().out == "the page\n"
    assert cli.main(["coverage", "--out", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "the page\n"


@pytest.mark.slow
def test_the_page_is_what_the_command_prints() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")
