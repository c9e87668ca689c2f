"""Exact forgetting: what lives in one adapter alone is gone when the adapter is destroyed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from aihwkit_lora.errors import SealError, StageError, UnknownNameError
from aihwkit_lora.registry import nearest
from aihwkit_lora.unlearning.adapter_digest import layer_tensors, lora_layers, tuner_of
from aihwkit_lora.unlearning.levels import ForgettingLevel
from aihwkit_lora.unlearning.request_log import Entry, RequestLog
from aihwkit_lora.unlearning.seal import peft_model, seals

ALWAYS_OUT_OF_REACH = (
    "copies in other processes and on other machines, and backups",
    "tensors that a caller still holds, such as copies of the adapter and outputs computed with it",
    "blocks that a file system or a drive keeps of overwritten files",
    "a learning-rate scheduler, which may hold losses of the unit",
)
"""What no call can reach, and so is listed with every destruction."""


@runtime_checkable
class Replay(Protocol):
    """A buffer of training examples that knows which unit each is of."""

    def remove(self, unit: str, /) -> int:
        """Drop all items of a unit; return how many there were."""


@dataclass(frozen=True, kw_only=True)
class Destruction:
    """What was destroyed with an adapter, and what is out of reach.

    Args:
        request: The request that it answers.
        unit: The person or thing whose data the adapter held.
        adapter: Its name.
        date: When, UTC, ISO 8601.
        level: ``exact-adapter``.
        layers: Layers that held a part of the adapter.
        parameters: Numbers that were overwritten with zeros.
        optimizer_states: Parameters whose state an optimiser gave up.
        replay_items: Items that a replay buffer gave up.
        files: Checkpoints that were overwritten and removed.
        unreached: What was not reached, and why.
    """

    request: str
    unit: str
    adapter: str
    date: str
    level: ForgettingLevel
    layers: int
    parameters: int
    optimizer_states: int
    replay_items: int
    files: tuple[str, ...]
    unreached: tuple[str, ...]


def destroy_(
    peft: nn.Module,
    adapter: str,
    *,
    unit: str,
    request: str,
    log: RequestLog,
    lived_only_here: bool,
    optimizer: Optimizer | None = None,
    replay: Replay | None = None,
    checkpoints: Iterable[str | Path] = (),
) -> Destruction:
    """Destroy an adapter and what was derived from it, so that its unit's data is erased.

    Its factors, gradients and optimiser state are overwritten with zeros in place and dropped, its
    room in the SRAM of a digital unit is freed, and PEFT forgets it. The model then computes, bit
    for bit, what it would without the adapter.

    This is exact only if the data never went anywhere else: not into the arrays, not into another
    adapter. The caller has to say so, and the log has to agree, with an entry
    ``log.append("learn", request, unit=unit, adapter=adapter)`` from when it was learnt. Adapters
    that were learnt later may have been trained on top of this one; the log cannot tell, so they
    are listed among what was not reached.

    Without any adapter left, PEFT 0.21 runs the model no more: take ``peft.unload()``.

    Args:
        peft: A model with LoRA, or a module that contains one.
        adapter: Name of the adapter.
        unit: The person or thing to forget, as in the log.
        request: The request that is answered.
        log: Knows where the unit's data went; what is destroyed is written there.
        lived_only_here: The caller's word that the data went into this adapter alone.
        optimizer: Gives up the state of the adapter's parameters, and the parameters.
        replay: Gives up the unit's items.
        checkpoints: Files and folders to overwrite and remove.
    Returns:
        What was destroyed and what was not reached.
    Raises:
        UnknownNameError: There is no such adapter.
        SealError: The adapter is sealed: without it, what it suppresses would come back.
        StageError: The caller does not vouch, the log does not agree, the adapter is merged, or it
            has trained biases of the base.
        ConfigurationError: Unit or request is no short text.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(3, 2))
        >>> peft = get_peft_model(net, LoraConfig(r=1, target_modules=["0"]), adapter_name="p3")
        >>> log = RequestLog(None)
        >>> _ = log.append("learn", "enrol 3", unit="person 3", adapter="p3")
        >>> told = {"request": "forget 3", "log": log, "lived_only_here": True}
        >>> done = destroy_(peft, "p3", unit="person 3", **told)
        >>> str(done.level), done.parameters
        ('exact-adapter', 5)
    """
    model = peft_model(peft)
    _require_destroyable(model, adapter)
    later = _require_only_there(log, unit, adapter, lived_only_here)
    log.append("destroy-start", request, unit=unit, adapter=adapter)
    layers = len(list(lora_layers(model, adapter)))
    parameters, states = _destroy_tensors(model, adapter, optimizer)
    _take_off(model, adapter)
    items = 0 if replay is None else replay.remove(unit)
    files, failed = _destroy_files(checkpoints)
    traces = [
        f"adapter '{name}', learnt later and perhaps on top of this one"
        for name in later
        if name in model.peft_config
    ]
    done = Destruction(
        request=request,
        unit=unit,
        adapter=adapter,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        level=ForgettingLevel.EXACT_ADAPTER,
        layers=layers,
        parameters=parameters,
        optimizer_states=states,
        replay_items=items,
        files=tuple(files),
        unreached=(*failed, *traces, *ALWAYS_OUT_OF_REACH),
    )
    _record(log, done)
    return done


def _record(log: RequestLog, done: Destruction) -> None:
    log.append(
        "destroy",
        done.request,
        unit=done.unit,
        adapter=done.adapter,
        level=str(done.level),
        parameters=done.parameters,
        optimizer_states=done.optimizer_states,
        replay_items=done.replay_items,
        files=len(done.files),
        unreached=len(done.unreached),
    )


def _require_destroyable(model: PeftModel, adapter: str) -> None:
    if adapter not in model.peft_config:
        raise UnknownNameError(
            f"unknown adapter '{adapter}'. {nearest(adapter, model.peft_config)}"
        )
    for seal in seals(model):
        if seal.adapter == adapter:
            raise SealError(
                f"sealed {seal}: expected an adapter that holds data, got one that keeps data out "
                "of the outputs; without it, that data would come back. Destroy the adapter that "
                "learnt the data, or leave this one."
            )
    bias = getattr(model.peft_config[adapter], "bias", "none")
    if bias != "none":
        raise StageError(
            f"adapter '{adapter}': expected one that trains its own parameters alone, got "
            f"bias={bias!r}, which has trained the base. Train it with bias='none' for exact "
            "forgetting."
        )
    layers = list(lora_layers(model, adapter))
    if not layers:
        raise StageError(
            f"adapter '{adapter}': expected LoRA, got {type(tuner_of(model)).__name__} without a "
            "layer that holds it. Exact forgetting needs an adapter of LoRA matrices."
        )
    for name, layer in layers:
        if adapter in layer.merged_adapters:
            raise StageError(
                f"layer '{name}', adapter '{adapter}': expected one beside the layer, got one that "
                "is merged into it. Call unmerge_adapter() first; unmerging leaves rounding."
            )


def _require_only_there(
    log: RequestLog, unit: str, adapter: str, lived_only_here: bool
) -> tuple[str, ...]:
    """Check where the unit's data went; return adapters that were learnt later."""
    if lived_only_here is not True:
        raise StageError(
            f"adapter '{adapter}': expected the caller's word that the data of '{unit}' lived "
            "there alone (lived_only_here=True), got none. If it went into the arrays too, it can "
            "be suppressed, or the arrays programmed anew without it."
        )
    entries = log.entries()
    learnt = [n for n, entry in enumerate(entries) if _learns(entry, unit, adapter)]
    if not learnt:
        raise StageError(
            f"adapter '{adapter}': expected an entry of kind 'learn' with unit='{unit}' and "
            f"adapter='{adapter}' in the log, got none. Write it when the unit is learnt: "
            "log.append('learn', request, unit=..., adapter=...)."
        )
    if elsewhere := _places(entries, unit) - {adapter}:
        raise StageError(
            f"adapter '{adapter}': expected the data of '{unit}' there alone, got a log that says "
            f"it also went into {', '.join(sorted(elsewhere))}. Destroy those adapters first; "
            "what went into the arrays cannot be forgotten exactly."
        )
    after = (entry.fields.get("adapter") for entry in entries[learnt[0] :] if entry.kind == "learn")
    return tuple(dict.fromkeys(str(name) for name in after if name not in (None, adapter)))


def _learns(entry: Entry, unit: str, adapter: str) -> bool:
    place = (entry.fields.get("unit"), entry.fields.get("adapter"))
    return entry.kind == "learn" and place == (unit, adapter)


def _places(entries: Iterable[Entry], unit: str) -> set[str]:
    """Where a unit's data is, as far as the log knows: learnt there, and not destroyed since."""
    places: set[str] = set()
    for entry in entries:
        place = str(entry.fields.get("adapter") or "the base")
        if entry.kind == "learn" and entry.fields.get("unit") == unit:
            places.add(place)
        elif entry.kind == "destroy":
            places.discard(place)
    return places


def _adapter_tensors(model: PeftModel, adapter: str) -> Iterator[Tensor]:
    for _, layer in lora_layers(model, adapter):
        yield from layer_tensors(layer, adapter).values()
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for group in module.adapter_layer_names:
                parts = getattr(module, group)
                copies = nn.ModuleList([parts[adapter]] if adapter in parts else [])
                yield from (*copies.parameters(), *copies.buffers())


def _destroy_tensors(
    model: PeftModel, adapter: str, optimizer: Optimizer | None
) -> tuple[int, int]:
    """Overwrite all tensors of an adapter; count their numbers and the states of an optimiser."""
    found = {id(tensor): tensor for tensor in _adapter_tensors(model, adapter)}
    states = 0
    if optimizer is not None:
        states = _destroy_states(optimizer, found.keys())
    for tensor in found.values():
        _zero(tensor)
        if tensor.grad is not None:
            _zero(tensor.grad)
            tensor.grad = None
    return sum(tensor.numel() for tensor in found.values()), states


def _destroy_states(optimizer: Optimizer, wanted: Iterable[int]) -> int:
    wanted, states = set(wanted), 0
    # Groups stay, also empty ones: schedulers know them by their position.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in wanted:
                continue
            state = optimizer.state.pop(parameter, {})
            states += bool(state)
            for value in state.values():
                if isinstance(value, Tensor):
                    _zero(value)
        group["params"] = [each for each in group["params"] if id(each) not in wanted]
    return states


def _zero(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.detach().zero_()


def _take_off(model: PeftModel, adapter: str) -> None:
    """Let PEFT forget an adapter, and leave all others as they are.

    PEFT 0.21 activates another adapter when the last active one goes, and makes it trainable.
    """
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    tuner = tuner_of(model)
    remaining = [name for name in tuner.active_adapters if name != adapter]
    # Not by set_adapter, which takes no empty list where there are modules_to_save.
    for _, layer in lora_layers(model):
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter]
    tuner.active_adapter = remaining
    model.delete_adapter(adapter)
    if model.active_adapter == adapter and model.peft_config:
        # Only a name under which PEFT looks up what kind of adapters there are.
        model.active_adapter = (remaining or list(model.peft_config))[0]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])


def _destroy_files(checkpoints: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """Overwrite and remove files; return those that are gone and those that are not, with why."""
    gone, failed = [], []
    for path in map(Path, checkpoints):
        if not path.exists() and not path.is_symlink():
            failed.append(f"{path}: not found")
            continue
        inside = [each for each in path.rglob("*") if not each.is_dir() or each.is_symlink()]
        for file in inside if path.is_dir() and not path.is_symlink() else [path]:
            try:
                _destroy_file(file)
                gone.append(str(file))
            except OSError as error:
                failed.append(f"{file}: {error.strerror or error}")
    return gone, failed


def _destroy_file(file: Path) -> None:
    if file.is_symlink():
        raise OSError("a link; name what it points to")
    with file.open("r+b") as handle:
        handle.write(bytes(file.stat().st_size))
        handle.flush()
        os.fsync(handle.fileno())
    file.unlink()
