"""Audits: looking at a model without its sealed adapters, on the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from aihwkit_lora.errors import SealError
from aihwkit_lora.unlearning.adapter_digest import layer_tensors
from aihwkit_lora.unlearning.request_log import check_text
from aihwkit_lora.unlearning.seal import peft_model, record
from aihwkit_lora.unlearning.sealed_layers import SealedLayer, SealedModel, sealed_layers


@contextmanager
def audit(peft: nn.Module, *, reason: str) -> Iterator[PeftModel]:
    """Lift the seals of a model for a while, and write down when and why.

    Inside the block, adapters can be switched off, left out, scaled or trained, for example to
    measure what the arrays still know. Merging, deleting and unloading sealed adapters stay
    refused. Afterwards, also after an error, everything is as before: switches, scales,
    ``requires_grad`` of all parameters, and the sealed tensors, bit for bit.

    Copies that are made inside the block are sealed. Start, end and reason are written to the log
    of each seal, the start before anything is lifted.

    Args:
        peft: A model with sealed adapters, or a module that contains one.
        reason: Why, at most 200 characters.
    Returns:
        The model of PEFT.
    Raises:
        SealError: No adapter is sealed.
        StageError: There is no model of PEFT.
        ConfigurationError: The reason is no short text.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit_lora.unlearning.seal import seal_
        >>> from peft import get_peft_model
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(16, 8)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> peft = get_peft_model(model, al.AnalogLoraConfig.for_model(model, r=2))
        >>> seal = seal_(peft, "default", request="person 2")
        >>> with audit(peft, reason="yearly check"), peft.disable_adapter():
        ...     y = peft(torch.ones(1, 16))
        >>> [entry.kind for entry in seal.log.entries()]
        ['seal', 'audit-start', 'audit-end']
    """
    check_text("reason", reason)
    model = peft_model(peft)
    if not isinstance(model, SealedModel):
        raise SealError(
            f"{type(model).__name__}: expected sealed adapters to audit, got none. Without a seal, "
            "adapters can be switched off as they are."
        )
    found = list(model.seal_book.seals.values())
    for seal in found:
        record("audit-start", seal, reason=reason)
    restore, outcome = _snapshot(model), "finished"
    model.seal_book.audits += 1
    try:
        yield model
    except BaseException as error:
        outcome = f"stopped by {type(error).__name__}"
        raise
    finally:
        model.seal_book.audits -= 1
        restore()
        for seal in found:
            record("audit-end", seal, reason=reason, outcome=outcome)


def _snapshot(model: SealedModel) -> Callable[[], None]:
    """Remember all that an audit may change; return what brings it back."""
    undo = [
        _switches(model),
        _flags(model),
        *(_tensors(layer, adapter) for _, layer in sealed_layers(model) for adapter in layer.held),
    ]

    def restore() -> None:
        for part in reversed(undo):
            part()

    return restore


def _switches(model: SealedModel) -> Callable[[], None]:
    names = ("_active_adapter", "_disable_adapters")
    held = [
        (module, {name: getattr(module, name) for name in names}, dict(_scaling(module)))
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    tuner, active = model.base_model, model.active_adapter
    all_active, disabled = tuner.active_adapter, model._adapters_disabled

    def restore() -> None:
        for module, switches, scaling in held:
            module.__dict__.update(switches)
            _scaling(module).update(scaling)
        tuner.active_adapter, model.active_adapter = all_active, active
        model._adapters_disabled = disabled

    return restore


def _scaling(module: nn.Module) -> dict[str, float]:
    return getattr(module, "scaling", {}) if isinstance(module, SealedLayer) else {}


def _flags(model: SealedModel) -> Callable[[], None]:
    held = {name: each.requires_grad for name, each in model.named_parameters()}

    def restore() -> None:
        # Leaving PEFT 0.21's disable_adapter() makes every active adapter trainable.
        for name, parameter in model.named_parameters():
            if name in held:
                parameter.requires_grad_(held[name])

    return restore


def _tensors(layer: SealedLayer, adapter: str) -> Callable[[], None]:
    groups = [getattr(layer, group) for group in layer.adapter_layer_names]
    parts = [(group, group[adapter]) for group in groups if adapter in group]
    held = [(each, each.detach().clone()) for each in layer_tensors(layer, adapter).values()]

    def restore() -> None:
        for group, part in parts:
            group[adapter] = part
        layer.lora_dropout[adapter] = nn.Identity()
        for tensor, values in held:
            with torch.no_grad():
                tensor.data = tensor.data.to(values.dtype)
                tensor.copy_(values)
        layer.fix_sealed()

    return restore
