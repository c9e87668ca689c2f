"""Sealing unlearning adapters: always active, by sum, and fixed.

Base conductances still hold what was forgotten; only the adapter keeps it out of the outputs. So
whoever leaves the adapter out, on purpose or by the way, has the old behaviour back. A seal makes
that an error wherever Python passes by.
"""

from __future__ import annotations

from datetime import UTC, datetime

from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import MultiheadAttention
from torch import nn

from aihwkit_lora.errors import ConfigurationError, SealError, StageError, UnknownNameError
from aihwkit_lora.registry import nearest
from aihwkit_lora.tiles.freeze import fingerprint
from aihwkit_lora.unlearning.adapter_digest import adapter_digest, lora_layers, tuner_of
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal_book import Seal, SealBook
from aihwkit_lora.unlearning.sealed_layers import SealedModel, guard_, sealed_layers

__all__ = ["Seal", "peft_model", "seal_", "seals", "verify_seals"]


def seal_(
    peft: nn.Module,
    adapter: str,
    *,
    request: str,
    level: ForgettingLevel | str = ForgettingLevel.SUPPRESSED,
    log: RequestLog | None = None,
) -> Seal:
    """Seal an adapter: from now on it acts in every pass, and nothing changes it.

    It is activated, leaves training (``requires_grad`` off) and loses its dropout. Switching it
    off, leaving it out, scaling, merging, deleting, overwriting or unloading it raises, with PEFT's
    own methods and with direct writes to a layer's switches; :func:`audit` lifts that for a while,
    and is logged. Adapters that are learnt later add up with it.

    Args:
        peft: A frozen model with LoRA, or a module that contains one.
        adapter: Name of an adapter of LoRA matrices, without ``modules_to_save`` and ``bias``.
        request: The request that it answers, at most 200 characters.
        level: How far the forgotten data is out of reach: ``"suppressed"``, or ``"reprogrammed"``
            where the arrays were written anew.
        log: Where the seal and its audits are written; that of the model's earlier seals if None,
            or else one in memory, ``seals(model)[0].log``.
    Returns:
        The record of the seal.
    Raises:
        UnknownNameError: There is no such adapter.
        SealError: It is sealed already, switched off, merged, or not made of LoRA matrices alone;
            or an audit is running.
        StageError: The base is not frozen.
        ConfigurationError: The request is no short text, or there is no such level for a seal.

    Example:
        >>> import aihwkit_lora as al
        >>> from peft import get_peft_model
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(16, 8)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> config = al.AnalogLoraConfig.for_model(model, r=2)
        >>> peft = get_peft_model(model, config, adapter_name="forget-2")
        >>> print(seal_(peft, "forget-2", request="person 2"))
        adapter 'forget-2' (request 'person 2')
        >>> with peft.disable_adapter():
        ...     pass
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.SealError: sealed adapter 'forget-2' (request 'person 2'): ...
    """
    model = peft_model(peft)
    book = model.seal_book if isinstance(model, SealedModel) else SealBook()
    _require_sealable(model, adapter, book)
    logs = [seal.log for seal in book.seals.values()] or [RequestLog(None)]
    seal = Seal(
        request=request,
        adapter=adapter,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        level=_level(level),
        adapter_sha256=adapter_digest(model, adapter),
        base_fingerprint=fingerprint(model),
        log=logs[-1] if log is None else log,
    )
    record("seal", seal)
    put_(model, seal, book)
    return seal


def put_(model: PeftModel, seal: Seal, book: SealBook | None = None) -> None:
    """Put a seal on a model, as it was made or as it was loaded.

    Args:
        model: Has the adapter.
        seal: Its record.
        book: The seals of the model so far; found in the model if None.
    """
    if book is None:
        book = model.seal_book if isinstance(model, SealedModel) else SealBook()
    guard_(model, book)
    book.seals[seal.adapter] = seal
    for _, layer in sealed_layers(model):
        layer.hold(seal.adapter)
    tuner = tuner_of(model)
    tuner.active_adapter = [*dict.fromkeys([*tuner.active_adapters, seal.adapter])]


def record(kind: str, seal: Seal, **fields: str | int) -> None:
    """Write into the log of a seal what happened to it.

    Args:
        kind: What happened.
        seal: To which.
        fields: What else there is to say.
    """
    seal.log.append(
        kind,
        seal.request,
        adapter=seal.adapter,
        level=str(seal.level),
        adapter_sha256=seal.adapter_sha256,
        base_fingerprint=seal.base_fingerprint,
        **fields,
    )


def seals(model: nn.Module) -> tuple[Seal, ...]:
    """The seals of a model, oldest first, each with its log.

    Args:
        model: Any module; one without sealed adapters has none.

    Example:
        >>> seals(nn.Linear(2, 1))
        ()
    """
    return tuple(
        seal
        for module in model.modules()
        if isinstance(module, SealedModel)
        for seal in module.seal_book.seals.values()
    )


def verify_seals(model: nn.Module) -> None:
    """Hash sealed adapters and arrays, and look whether all of them act.

    A pass looks too, but hashes only what torch says has changed; writes through ``.data`` or a
    shared buffer show here alone.

    Args:
        model: A model with sealed adapters, or a module that contains one.
    Raises:
        SealError: There is none; one was altered, left out or lost a layer; or the arrays are
            others. The message names the layer.

    Example:
        >>> verify_seals(nn.Linear(2, 1))
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.SealError: Linear: expected sealed adapters, got none. ...
    """
    if not seals(model):
        raise SealError(
            f"{type(model).__name__}: expected sealed adapters, got none. Seal one with "
            "seal_(peft, adapter, request=...), or load a sealed model with load_sealed."
        )
    for module in model.modules():
        if isinstance(module, SealedModel):
            _verify(module)


def _verify(model: SealedModel) -> None:
    for _, layer in sealed_layers(model):
        for adapter in layer.held:
            layer.require_same(adapter)
        layer.require_composed()
    arrays = fingerprint(model)
    for seal in model.seal_book.seals.values():
        if adapter_digest(model, seal.adapter) != seal.adapter_sha256:
            raise SealError(
                f"sealed {seal}: expected the layers that were sealed, got others. Something took "
                "layers off or renamed them; load the sealed model again."
            )
        if arrays != seal.base_fingerprint:
            raise SealError(
                f"sealed {seal}: expected arrays with fingerprint {seal.base_fingerprint[:12]}…, "
                f"got {arrays[:12]}…. Something wrote them; load the sealed model again."
            )


def peft_model(model: nn.Module) -> PeftModel:
    """Find the model of PEFT in a module.

    Args:
        model: One, or a module that contains one.
    Raises:
        StageError: There is none, or more than one.

    Example:
        >>> peft_model(nn.Linear(2, 1))
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.StageError: Linear: expected one model of PEFT, got 0. ...
    """
    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(found) != 1:
        raise StageError(
            f"{type(model).__name__}: expected one model of PEFT, got {len(found)}. Add adapters "
            "with get_peft_model(model, config) first."
        )
    return found[0]


def _level(level: ForgettingLevel | str) -> ForgettingLevel:
    known = [str(each) for each in ForgettingLevel if each is not ForgettingLevel.EXACT_ADAPTER]
    if level not in known:
        raise ConfigurationError(
            f"seal_: expected level {' or '.join(map(repr, known))}, got {str(level)!r}. A sealed "
            "adapter keeps data out of the outputs; what lives in an adapter alone is destroyed "
            "with destroy_ instead."
        )
    return ForgettingLevel(level)


def _require_sealable(model: PeftModel, adapter: str, book: SealBook) -> None:
    if adapter not in model.peft_config:
        raise UnknownNameError(
            f"unknown adapter '{adapter}'. {nearest(adapter, model.peft_config)}"
        )
    if adapter in book.seals:
        raise SealError(
            f"sealed {book.seals[adapter]}: expected an adapter without a seal, got one with. A "
            "second request needs an adapter of its own."
        )
    if not book.in_force:
        raise SealError(
            f"adapter '{adapter}': expected seals that are in force, got a running audit. Seal it "
            "after the audit."
        )
    if not isinstance(model.base_model, LoraModel):
        raise SealError(
            f"adapter '{adapter}': expected LoRA, got {type(model.base_model).__name__}. Only LoRA "
            "branches add up with what is learnt later."
        )
    _require_branches_only(model, adapter)
    for name, layer in lora_layers(model, adapter):
        problem = _problem(layer)
        if problem:
            raise SealError(
                f"layer '{name}', adapter '{adapter}': expected a branch that can act in every "
                f"pass, got {problem}"
            )


def _problem(layer: LoraLayer) -> str:
    if isinstance(layer, MultiheadAttention):
        return "attention that PEFT merges in every pass. Adapt its linear layers instead."
    if layer.disable_adapters:
        return "adapters that are switched off. Leave disable_adapter(), or enable them."
    if layer.merged:
        return f"merged adapters {layer.merged_adapters}. Call unmerge_adapter() first."
    return ""


def _require_branches_only(model: PeftModel, adapter: str) -> None:
    config = model.peft_config[adapter]
    for name, none in (("modules_to_save", None), ("bias", "none")):
        value = getattr(config, name, none)
        if value and value != none:
            raise SealError(
                f"adapter '{adapter}': expected {name}={none!r}, got {value!r}. PEFT swaps such "
                "parts instead of adding them up, so later adapters would take them off again; "
                "train the adapter without."
            )
