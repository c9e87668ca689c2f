"""Chips: geometry, converters, write policy and prices, one file per chip.

``chips.get("rm-180nm")`` finds one, ``chips.names()`` lists them, ``chips.add(name, chip)`` takes
yours, and ``chips.load("my-chip.yaml")`` reads one from a file.
"""

from aihwkit_lora.chips import hermes_14nm as _hermes_14nm  # noqa: F401  (registers itself)
from aihwkit_lora.chips import neurram_130nm as _neurram_130nm  # noqa: F401
from aihwkit_lora.chips import rm_180nm as _rm_180nm  # noqa: F401
from aihwkit_lora.chips.chip import Chip, chips
from aihwkit_lora.chips.description import find, from_dict, load, to_dict
from aihwkit_lora.chips.maker import Maker
from aihwkit_lora.chips.mapping import CellEncoding, ConductanceMapping
from aihwkit_lora.chips.write_policy import PulseStatistics, WritePolicy

add, get, names, register = chips.add, chips.get, chips.names, chips.register

__all__ = [
    "CellEncoding",
    "Chip",
    "ConductanceMapping",
    "Maker",
    "PulseStatistics",
    "WritePolicy",
    "add",
    "chips",
    "find",
    "from_dict",
    "get",
    "load",
    "names",
    "register",
    "to_dict",
]
