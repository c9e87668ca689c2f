"""How the adapters of several tasks act together: all of them, by sum, the earlier ones fixed.

A frozen layer with adapters 1 … T computes ``W x + Σ_t s_t B_t A_t x``. What an earlier adapter
forgot stays forgotten, because nothing ever takes it out of that sum. The face task of
arXiv:2601.10037 runs the newest adapter only; there the forgotten person comes back while the next
one is learnt. ``composition="newest"`` does the same, for comparison.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from aihwkit_lora.continual.head import lift_rows_
from aihwkit_lora.errors import ConfigurationError, SealError
from aihwkit_lora.registry import nearest
from aihwkit_lora.unlearning.reference import (
    adapted_layers,
    adapter_parameters,
)
from aihwkit_lora.unlearning.seal import seals


class Composition(StrEnum):
    """Which adapters a model runs once a new one has been added.

    Example:
        >>> Composition("sum").meaning
        'Every adapter is active; their outputs add up.'
    """

    SUM = "sum"
    NEWEST = "newest"

    @property
    def meaning(self) -> str:
        """One sentence for reports."""
        return _MEANINGS[self]


_MEANINGS = {
    Composition.SUM: "Every adapter is active; their outputs add up.",
    Composition.NEWEST: "Only the newest adapter is active; what earlier ones did is undone.",
}


def add_adapter_(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    *,
    composition: Composition | str = Composition.SUM,
) -> PeftModel:
    """Put a fresh LoRA adapter on a model: it is trained, everything else is fixed.

    Earlier adapters stay active, by sum, and leave training: ``requires_grad`` off and ``grad``
    None, so that no optimiser moves them, whatever its weight decay. A fresh adapter adds nothing
    until it is trained, so outputs are as before. Nothing of the base is copied, and adapters of a
    model on a digital unit run on the unit. Adapters that are there but were switched off are
    switched on again.

    Args:
        model: A frozen model, or a ``PeftModel`` with any number of LoRA adapters.
        name: Name of the adapter, not used yet on this model.
        config: Plain LoRA: ``bias="none"`` and no ``modules_to_save``, for both would change what
            earlier adapters were trained with.
        composition: ``"sum"``, or ``"newest"`` to leave all earlier adapters out; a model with
            sealed adapters refuses the latter.
    Returns:
        The model itself where it is a ``PeftModel``, else a new one around it.
    Raises:
        ConfigurationError: The name is taken, the configuration changes more than one branch, or
            there is no such composition.
        SealError: ``"newest"`` on a model with sealed adapters.

    Example:
        >>> from aihwkit_lora.unlearning.reference import adapters_in_training
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = add_adapter_(nn.Sequential(nn.Linear(3, 2)), "forget-2", config)
        >>> model = add_adapter_(model, "learn-5", config)
        >>> active_adapters(model), adapters_in_training(model)
        (('forget-2', 'learn-5'), frozenset({'learn-5'}))
    """
    composition = _composition(composition)
    present = tuple(model.peft_config) if isinstance(model, PeftModel) else ()
    _check(name, config, present)
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, config, adapter_name=name)
    else:
        if composition is Composition.NEWEST:
            _refuse_sealed(model)
        model.add_adapter(name, config)
    lift_rows_(model)
    active = [*present, name] if composition is Composition.SUM else [name]
    model.base_model.set_adapter(active)  # type: ignore[operator]
    train_only_(model, name)
    return model


def train_only_[Model: nn.Module](model: Model, name: str) -> Model:
    """Train one adapter and fix all else, without changing which adapters are active.

    Args:
        model: A model with adapters.
        name: Name of one of them.
    Returns:
        The model itself.
    Raises:
        ConfigurationError: No layer has that adapter.

    Example:
        >>> from aihwkit_lora.unlearning.reference import adapters_in_training
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> model = add_adapter_(model, "first", LoraConfig(r=2, target_modules=["0"]))
        >>> adapters_in_training(train_only_(model, "first"))
        frozenset({'first'})
    """
    adapters = [adapter_parameters(layer) for _, layer in adapted_layers(model)]
    chosen = [parameter for by_name in adapters for parameter in by_name.get(name, ())]
    if not chosen:
        known = {adapter for by_name in adapters for adapter in by_name}
        raise ConfigurationError(
            f"adapter '{name}': expected one that a layer of the model has, got none. "
            f"{nearest(name, known)}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            # A left-over gradient would be enough for an optimiser to move, and decay, a weight.
            parameter.grad = None
    return model


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that a model runs, in the order in which they are added up.

    Args:
        model: Any module; one without adapters has none.

    Example:
        >>> active_adapters(nn.Linear(2, 1))
        ()
    """
    running = (
        adapter
        for _, layer in adapted_layers(model)
        if not layer.disable_adapters
        for adapter in layer.active_adapters
    )
    return tuple(dict.fromkeys(running))


def _composition(name: str) -> Composition:
    known = [str(each) for each in Composition]
    if name not in known:
        raise ConfigurationError(f"unknown composition '{name}'. {nearest(name, known)}")
    return Composition(name)


def _check(name: str, config: Any, present: tuple[str, ...]) -> None:
    if name in present:
        raise ConfigurationError(
            f"adapter '{name}': expected a name that is not used yet, got one of "
            f"{', '.join(present)}. Choose another name."
        )
    if not isinstance(config, LoraConfig):
        raise ConfigurationError(
            f"adapter '{name}': expected a LoraConfig, got {type(config).__name__}. Only LoRA "
            "branches add up."
        )
    if config.bias != "none":
        raise ConfigurationError(
            f"adapter '{name}': expected bias='none', got bias='{config.bias}'. Biases belong to "
            "the base, which earlier adapters were trained with."
        )
    if config.modules_to_save:
        raise ConfigurationError(
            f"adapter '{name}': expected no modules_to_save, got "
            f"{', '.join(map(str, config.modules_to_save))}. PEFT would swap whole modules, and "
            "swapping is no sum. For new classes call grow_head_(model, outputs) afterwards."
        )


def _refuse_sealed(model: PeftModel) -> None:
    # Sealed adapters refuse to be left out; ask before PEFT has put anything into the layers.
    if sealed := ", ".join(map(str, seals(model))):
        raise SealError(
            f"composition 'newest': expected a model without sealed adapters, got {sealed}. Use "
            "composition='sum', which keeps them active."
        )
