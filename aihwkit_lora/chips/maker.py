"""Classes of aihwkit together with their arguments: they compare by value and can be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aihwkit_lora.chips.mapping import ConductanceMapping


@dataclass(frozen=True)
class Maker[T]:
    """A class of aihwkit with its arguments; calling it makes a new object.

    Unlike a lambda, it equals another one of the same content, and ``chips.to_dict`` can write it.

    Args:
        kind: The class.
        arguments: Its keyword arguments.
        mapping: Where the class is a noise model that takes a ``g_converter``: whose converter.

    Example:
        >>> from aihwkit.inference.noise.hermes import HermesNoiseModel
        >>> window = ConductanceMapping(g_min_siemens=0.0, g_max_siemens=10.35e-6, pairs=2)
        >>> noise = Maker(HermesNoiseModel, {"num_devices": 1}, window)
        >>> noise().g_max, noise().t_0, noise == Maker(HermesNoiseModel, {"num_devices": 1}, window)
        (10.35, 200.0, True)
    """

    kind: Callable[..., T]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mapping: ConductanceMapping | None = None

    def __call__(self) -> T:
        """Make the object."""
        if self.mapping is None:
            return self.kind(**self.arguments)
        return self.kind(g_converter=self.mapping.converter(), **self.arguments)
