"""What a LoRA adapter is made of, and a hash that shows whether it is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from aihwkit_lora.tiles.freeze import plain_name


def tuner_of(model: PeftModel) -> Any:
    """The tuner of a model of PEFT, which torch's types do not know.

    Args:
        model: A model of PEFT.
    """
    return model.base_model


def lora_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoraLayer]]:
    """Find LoRA layers, with the plain names of the layers beside them.

    Args:
        model: Any module.
        adapter: Only the layers that have this adapter.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter is None or layer_tensors(module, adapter)):
            yield plain_name(name), module


def layer_tensors(layer: LoraLayer, adapter: str) -> dict[str, Tensor]:
    """Parameters and buffers of an adapter in one layer; none where the layer lacks it.

    Args:
        layer: A LoRA layer.
        adapter: Name of the adapter.
    """
    found: dict[str, Tensor] = {}
    for group in layer.adapter_layer_names:
        parts = getattr(layer, group)
        if adapter not in parts:
            continue
        part = parts[adapter]
        if isinstance(part, Tensor):
            found[f"{group}.{adapter}"] = part
        else:
            held = (*part.named_parameters(), *part.named_buffers())
            found |= {f"{group}.{adapter}.{name}": tensor for name, tensor in held}
    return found


def layer_digest(
    layer: LoraLayer, adapter: str, instead: Mapping[str, Tensor] | None = None
) -> str:
    """SHA-256 of an adapter in one layer: names, types, shapes and values, and the scale.

    Args:
        layer: A LoRA layer that has the adapter.
        adapter: Name of the adapter.
        instead: Tensors in the place of some of the layer's own.
    """
    tensors = {**layer_tensors(layer, adapter), **(instead or {})}
    scale = float(layer.scaling.get(adapter, float("nan")))
    return tensors_digest({**tensors, "scaling": torch.tensor(scale, dtype=torch.float64)})


def adapter_digest(model: PeftModel, adapter: str) -> str:
    """SHA-256 of an adapter in all of its layers.

    Args:
        model: A model of PEFT.
        adapter: Name of the adapter.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> peft = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
        >>> before = adapter_digest(peft, "default")
        >>> nn.init.ones_(peft.base_model.model[0].lora_B["default"].weight).shape
        torch.Size([2, 8])
        >>> adapter_digest(peft, "default") == before
        False
    """
    digest = hashlib.sha256()
    for name, layer in sorted(lora_layers(model, adapter), key=lambda item: item[0]):
        digest.update(f"{name}={layer_digest(layer, adapter)};".encode())
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes.

    Args:
        tensors: Any tensors, on any device.

    Example:
        >>> tensors_digest({"x": torch.zeros(2)}) == tensors_digest({"x": -torch.zeros(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
