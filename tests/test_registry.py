"""Registries: what they keep, and what they say about names they do not know."""

from __future__ import annotations

import pytest

from aihwkit_lora.errors import ConfigurationError, UnknownNameError
from aihwkit_lora.registry import Registry, nearest


def colours() -> Registry[int]:
    registry = Registry[int]("colour")
    for name, value in (("red", 3), ("green", 1), ("blue", 2)):
        registry.add(name, value)
    return registry


def test_entries_are_found_and_listed_in_order() -> None:
    registry = colours()
    assert registry.get("red") == 3
    assert registry.names() == tuple(registry) == ("blue", "green", "red")
    assert "green" in registry
    assert "grey" not in registry
    assert 3 not in registry


def test_register_returns_what_it_decorates() -> None:
    registry = Registry[type]("shape")

    @registry.register("square")
    class Square:
        pass

    assert registry.get("square") is Square


def test_a_taken_name_is_refused_and_the_first_entry_stays() -> None:
    registry = colours()
    with pytest.raises(ConfigurationError, match="colour 'red' is registered already"):
        registry.add("red", 9)
    with pytest.raises(ConfigurationError, match="colour 'red' is registered already"):
        registry.register("red")(9)
    assert registry.get("red") == 3


def test_an_unknown_name_raises_with_the_nearest() -> None:
    match = "unknown colour 'gren'. Did you mean 'green'.*Known: blue, green, red"
    with pytest.raises(UnknownNameError, match=match):
        colours().get("gren")


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("xyz", ["red", "blue"], "Known: blue, red."),
        ("red", [], "None is registered."),
        ("rad", ["red", "blue"], "Did you mean 'red'? Known: blue, red."),
    ],
)
def test_nearest(name: str, known: list[str], said: str) -> None:
    assert nearest(name, known) == said
