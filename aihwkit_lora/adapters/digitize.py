"""Putting LoRA on a digital unit, and taking it off again."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraModel
from torch import nn

from aihwkit_lora.adapters.branches import (
    BranchesOnUnit,
    TunerOnUnit,
    branches,
    place_,
    require_known,
    restore_,
    running,
    slot_of,
)
from aihwkit_lora.adapters.digital_unit import DigitalUnit
from aihwkit_lora.adapters.sram import Sram
from aihwkit_lora.errors import StageError
from aihwkit_lora.metering.ledger import Ledger


def digitize_[Model: nn.Module](
    model: Model, unit: DigitalUnit, *, ledger: Ledger | None = None, phase: str = "deploy"
) -> Model:
    """Let a digital unit run the LoRA branches of all frozen layers, and load the active adapters.

    From now on inputs, weights and outputs of A and B are fixed-point numbers, with exact sums in
    between. Gradients pass straight through, so training goes on and takes the rounding into
    account; the parameters are still the floats that the optimiser knows. Everything of PEFT works
    as before, and adapters that are added later run on the unit too. A unit that the model has
    already is replaced.

    Args:
        model: A frozen model with LoRA on frozen layers.
        unit: What runs it.
        ledger: Counts the load, by layer, under ``phase``. If None, whoever observes the model
            counts it, as all later loads.
        phase: Name of the phase in the ledger.
    Returns:
        The model itself.
    Raises:
        StageError: No frozen layer has an adapter.
        UnsupportedTileError: An adapter is none of LoRA, rsLoRA and DoRA.
        ConfigurationError: The active adapters do not fit the SRAM.

    Example:
        >>> import aihwkit_lora as al
        >>> from peft import get_peft_model
        >>> chip, ledger = al.chips.get("rm-180nm"), al.Ledger()
        >>> model = al.convert(nn.Sequential(nn.Linear(16, 8)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> peft = get_peft_model(model, al.AnalogLoraConfig.for_model(model, r=2))
        >>> peft = digitize_(peft, DigitalUnit(bits=8, sram_kib=1), ledger=ledger)
        >>> ledger.total()["sram_write_bits"]
        384
    """
    found: dict[str, Any] = dict(branches(model))
    if not found:
        raise StageError(
            f"{type(model).__name__}: expected LoRA on frozen layers, got none. Call "
            "freeze_(model) and get_peft_model(model, config) first."
        )
    for name, layer in found.items():
        require_known(name, layer, getattr(layer, "lora_A", ()))
    # Nothing is touched until everything is known to fit.
    slots = [slot_of(name, layer, adapter) for name, layer in found.items() for adapter in layer.r]
    Sram(unit, slots).require(running(next(iter(found.values()))))
    sram = Sram(unit)
    for layer in [place_(name, layer, sram, layer.lora_A) for name, layer in found.items()]:
        layer.fetch(running(layer), ledger, phase)
    _watch_tuners(model, sram)
    return model


def _watch_tuners(model: nn.Module, sram: Sram) -> None:
    for module in model.modules():
        if type(module) is LoraModel:
            module.__class__ = TunerOnUnit
        if isinstance(module, TunerOnUnit):
            module.sram = sram


def undigitize_[Model: nn.Module](model: Model) -> Model:
    """Take adapters off the digital unit: they are PEFT's own again, in floating point.

    Args:
        model: Any model; nothing happens to one without a unit.
    Returns:
        The model itself.

    Example:
        >>> undigitize_(nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    for module in model.modules():
        restore_(module)
    return model


def power_cycle_[Model: nn.Module](model: Model) -> Model:
    """Lose what the SRAM holds, as it does without power; adapters load again when they run.

    Args:
        model: Any model; nothing happens to one without a unit.
    Returns:
        The model itself.

    Example:
        >>> power_cycle_(nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    for module in model.modules():
        if isinstance(module, BranchesOnUnit):
            module.sram.lose_power()
    return model
