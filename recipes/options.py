"""Recipe configurations from the command line and from YAML; unknown names are errors."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.registry import nearest


class Parser(argparse.ArgumentParser):
    """Raises instead of printing usage, so that every error looks the same."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Args:
            message: What is wrong with them.
        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(f"{message}. Try: {self.prog} --help")


def build[C](kind: type[C], values: Mapping[str, Any]) -> C:
    """Make a configuration from names and values, such as a YAML file holds.

    Args:
        kind: A frozen dataclass that checks its values.
        values: By field name. Lists become tuples.
    Raises:
        ConfigurationError: A name is no field, or a value is refused; the nearest names are given.

    Example:
        >>> from aihwkit_lora.recipes import FaceRecognition
        >>> build(FaceRecognition, {"forgoten": 2})
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.ConfigurationError: unknown option 'forgoten'. Did you mean ...
    """
    known = field_types(kind)
    for name in values:
        if name not in known:
            raise ConfigurationError(f"unknown option '{name}'. {nearest(name, known)}")
    return kind(**{name: _checked(name, value, known[name]) for name, value in values.items()})


def read_yaml(path: Path) -> dict[str, Any]:
    """Read options from a YAML file.

    Args:
        path: A file that holds one mapping.
    Returns:
        Options by name. The key ``recipe`` is none of them; :func:`read_run` reads it, too.
    Raises:
        DataError: The file is missing.
        ConfigurationError: It is not a mapping.
    """
    return {name: value for name, value in _mapping(path).items() if name != "recipe"}


def _mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"expected a configuration in '{path}', got: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"'{path}': expected YAML, got: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"'{path}': expected a mapping of options, got {type(values).__name__}."
        )
    return values


def shipped() -> dict[str, Path]:
    """Find the configurations that come with the package.

    Returns:
        YAML files by name, without the ending.

    Example:
        >>> "face_olivetti" in shipped()
        True
    """
    files = sorted((Path(__file__).parent / "configs").glob("*.yaml"))
    return {file.stem: file for file in files}


def read_run(name: str | Path) -> tuple[str | None, dict[str, Any]]:
    """Read which recipe to run, and its options, from a YAML file.

    Args:
        name: A file, or the name of one that :func:`shipped` lists. Its key ``recipe`` names the
            recipe and may be missing; every other key is an option.
    Returns:
        Name of the recipe, or None, and the options.
    Raises:
        DataError: There is neither such a file nor a shipped one of this name.
        ConfigurationError: The file is not a mapping, or its recipe is not a name.

    Example:
        >>> read_run("speaker_fsdd")[0]
        'speaker_authentication'
    """
    known, path = shipped(), Path(name)
    if not path.suffix and not path.exists():
        if str(name) not in known:
            raise DataError(
                f"expected a YAML file or a configuration of the package, found '{name}'. "
                f"{nearest(str(name), known)}"
            )
        path = known[str(name)]
    recipe = _mapping(path).get("recipe")
    if not isinstance(recipe, str | None):
        raise ConfigurationError(f"'{path}': expected recipe to be a name, found {recipe!r}.")
    return recipe, read_yaml(path)


def add_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Give a parser one option for each field of a configuration.

    Args:
        parser: Options are added to it; those that are not given leave no trace.
        kind: A frozen dataclass.
    """
    for field in dataclasses.fields(kind):
        hint = field_types(kind)[field.name]
        flag = "--" + field.name.replace("_", "-")
        text = f"default: {_shown(field.default)}"
        if hint is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        elif typing.get_origin(hint) is tuple:
            parser.add_argument(
                flag, type=int, nargs="+", default=argparse.SUPPRESS, metavar="N", help=text
            )
        else:
            parser.add_argument(
                flag, type=_scalar(hint), default=argparse.SUPPRESS, metavar="VALUE", help=text
            )


def field_types(kind: type) -> dict[str, Any]:
    """Types of the fields of a dataclass, by name.

    Args:
        kind: A dataclass.
    """
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return " ".join(str(part) for part in default)
    return str(default)


def _scalar(hint: Any) -> Any:
    """The type itself, or that of ``X | None``."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _checked(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        if all(isinstance(part, int) for part in value):
            return tuple(value)
    elif value is None and isinstance(hint, types.UnionType):
        return None
    elif _scalar(hint) is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is _scalar(hint):
        return value
    wanted = getattr(_scalar(hint), "__name__", str(hint))
    raise ConfigurationError(f"option '{name}': expected {wanted}, got {value!r}.")
