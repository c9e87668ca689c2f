"""A ``LoraConfig`` that names the frozen layers of a model and fits the SRAM beside them.

PEFT never shows a model to a configuration: ``get_peft_model``, ``add_adapter`` and the tuners
only read its fields and compare names. So the model is given here, once, when the configuration
is made, and everything is settled before PEFT touches a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.conv import _ConvNd

from aihwkit_lora.adapters.budget import Footprint, largest_rank, total_bits
from aihwkit_lora.adapters.digital_unit import FLOAT_BITS, DigitalUnit, kib
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.tiles.freeze import frozen_layers, plain_name, target_modules


@dataclass
class AnalogLoraConfig(LoraConfig):
    """LoRA beside frozen arrays, within the SRAM of the digital unit.

    Make it with :meth:`for_model`. It takes every option of :class:`peft.LoraConfig`; what it
    saves is an ordinary LoRA that PEFT loads without this package.

    Args:
        sram_kib: Memory for adapter weights, in KiB; None means that nobody checks.
        bits: Width of a stored adapter weight; DoRA's magnitudes stay 16-bit floats.
    Raises:
        ConfigurationError: No target is named, or a width or size is not positive.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(16, 8)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> config = AnalogLoraConfig.for_model(model, r=2, sram_kib=1.0)
        >>> config.target_modules
        {'0'}
        >>> AnalogLoraConfig.for_model(model, r=64, sram_kib=1.0)
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.ConfigurationError: AnalogLoraConfig: expected adapters that fit ...
    """

    sram_kib: float | None = field(default=None, kw_only=True)
    bits: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.target_modules is None and not self.target_parameters:
            raise ConfigurationError(
                "AnalogLoraConfig: expected target_modules, got none. PEFT does not show the model "
                "to a configuration; make it with AnalogLoraConfig.for_model(model, ...), which "
                "names the frozen layers."
            )
        if self.bits < 1:
            raise ConfigurationError(
                f"AnalogLoraConfig: expected bits of at least 1, got {self.bits}. Set the width of "
                "a stored adapter weight, for example bits=16."
            )
        if self.sram_kib is not None and not self.sram_kib > 0:
            raise ConfigurationError(
                f"AnalogLoraConfig: expected sram_kib above 0, got {self.sram_kib} KiB. Set the "
                "memory of the digital unit, or None for no check."
            )

    @classmethod
    def for_model(
        cls, model: nn.Module, *, unit: DigitalUnit | None = None, **options: Any
    ) -> Self:
        """Name the frozen layers of a model and check that their adapters fit the SRAM.

        Adapters that the model carries already share the SRAM, so they count.

        Args:
            model: A frozen model, also one that carries adapters already.
            unit: Gives ``sram_kib`` and ``bits``.
            options: Fields of this class and of :class:`peft.LoraConfig`. ``target_modules``,
                where given, is used as it is.
        Returns:
            A configuration for ``get_peft_model(model, config)`` or
            ``peft_model.add_adapter(name, config)``.
        Raises:
            StageError: The model has no frozen layer.
            ConfigurationError: The adapters do not fit, ``modules_to_save`` names a frozen layer,
                a target is of a type whose adapters cannot be counted, or memory and width are
                given besides the unit.

        Example:
            >>> import aihwkit_lora as al
            >>> from peft import get_peft_model
            >>> chip = al.chips.get("rm-180nm")
            >>> model = al.convert(nn.Sequential(nn.Linear(16, 8)), chip)
            >>> model = al.freeze_(model, programmed_by="example")
            >>> peft = get_peft_model(model, AnalogLoraConfig.for_model(model, r=2))
            >>> peft.get_nb_trainable_parameters()[0]
            48
        """
        names = target_modules(model)
        if options.get("target_modules") is None:
            options = {**options, "target_modules": _targets(model, names)}
        if unit is not None:
            options = _with_unit(options, unit)
        config = cls(**options)
        config._check_modules_to_save(model)
        if config.sram_kib is not None:
            config._check_budget(model)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of an ordinary LoRA, which is what PEFT saves."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        return {key: value for key, value in fields.items() if key not in ("sram_kib", "bits")}

    def _check_modules_to_save(self, model: nn.Module) -> None:
        """Refuse what would copy an array: PEFT deep-copies these modules and trains the copy."""
        for wanted in self.modules_to_save or []:
            for name, module in model.named_modules():
                # PEFT matches the end of a name, not its last part.
                frozen = next(frozen_layers(module), None) if name.endswith(wanted) else None
                if frozen is not None:
                    layer = plain_name(f"{name}.{frozen[0]}".rstrip("."))
                    raise ConfigurationError(
                        f"layer '{layer}': expected modules_to_save to name digital layers only, "
                        f"got '{wanted}', which is or holds a frozen one. PEFT would train a copy, "
                        "and a copy is an array that nobody has programmed. Leave it out; the "
                        "layer learns through its adapter."
                    )

    def _check_budget(self, model: nn.Module) -> None:
        layers = [(name, self._footprint(name, layer)) for name, layer in _adapted(model, self)]
        needed = total_bits([part for _, part in layers], self.bits)
        present = _present_bits(model, self.bits)
        available = DigitalUnit(sram_kib=self.sram_kib or 0.0).capacity_bits
        if needed + present <= available:
            return
        beside = f" beside {kib(present)} of adapters in place" if present else ""
        raise ConfigurationError(
            f"AnalogLoraConfig: expected adapters that fit {self.sram_kib:g} KiB of SRAM, got "
            f"{kib(needed)} for {len(layers)} layers at rank {self.r} and {self.bits} "
            f"bits{beside}. {self._largest_rank(layers, available - present)}"
        )

    def _largest_rank(self, layers: list[tuple[str, Footprint]], room: int) -> str:
        """Say which rank fits into ``room`` bits, where rank_pattern keeps its own ranks."""
        free = [part for name, part in layers if not self._rank_is_set(name)]
        rest = total_bits([part for name, part in layers if self._rank_is_set(name)], self.bits)
        rank = largest_rank(free, room - rest, self.bits)
        if rank >= 1:
            return f"The largest rank that fits is r={rank}."
        return "No rank fits: adapt fewer layers, lower rank_pattern or bits, or get more SRAM."

    def _rank_is_set(self, name: str) -> bool:
        return get_pattern_key(list(self.rank_pattern or {}), name) in (self.rank_pattern or {})

    def _footprint(self, name: str, layer: nn.Module) -> Footprint:
        """What PEFT will create: A, B, and a bias of B or magnitudes where asked for."""
        patterns = self.rank_pattern or {}
        rank = int(patterns.get(get_pattern_key(list(patterns), name), self.r))
        if isinstance(layer, nn.Linear):
            per_rank, outputs = layer.in_features + layer.out_features, layer.out_features
        elif isinstance(layer, _ConvNd):
            outputs = layer.out_channels
            down = layer.in_channels * math.prod(layer.kernel_size)
            per_rank = down + outputs // layer.groups
        else:
            raise ConfigurationError(
                f"layer '{name}': expected a linear or convolutional layer, got "
                f"{type(layer).__name__}, whose adapter cannot be counted. Leave it out of "
                "target_modules, or leave out sram_kib."
            )
        return Footprint(
            rank=rank,
            per_rank=per_rank,
            biases=outputs * bool(self.lora_bias),
            magnitudes=outputs * bool(self.use_dora),
        )


def _with_unit(options: dict[str, Any], unit: DigitalUnit) -> dict[str, Any]:
    if both := sorted(options.keys() & {"sram_kib", "bits"}):
        raise ConfigurationError(
            f"AnalogLoraConfig: expected a unit or {' and '.join(both)}, got both. Leave one out."
        )
    return {**options, "sram_kib": unit.sram_kib, "bits": unit.stored_bits}


def _targets(model: nn.Module, frozen: list[str]) -> list[str] | str:
    """Name the frozen layers and nothing else.

    PEFT takes the name 'head' for 'decoder.head' too. Where that would reach another module, an
    exact pattern stands in for the list.
    """
    endings = tuple(f".{name}" for name in frozen)
    others = {plain_name(name) for name, _ in model.named_modules()} - set(frozen)
    if not any(name.endswith(endings) for name in others):
        return frozen
    return "|".join(re.escape(name) for name in frozen)


def _adapted(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Find the layers that PEFT will adapt, by their plain names."""
    tuners = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = tuple(f"{name}." for name in tuners)
    all_linear = str(config.target_modules).lower() == "all-linear"
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not name or name.startswith(inside):
            continue
        if isinstance(base, nn.Linear) if all_linear else _matches(config, plain_name(name)):
            yield plain_name(name), base


def _matches(config: LoraConfig, name: str) -> bool:
    return bool(check_target_module_exists(config, name))


def _present_bits(model: nn.Module, width: int) -> int:
    """Bits of the adapters that a model carries already."""
    weights = {
        id(parameter): parameter.numel() * (FLOAT_BITS if "magnitude" in part else width)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for part in module.adapter_layer_names
        for parameter in nn.ModuleList([getattr(module, part)]).parameters()
    }
    return sum(weights.values())
