"""How a broken assumption about a host library reads, and the small model most tests share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import pytest
import torch
from aihwkit.nn import AnalogLinear
from torch import nn


class Fact(str):
    """The message of an assertion: what a host library did, who relies on it, what to do."""

    __slots__ = ()

    @contextmanager
    def raises(self, error: type[Exception], match: str) -> Iterator[None]:
        """Expect an error of exactly this type whose text contains the pattern ``match``."""
        found: Exception | None = None
        try:
            yield
        except Exception as caught:
            found = caught
        if type(found) is not error or not re.search(match, str(found)):
            seen = "no error" if found is None else f"{type(found).__name__}: {found}"
            raise AssertionError(f"{self} Found: {seen}") from found


FactMaker = Callable[[str, str, str], Fact]


def _facts_of(distribution: str) -> FactMaker:
    version = metadata.version(distribution)

    def fact(holds: str, relies: str, advice: str) -> Fact:
        return Fact(
            f"{distribution} {version} changed: {holds}. "
            f"aihwkit_lora relies on it in {relies}: {advice}."
        )

    return fact


@pytest.fixture(scope="session")
def aihwkit_fact() -> FactMaker:
    """Make the message for a fact about aihwkit: (what held, who relies on it, what to do)."""
    return _facts_of("aihwkit")


@pytest.fixture(scope="session")
def peft_fact() -> FactMaker:
    """The same for PEFT."""
    return _facts_of("peft")


@pytest.fixture(scope="session")
def lightning_fact() -> FactMaker:
    """The same for Lightning."""
    return _facts_of("pytorch-lightning")


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    # This reaches torch only; what aihwkit's C++ tiles draw differs from run to run.
    torch.manual_seed(0)


@pytest.fixture
def net() -> Callable[[Any], nn.Sequential]:
    """Make a digital layer below an analogue one, so that gradients pass through the latter."""

    def make(rpu_config: Any) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), AnalogLinear(4, 3, rpu_config=rpu_config))

    return make
