"""From a torch model to an analogue one, laid out for a chip."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Literal

from aihwkit.nn import AnalogSequential
from aihwkit.nn.conversion import convert_to_analog
from torch import nn

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.errors import ConfigurationError, StageError, UnsupportedTileError
from aihwkit_lora.registry import nearest
from aihwkit_lora.tiles.grid import analog_layers
from aihwkit_lora.tiles.transformer_layers import (
    first_adapter,
    head_modules,
    linear_of,
    untie,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SUGGESTIONS = 8


def convert(
    net: nn.Module,
    chip: Chip,
    *,
    exclude_modules: Sequence[str] | None = None,
    heads: Literal["digital", "analogue"] = "digital",
) -> nn.Module:
    """Copy a model with its linear and convolutional layers on the tiles of a chip.

    Each layer goes through aihwkit's ``convert_to_analog`` under ``chip.rpu_config()``; call that
    yourself for other configurations. The model keeps its class, so that it pickles once frozen;
    an ``nn.Sequential`` becomes aihwkit's. GPT-2's ``Conv1D`` is converted as the linear layer
    that it is. A layer that the model uses in several places gets one set of tiles.

    The head of a transformers model is what lies outside its backbone (``model.base_model``); it
    stays digital unless asked for, and a language model's ``lm_head`` stays tied to the embedding.
    With ``heads="analogue"`` that tie is cut, since an array cannot follow a digital embedding:
    the copy's configuration then says ``tie_word_embeddings=False``.

    Args:
        net: A torch model without adapters; it is not changed.
        chip: Array size and converters.
        exclude_modules: Full names of modules that stay digital, with all below them.
        heads: Whether task heads of transformers models are ``"digital"`` or ``"analogue"``.
            Models of plain torch have no heads.
    Returns:
        The converted copy.
    Raises:
        StageError: The model holds no layer to convert, holds analogue layers already, or carries
            adapters of PEFT.
        ConfigurationError: A name in ``exclude_modules`` is not a module's, or ``heads`` is
            neither value.
        UnsupportedTileError: A convolution is grouped, pads with anything but zeros, or has its
            padding in words.

    Example:
        >>> import aihwkit_lora as al
        >>> model = al.convert(nn.Sequential(nn.Linear(300, 2)), al.chips.get("rm-180nm"))
        >>> len(list(model.analog_tiles()))
        3
    """
    _require_plain_torch(net)
    names = _to_convert(net, exclude_modules or (), heads)
    model = copy.deepcopy(net)
    analogue = {layer: _analogue(layer, chip) for layer in map(model.get_submodule, names)}
    if model in analogue:
        return analogue[model]
    _replace_everywhere(model, analogue)
    untie(model, set(analogue.values()))
    return model


def _require_plain_torch(net: nn.Module) -> None:
    adapted = first_adapter(net)
    if adapted is not None:
        name, module = adapted
        raise StageError(
            f"{_where(name)}: expected a model without adapters, got {type(module).__name__} of "
            "PEFT. Convert, program and freeze the base model first; then call "
            "get_peft_model(model, config), or PeftModel.from_pretrained(model, folder) for an "
            "adapter that was saved with peft_model.save_pretrained(folder)."
        )
    present = next(analog_layers(net), None)
    if present is not None:
        raise StageError(
            f"{_where(present[0])}: expected a digital layer, got {type(present[1]).__name__}. "
            "Convert a model once, from its torch layers."
        )


def _where(name: str) -> str:
    return f"layer '{name}'" if name else "the whole model"


def _to_convert(net: nn.Module, exclude: Sequence[str], heads: str) -> list[str]:
    """Names of the layers that become analogue, each layer once."""
    if heads not in ("digital", "analogue"):
        raise ConfigurationError(
            f"heads: expected 'digital' or 'analogue', got {heads!r}. Task heads of transformers "
            "models stay digital by default."
        )
    digital = _excluded(net, exclude)
    digital |= head_modules(net) if heads == "digital" else set()
    names = [
        name
        for name, module in net.named_modules()
        if module not in digital and _has_analogue(module)
    ]
    if not names:
        raise StageError(
            f"{type(net).__name__}: expected layers that can be analogue, such as nn.Linear, got "
            "none. Check exclude_modules, and heads, which are digital by default."
        )
    _refuse_unsupported({name: net.get_submodule(name) for name in names})
    return names


def _excluded(net: nn.Module, exclude: Sequence[str]) -> set[nn.Module]:
    known = {name: module for name, module in net.named_modules(remove_duplicate=False) if name}
    for name in exclude:
        if name not in known:
            raise ConfigurationError(
                f"exclude_modules: expected full names of modules, got '{name}'. "
                f"{nearest(name, _candidates(name, list(known)))} See named_modules() for all."
            )
    return {part for name in exclude for part in known[name].modules()}


def _candidates(name: str, known: list[str]) -> list[str]:
    # A large model has thousands of names. The usual slip is the last part of a name in its place.
    ending = [full for full in known if full.endswith(f".{name}")]
    close = difflib.get_close_matches(name, known, n=_SUGGESTIONS)
    top = [full for full in known if "." not in full]
    return (close + ending or top)[:_SUGGESTIONS]


def _has_analogue(module: nn.Module) -> bool:
    # By exact type, as aihwkit does: a derived class may compute something else.
    return type(module) in (nn.Linear, *_CONVOLUTIONS) or linear_of(module) is not None


def _refuse_unsupported(layers: dict[str, nn.Module]) -> None:
    odd = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, _CONVOLUTIONS)
        and (layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str))
    }
    if odd:
        name, layer = next(iter(odd.items()))
        raise UnsupportedTileError(
            f"layer '{name}': expected a convolution with groups=1, padding_mode='zeros' and "
            f"padding in numbers, got groups={layer.groups}, padding_mode='{layer.padding_mode}' "
            f"and padding={layer.padding!r}. Change it, or keep such layers digital: "
            f"exclude_modules={list(odd)}."
        )


def _analogue(layer: nn.Module, chip: Chip) -> nn.Module:
    analogue: nn.Module = convert_to_analog(
        linear_of(layer) or layer, chip.rpu_config(), ensure_analog_root=False, inplace=True
    )
    return analogue.train(layer.training)


def _replace_everywhere(model: nn.Module, analogue: dict[nn.Module, nn.Module]) -> None:
    # Layer by layer, since aihwkit 1.2.0 converts a layer that is used twice into two, and drops
    # an activation that an nn.Sequential uses twice.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in analogue:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, analogue[module])
    for module in model.modules():
        # A change of class keeps repeated children, hooks and mode, which a new object would lose.
        if type(module) is nn.Sequential and next(analog_layers(module), None) is not None:
            module.__class__ = AnalogSequential
