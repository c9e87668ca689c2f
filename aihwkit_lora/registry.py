"""Named extension points: one dict, one decorator, and errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, KeysView

from aihwkit_lora.errors import ConfigurationError, UnknownNameError


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names come closest to ``name``, or list them all.

    Args:
        name: What was asked for.
        known: What could have been asked for.
    Returns:
        A sentence that ends an error message.

    Example:
        >>> nearest("rm-180", ["rm-180nm", "hermes-14nm"])
        "Did you mean 'rm-180nm'? Known: hermes-14nm, rm-180nm."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    listing = f"Known: {', '.join(names)}." if names else "None is registered."
    if not close:
        return listing
    return f"Did you mean {' or '.join(repr(match) for match in close)}? {listing}"


class Registry[T]:
    """A dict of named things of one kind that refuses duplicates.

    Args:
        kind: What an entry is called in error messages, for example ``"chip"``.

    Example:
        >>> colours = Registry[int]("colour")
        >>> colours.add("red", 0xFF0000)
        >>> colours.get("rod")
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.UnknownNameError: unknown colour 'rod'. Did you mean 'red'? Known: red.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Store ``entry`` under ``name``.

        Args:
            name: Unique within this registry.
            entry: What :meth:`get` shall return.
        Raises:
            ConfigurationError: The name is taken.
        """
        if name in self._entries:
            raise ConfigurationError(
                f"{self.kind} '{name}' is registered already. Choose another name."
            )
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores what it decorates under ``name``.

        Args:
            name: Unique within this registry.
        """

        def store(entry: T) -> T:
            self.add(name, entry)
            return entry

        return store

    def get(self, name: str) -> T:
        """Return the entry called ``name``.

        Args:
            name: A registered name.
        Raises:
            UnknownNameError: No such entry; the message lists the nearest names.
        """
        if name not in self._entries:
            raise UnknownNameError(f"unknown {self.kind} '{name}'. {nearest(name, self._entries)}")
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        return tuple(sorted(self._entries))

    def keys(self) -> KeysView[str]:
        """All registered names as they are at any time, to look names up without a call."""
        return self._entries.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries
