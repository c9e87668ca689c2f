"""Errors of aihwkit_lora: one base class, and one subclass for each reason to stop.

Every message says what was expected, what was found (naming the layer in full, with units) and
which call or field to change.
"""

from __future__ import annotations


class AihwkitLoraError(Exception):
    """Base class of all errors that this package raises on purpose."""


class EnvironmentMismatchError(AihwkitLoraError, ImportError):
    """The installed aihwkit and torch cannot work together."""


class StageError(AihwkitLoraError, RuntimeError):
    """A step was called out of order: convert, then program, then freeze, then adapt."""


class FrozenConductanceError(AihwkitLoraError, RuntimeError):
    """Something tried to change a frozen conductance, or a frozen conductance did change."""


class UnsupportedTileError(AihwkitLoraError, TypeError):
    """A layer, a tile or one of its settings has no frozen counterpart."""


class ConductanceWindowError(AihwkitLoraError, ValueError):
    """A conductance window is empty, inverted, or too small for the weights it should hold."""


class ConfigurationError(AihwkitLoraError, ValueError):
    """A configuration field has a value that cannot be used."""


class UnknownNameError(AihwkitLoraError, LookupError):
    """A name is not in its registry; the message lists the nearest known ones."""


class DataError(AihwkitLoraError):
    """A data set is missing, incomplete, or does not hold what was asked for."""


class RelapseError(AihwkitLoraError, RuntimeError):
    """A model knows again what it was made to forget."""


class SealError(AihwkitLoraError, RuntimeError):
    """Something tried to go around a sealed unlearning adapter, or a sealed file was altered."""
