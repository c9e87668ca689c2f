"""Chips as data: from a YAML file or a plain mapping, and back.

The keys are the fields of :class:`Chip` and of what it consists of. A quantity is a mapping of
``value``, ``unit``, ``source``, ``status`` and, if there is a range, ``low`` and ``high``; its unit
may carry a prefix. A device, a noise model or a drift compensation is the name of one of aihwkit's
classes or the dotted path of another one, alone or as ``type`` beside its arguments.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from aihwkit.inference.compensation.base import BaseDriftCompensation
from aihwkit.inference.noise.base import BaseNoiseModel
from aihwkit.simulator.configs.devices import PulsedDevice

from aihwkit_lora.chips.chip import Chip, chips
from aihwkit_lora.chips.maker import Maker
from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.chips.quantities import BOOKKEEPING, OVERLAPPING, to_si
from aihwkit_lora.errors import AihwkitLoraError, ConfigurationError, DataError
from aihwkit_lora.metering.pricing import Quantity
from aihwkit_lora.registry import nearest

_CATALOGUES: dict[type, tuple[str, ...]] = {
    PulsedDevice: ("aihwkit.simulator.presets.devices", "aihwkit.simulator.configs.devices"),
    BaseNoiseModel: ("aihwkit.inference",),
    BaseDriftCompensation: ("aihwkit.inference",),
}
"""Where classes are looked up by their bare name."""

_GROUPS = {"bookkeeping": BOOKKEEPING, "overlapping": OVERLAPPING}
"""Names that stand for several events in the lists of free ones."""


def load(path: str | Path) -> Chip:
    """Read a chip from a YAML file. ``chips.add(chip.name, chip)`` makes it known by its name.

    Names with a dot in them are imported, as by Python, so read only files that you trust.

    Args:
        path: The file; see ``docs/chips.md``.
    Raises:
        DataError: The file is missing.
        ConfigurationError: It is not YAML, or does not describe a chip; the message names the key.

    Example:
        >>> load("my-chip.yaml")
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.DataError: expected a chip in 'my-chip.yaml', got: No such file ...
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        values, keys = yaml.safe_load(text), yaml.compose(text)
    except OSError as error:
        raise DataError(f"expected a chip in '{path}', got: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"'{path}': expected YAML, got: {error}") from error
    _require_unique(keys, f"'{path}'")
    return from_dict(values, where=f"'{path}'")


def _require_unique(node: Any, file: str) -> None:
    """Refuse a key that a mapping has twice, of which YAML would take the second in silence."""
    seen: set[str] = set()
    for key, value in node.value if getattr(node, "id", "") == "mapping" else ():
        if key.value in seen:
            raise ConfigurationError(
                f"{file}: expected each key once, got '{key.value}' again in line "
                f"{key.start_mark.line + 1}."
            )
        seen.add(str(key.value))
        _require_unique(value, file)


def find(name: str | Path) -> Chip:
    """Return the chip of a name, or the one that a YAML file describes.

    Args:
        name: A registered name, or a path that ends in ``.yaml`` or ``.yml``.
    Raises:
        UnknownNameError: No chip has this name; the message lists the nearest ones.
        DataError: The file is missing.
        ConfigurationError: The file does not describe a chip.

    Example:
        >>> find("rm-180nm").rows
        128
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return load(name)
    return chips.get(str(name))


def from_dict(values: Mapping[str, Any], *, where: str = "chip") -> Chip:
    """Make a chip from plain values.

    Args:
        values: By the names of the fields of :class:`Chip`, nested as these are.
        where: What the values are called in error messages.
    Raises:
        ConfigurationError: A key is unknown or missing, or a value is refused.

    Example:
        >>> from aihwkit_lora import chips
        >>> chip = chips.get("neurram-130nm")
        >>> from_dict(to_dict(chip)) == chip
        True
        >>> from_dict({**to_dict(chip), "collumns": 512})
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.ConfigurationError: chip: unknown key 'collumns'. Did you mean ...
    """
    chip: Chip = _Reader(where).build(Chip, values)
    return chip


def to_dict(chip: Chip) -> dict[str, Any]:
    """Write a chip as plain values, which :func:`from_dict` and YAML understand.

    Args:
        chip: Any chip. Devices and noise models have to be classes or :class:`Maker` of classes.
    Raises:
        ConfigurationError: One of them is something else, such as a lambda.

    Example:
        >>> from aihwkit_lora import chips
        >>> written = to_dict(chips.get("hermes-14nm"))
        >>> written["noise_model"], written["write_policy"]["device"]
        ({'type': 'HermesNoiseModel', 'num_devices': 1}, 'PCMPresetDevice')
    """
    written: dict[str, Any] = _written(chip, "chip", chip.mapping)
    return written


class _Reader:
    """Builds dataclasses from plain values by the types of their fields.

    Args:
        root: What the values are called in error messages.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._mapping: ConductanceMapping | None = None

    def build(self, kind: type, values: Any, *keys: str) -> Any:
        """Make a dataclass from values by field name."""
        hints = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
        required = {
            field.name
            for field in fields(kind)
            if field.default is MISSING and field.default_factory is MISSING
        }
        self._require_keys(values, hints, required, *keys)
        if kind is Quantity:
            values = self._in_si(values, *keys)
        # In the order of the fields, because noise models need the mapping.
        read = {
            name: self._read(hint, values[name], *keys, name)
            for name, hint in hints.items()
            if name in values
        }
        try:
            built = kind(**read)
        except AihwkitLoraError as error:
            raise ConfigurationError(f"{self._place(*keys)}: {error}") from error
        if isinstance(built, ConductanceMapping):
            self._mapping = built
        return built

    def _require_keys(
        self, values: Any, known: Mapping[str, Any], required: set[str], *keys: str
    ) -> None:
        self._require(isinstance(values, Mapping), "a mapping", values, *keys)
        for name in values:
            if name not in known:
                raise ConfigurationError(
                    f"{self._place(*keys)}: unknown key '{name}'. {nearest(str(name), known)}"
                )
        if missing := sorted(required - values.keys()):
            raise ConfigurationError(
                f"{self._place(*keys)}: expected the key '{missing[0]}', got none. It has no "
                "default."
            )

    def _read(self, hint: Any, value: Any, *keys: str) -> Any:
        origin, parts = get_origin(hint), get_args(hint)
        if origin is types.UnionType:
            return None if value is None else self._read(parts[0], value, *keys)
        if origin is Callable:
            return self._maker(parts[1], value, *keys)
        if is_dataclass(hint):
            return self.build(hint, value, *keys)  # type: ignore[arg-type]
        if origin is Mapping:
            self._require(isinstance(value, Mapping), "a mapping", value, *keys)
            return {str(k): self._read(parts[1], v, *keys, str(k)) for k, v in value.items()}
        if origin in (tuple, frozenset):
            return self._several(origin, parts, value, *keys)
        if origin is Literal or (isinstance(hint, type) and issubclass(hint, StrEnum)):
            return self._choice(hint, value, *keys)
        return self._scalar(hint, value, *keys)

    def _several(self, kind: Any, parts: tuple[Any, ...], value: Any, *keys: str) -> Any:
        listed = isinstance(value, Sequence | frozenset) and not isinstance(value, str)
        self._require(listed, "a list", value, *keys)
        if kind is tuple:
            self._require(len(value) == len(parts), f"a list of {len(parts)}", value, *keys)
            return tuple(self._scalar(parts[0], part, *keys) for part in value)
        names = {self._scalar(str, part, *keys) for part in value}
        groups = (members for group, members in _GROUPS.items() if group in names)
        return frozenset(names - _GROUPS.keys()).union(*groups)

    def _choice(self, hint: Any, value: Any, *keys: str) -> Any:
        choices = get_args(hint) or tuple(hint)
        names = [str(choice) for choice in choices]
        if value not in names:
            raise ConfigurationError(
                f"{self._place(*keys)}: expected one of the known names, got {value!r}. "
                f"{nearest(str(value), names)}"
            )
        return choices[names.index(value)]

    def _scalar(self, kind: type, value: Any, *keys: str) -> Any:
        if kind is float:
            return self._number(value, *keys)
        expected = {int: "a whole number", bool: "true or false", str: "text"}[kind]
        fitting = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        self._require(fitting, expected, value, *keys)
        return value

    def _number(self, value: Any, *keys: str) -> float:
        if isinstance(value, str):
            value = _parsed(value, "S" if keys[-1].endswith("_siemens") else None)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        self._require(numeric, "a number", value, *keys)
        return float(value)

    def _in_si(self, values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        """The values of a quantity, with its prefix taken off."""
        unit, given = values["unit"], dict(values)
        self._require(isinstance(unit, str), "text", unit, *keys, "unit")
        for name in ("value", "low", "high"):
            if given.get(name) is not None:
                number = self._number(given[name], *keys, name)
                given[name], given["unit"] = to_si(number, unit)
        return given

    def _maker(self, base: type, value: Any, *keys: str) -> Any:
        given = dict(value) if isinstance(value, Mapping) else {"type": value}
        name = given.pop("type", None)
        self._require(isinstance(name, str), "the name of a class", name, *keys)
        kind = self._class(base, name, *keys)
        accepted = inspect.signature(kind).parameters
        for argument in given:
            if argument not in accepted:
                raise ConfigurationError(
                    f"{self._place(*keys)}: unknown argument '{argument}' of {name}. "
                    f"{nearest(str(argument), accepted)}"
                )
        mapping = self._mapping if _takes_mapping(kind) else None
        maker = Maker(kind, given, mapping) if given or mapping else kind
        try:
            maker()
        # aihwkit checks with assertions, and numpy and torch raise what they like.
        except Exception as error:
            raise ConfigurationError(
                f"{self._place(*keys)}: expected arguments that {name} takes, got: {error}"
            ) from error
        return maker

    def _class(self, base: type, name: str, *keys: str) -> type:
        module, _, attribute = name.rpartition(".")
        places = (module,) if module else _CATALOGUES[base]
        try:
            modules = [importlib.import_module(place) for place in places]
        except ImportError as error:
            raise ConfigurationError(
                f"{self._place(*keys)}: expected a class to import, got '{name}': {error}."
            ) from error
        known = {
            each: found
            for place in modules
            for each, found in vars(place).items()
            if isinstance(found, type) and issubclass(found, base) and found is not base
        }
        if attribute not in known:
            raise ConfigurationError(
                f"{self._place(*keys)}: expected the name of a {base.__name__}, got '{name}'. "
                f"{nearest(attribute, known)}"
            )
        return known[attribute]

    def _place(self, *keys: str) -> str:
        return f"{self._root}: {'.'.join(keys)}" if keys else self._root

    def _require(self, satisfied: bool, expected: str, found: Any, *keys: str) -> None:
        if not satisfied:
            raise ConfigurationError(f"{self._place(*keys)}: expected {expected}, got {found!r}.")


def _parsed(text: str, unit: str | None) -> float | str:
    """The number in a text, which may carry a unit where that is known; else the text."""
    number, _, given = text.strip().partition(" ")
    try:
        # YAML 1.1 takes 1e-6, which has no decimal point, for a text.
        value, found = to_si(float(number), given or "1")
    except ValueError:
        return text
    return value if not given or found == unit else text


def _written(value: Any, name: str, mapping: ConductanceMapping) -> Any:
    if isinstance(value, StrEnum):
        return str(value)
    if callable(value):
        return _written_maker(value, name, mapping)
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        value = {key: part for key, part in parts.items() if part is not None}
    if isinstance(value, Mapping):
        return {key: _written(part, f"{name}.{key}", mapping) for key, part in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _written_maker(value: Any, name: str, mapping: ConductanceMapping) -> Any:
    maker = value if isinstance(value, Maker) else Maker(value)
    kind: Any = maker.kind
    own = isinstance(kind, type) and maker.mapping == (mapping if _takes_mapping(kind) else None)
    if not own:
        raise ConfigurationError(
            f"{name}: expected a class, or a chips.Maker of one with the chip's mapping where it "
            f"takes a g_converter, got {value!r}, which cannot be written."
        )
    bare = any(
        vars(importlib.import_module(place)).get(kind.__name__) is kind
        for base, places in _CATALOGUES.items()
        if issubclass(kind, base)
        for place in places
    )
    path = kind.__name__ if bare else f"{kind.__module__}.{kind.__qualname__}"
    return {"type": path, **maker.arguments} if maker.arguments else path


def _takes_mapping(kind: type) -> bool:
    return "g_converter" in inspect.signature(kind).parameters
