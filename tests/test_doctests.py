"""The examples in docstrings run, each module under the name that users import.

pytest's own collection would import callbacks/ and recipes/ a second time, under bare names.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import aihwkit_lora
import aihwkit_lora.callbacks
import aihwkit_lora.recipes

MODULES = sorted(
    module.name
    for package in (aihwkit_lora, aihwkit_lora.callbacks, aihwkit_lora.recipes)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.ispkg
)
OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def test_both_folders_beside_the_core_are_found():
    assert {"aihwkit_lora.callbacks.energy_meter", "aihwkit_lora.recipes.cli"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=OPTIONS)
    assert failed == 0
