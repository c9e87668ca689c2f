"""Every YAML that ships with the package names its recipe, is a configuration, and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aihwkit_lora.recipes import RECIPES, run_recipe
from aihwkit_lora.recipes.face_data import data_folder
from aihwkit_lora.recipes.options import build, field_types, read_run, shipped
from aihwkit_lora.recipes.speaker_data import FSDD_FOLDER
from aihwkit_lora.reporting import RunReport

FIRST_STEPS: dict[str, dict[str, Any]] = {
    "face_recognition": {
        "quick": True,
        "learn_epochs": 1,
        "forget_epochs": 1,
        "continue_epochs": 1,
        "photos_per_person": 5,
        "noise_chips": 1,
        "baselines": "reprogram",
    },
    "image_generation": {"quick": True},
    "lm_unlearning": {"quick": True},
    "request_stream": {
        "learn_epochs": 1,
        "adapter_epochs": 1,
        "requests": "learn 5, forget 2",
        "newest": False,
        "retrained": False,
    },
    "speaker_authentication": {
        "quick": True,
        "clips_per_speaker": 20,
        "hidden": 32,
        "learn_epochs": 1,
        "forget_epochs": 1,
        "continue_epochs": 1,
        "restore_epochs": 1,
        "reprogram_forget_steps": 1,
        "reprogram_continue_steps": 1,
    },
    "unlearning_objectives": {
        "people": (0, 1),
        "objectives": "npo",
        "seeds": 1,
        "learn_epochs": 1,
        "forget_epochs": 1,
        "noisy_chips": 1,
    },
}
"""What makes a run of each recipe as short as it gets."""

FILES = {"olivetti": ("scikit_learn_data", "olivetti*"), "fsdd": (FSDD_FOLDER, "*")}
"""Data sets that come from files: where in the data folder they are."""


def test_every_recipe_ships_a_configuration():
    assert {read_run(name)[0] for name in shipped()} == set(RECIPES)


@pytest.mark.parametrize("name", shipped())
def test_it_is_a_configuration_of_the_recipe_that_it_names(name):
    recipe, values = read_run(name)
    built = build(RECIPES.get(recipe).config, values)
    # Nothing in the file is lost, and everything is of its field's type.
    for key, value in values.items():
        found = getattr(built, key)
        assert (list(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize("name", shipped())
def test_its_comment_shows_the_command_that_runs_it(name):
    text = shipped()[name].read_text(encoding="utf-8")
    assert f"# aihwkit-lora run --config {name}\n" in text


@pytest.mark.parametrize("name", shipped())
def test_the_docs_list_it(name):
    page = Path(__file__).parents[2] / "docs" / "comparison.md"
    rows = [row for row in page.read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
    assert f"`{read_run(name)[0]}`" in row.split("|")[2]


def _marked() -> Iterator[Any]:
    """Names; those that need files are marked."""
    for name in shipped():
        needs_files = read_run(name)[1].get("data") in FILES
        yield pytest.param(name, marks=pytest.mark.data if needs_files else ())


@pytest.mark.parametrize("name", list(_marked()))
def test_its_first_steps_run(name, tmp_path):
    named, values = read_run(name)
    recipe = RECIPES.get(named)
    _require_files(values.get("data"))
    if "download" in field_types(recipe.config):
        values["download"] = False
    config = build(recipe.config, {**values, **FIRST_STEPS[named]})
    report = run_recipe(recipe, config, tmp_path)
    assert report.recipe == named
    assert RunReport.read(tmp_path / "report.json") == report
    assert any(stage.pulses for stages in report.arms.values() for stage in stages)
    with_steps = any(stage.steps for stages in report.arms.values() for stage in stages)
    assert (tmp_path / "report.png").exists() == with_steps


def _require_files(data: str | None) -> None:
    if data in FILES:
        folder, files = FILES[data]
        if not list(Path(data_folder(), folder).glob(files)):
            pytest.skip(f"no {data} in the folder that AIHWKIT_LORA_DATA names")
