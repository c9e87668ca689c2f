"""Configurations from names, from YAML and from the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.face_recognition import FaceRecognition
from aihwkit_lora.recipes.options import (
    Parser,
    add_arguments,
    build,
    field_types,
    read_run,
    read_yaml,
    shipped,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = 3
    rate: float = 0.5
    name: str = "a"
    quick: bool = False
    people: tuple[int, ...] = (0, 1)
    photos: int | None = None


def test_values_reach_their_fields_and_lists_become_tuples():
    given = {"steps": 7, "rate": 2, "name": "b", "quick": True, "people": [4, 5], "photos": 9}
    built = build(Options, given)
    assert built == Options(steps=7, rate=2.0, name="b", quick=True, people=(4, 5), photos=9)
    assert type(built.rate) is float
    assert build(Options, {"photos": None}) == build(Options, {}) == Options()


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"unknown option 'step'. Did you mean 'steps'"):
        build(Options, {"step": 3})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("steps", "many", "int, got 'many'"),
        ("steps", 2.5, "int, got 2.5"),
        ("steps", True, "int, got True"),
        ("steps", None, "int, got None"),
        ("rate", "fast", "float, got 'fast'"),
        ("rate", True, "float, got True"),
        ("name", 3, "str, got 3"),
        ("quick", 1, "bool, got 1"),
        ("quick", "yes", "bool, got 'yes'"),
        ("people", 3, "got 3"),
        ("people", [1, "2"], r"got \[1, '2'\]"),
        ("photos", 1.0, "int, got 1.0"),
    ],
)
def test_values_of_another_type_are_refused(name, value, wanted):
    with pytest.raises(ConfigurationError, match=f"option '{name}': expected .*{wanted}"):
        build(Options, {name: value})


def test_ranges_are_checked_by_the_configuration_itself():
    with pytest.raises(ConfigurationError, match="expected forget_rank of at least 1, found 0"):
        build(FaceRecognition, {"forget_rank": 0})


def test_yaml_holds_options(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("steps: 7\npeople: [4, 5]\nphotos: null\n", encoding="utf-8")
    assert read_yaml(file) == {"steps": 7, "people": [4, 5], "photos": None}
    file.write_text("# nothing yet\n", encoding="utf-8")
    assert read_yaml(file) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "expected a mapping of options, got list"),
        ("steps\n", "expected a mapping of options, got str"),
        ("steps: [1\n", "expected YAML, got"),
    ],
)
def test_yaml_that_holds_no_options_is_refused(tmp_path, text, message):
    file = tmp_path / "options.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        read_yaml(file)


def test_missing_yaml_is_named(tmp_path):
    with pytest.raises(DataError, match=r"expected a configuration in .*gone.yaml', got: No such"):
        read_yaml(tmp_path / "gone.yaml")


def test_yaml_may_name_its_recipe_which_is_no_option(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("recipe: faces\nsteps: 7\n", encoding="utf-8")
    assert read_run(file) == read_run(str(file)) == ("faces", {"steps": 7})
    assert read_yaml(file) == {"steps": 7}
    file.write_text("steps: 7\n", encoding="utf-8")
    assert read_run(file) == (None, {"steps": 7})
    file.write_text("recipe: 3\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="expected recipe to be a name, found 3"):
        read_run(file)


def test_shipped_yaml_goes_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_run("face_olivetti") == read_run(shipped()["face_olivetti"])
    assert read_run("face_olivetti")[0] == "face_recognition"
    (tmp_path / "face_olivetti").write_text("recipe: mine\n", encoding="utf-8")
    assert read_run("face_olivetti") == ("mine", {})


def test_neither_a_file_nor_a_shipped_name_is_refused_with_the_nearest():
    with pytest.raises(DataError, match=r"found 'face_oliveti'. Did you mean 'face_olivetti'"):
        read_run("face_oliveti")


def test_parsers_raise_and_say_where_help_is():
    parser = Parser(prog="aihwkit-lora run faces")
    parser.add_argument("N")
    with pytest.raises(
        ConfigurationError, match=r"required: N. Try: aihwkit-lora run faces --help"
    ):
        parser.parse_args([])


def parsed(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, Options)
    return vars(parser.parse_args(list(arguments)))


def test_arguments_that_are_not_given_leave_no_trace():
    assert parsed() == {}


def test_arguments_have_the_types_of_their_fields():
    found = parsed(
        "--steps", "7", "--rate", "0.25", "--name", "b", "--quick", "--people", "4", "5",
        "--photos", "9",
    )  # fmt: skip
    assert build(Options, found) == Options(
        steps=7, rate=0.25, name="b", quick=True, people=(4, 5), photos=9
    )
    assert parsed("--no-quick") == {"quick": False}


def test_every_option_of_the_recipe_shows_its_default():
    parser = argparse.ArgumentParser()
    add_arguments(parser, FaceRecognition)
    shown = " ".join(parser.format_help().split())
    for name in field_types(FaceRecognition):
        assert f"--{name.replace('_', '-')} " in shown
    assert "default: 0 1 2 3 4" in shown
    assert "default: rm-180nm" in shown
