"""Chips: geometry, converters, write policy and prices, one file per chip.

``chips.get("rm-180nm")`` finds one, ``chips.names()`` lists them, ``chips.add(name, chip)`` takes
yours.
"""

from aihwkit_lora.chips import rm_180nm as _rm_180nm  # noqa: F401  (registers itself)
from aihwkit_lora.chips.chip import Chip, chips
from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.chips.write_policy import WritePolicy

add, get, names, register = chips.add, chips.get, chips.names, chips.register

__all__ = ["Chip", "ConductanceMapping", "WritePolicy", "add", "chips", "get", "names", "register"]
