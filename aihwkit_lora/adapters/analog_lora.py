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

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.tiles.freeze import frozen_layers, plain_name, target_modules

_BITS_PER_KIB = 8 * 1024


@dataclass
class AnalogLoraConfig(LoraConfig):
    """LoRA beside frozen arrays, within the SRAM of the digital unit.

    Make it with :meth:`for_model`. It takes every option of :class:`peft.LoraConfig`; what it
    saves is an ordinary LoRA that PEFT loads without this package.

    Args:
        sram_kib: Memory for adapter weights, in KiB; None means that nobody checks.
        bits: Width of a stored adapter weight.
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
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """Name the frozen layers of a model and check that their adapters fit the SRAM.

        Adapters that the model carries already share the SRAM, so they count.

        Args:
            model: A frozen model, also one that carries adapters already.
            options: Fields of this class and of :class:`peft.LoraConfig`. ``target_modules``,
                where given, is used as it is.
        Returns:
            A configuration for ``get_peft_model(model, config)`` or
            ``peft_model.add_adapter(name, config)``.
        Raises:
            StageError: The model has no frozen layer.
            ConfigurationError: The adapters do not fit, ``modules_to_save`` names a frozen layer,
                or a target is of a type whose adapters cannot be counted.

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
        layers = list(_adapted(model, self))
        needed = sum(self._adapter_size(*layer) for layer in layers)
        present = _present(model)
        available = math.floor((self.sram_kib or 0.0) * _BITS_PER_KIB)
        if (needed + present) * self.bits <= available:
            return
        beside = f" beside {self._kib(present)} of adapters in place" if present else ""
        raise ConfigurationError(
            f"AnalogLoraConfig: expected adapters that fit {self.sram_kib:g} KiB of SRAM, got "
            f"{self._kib(needed)} for {len(layers)} layers at rank {self.r} and {self.bits} "
            f"bits{beside}. {self._largest_rank(layers, available // self.bits - present)}"
        )

    def _largest_rank(self, layers: list[tuple[str, nn.Module]], room: int) -> str:
        """Say which rank fits into ``room`` weights, where rank_pattern keeps its own ranks."""
        free = [layer for layer in layers if not self._rank_is_set(layer[0])]
        at_zero = sum(self._adapter_size(*layer, rank=0) for layer in free)
        at_zero += sum(self._adapter_size(*layer) for layer in layers if layer not in free)
        slope = sum(self._adapter_size(*layer, rank=1) for layer in free)
        slope -= sum(self._adapter_size(*layer, rank=0) for layer in free)
        rank = (room - at_zero) // slope if slope else 0
        if rank >= 1:
            return f"The largest rank that fits is r={rank}."
        return "No rank fits: adapt fewer layers, lower rank_pattern or bits, or get more SRAM."

    def _rank_is_set(self, name: str) -> bool:
        return get_pattern_key(list(self.rank_pattern or {}), name) in (self.rank_pattern or {})

    def _adapter_size(self, name: str, layer: nn.Module, rank: int | None = None) -> int:
        """Adapter weights of one layer: A, B, and a bias of B or a magnitude where asked for."""
        if rank is None:
            patterns = self.rank_pattern or {}
            rank = int(patterns.get(get_pattern_key(list(patterns), name), self.r))
        vectors = int(bool(self.lora_bias)) + int(bool(self.use_dora))
        if isinstance(layer, nn.Linear):
            return rank * (layer.in_features + layer.out_features) + vectors * layer.out_features
        if isinstance(layer, _ConvNd):
            down = rank * layer.in_channels * math.prod(layer.kernel_size)
            up = layer.out_channels * rank // layer.groups
            return down + up + vectors * layer.out_channels
        raise ConfigurationError(
            f"layer '{name}': expected a linear or convolutional layer, got "
            f"{type(layer).__name__}, whose adapter cannot be counted. Leave it out of "
            "target_modules, or leave out sram_kib."
        )

    def _kib(self, weights: int) -> str:
        return f"{weights * self.bits / _BITS_PER_KIB:.4g} KiB"


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


def _present(model: nn.Module) -> int:
    """Count the weights of the adapters that a model carries already."""
    weights = {
        id(parameter): parameter.numel()
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for part in module.adapter_layer_names
        for parameter in nn.ModuleList([getattr(module, part)]).parameters()
    }
    return sum(weights.values())
