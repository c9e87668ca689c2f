"""What convert needs to know of Hugging Face's transformers and PEFT.

Neither library is imported here: a model can only hold their classes if somebody has imported
them already.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import Tensor, nn


def linear_of(layer: nn.Module) -> nn.Linear | None:
    """Give GPT-2's ``Conv1D`` the form of a linear layer; other layers give None.

    Its forward is ``x @ weight + bias``, with weight ``(in_features, out_features)``.

    Args:
        layer: Any module; it is not changed.
    Returns:
        A layer with the transposed weight, sharing memory with ``layer``.

    Example:
        >>> linear_of(nn.Conv1d(3, 2, 1)) is None
        True
    """
    conv1d = _class("transformers.pytorch_utils", "Conv1D")
    if conv1d is None or type(layer) is not conv1d:
        return None
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    in_features, out_features = weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=False)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.train(layer.training)


def head_modules(model: nn.Module) -> set[nn.Module]:
    """Find what lies outside the backbones of all transformers models in ``model``.

    The backbone is what transformers calls ``base_model``. Some models have several side by side
    and none over all, such as the encoder and decoder of T5; then all of these are backbones.
    Where a model has none, it is one itself, as ``BertModel`` is.

    Args:
        model: Any module, with or without transformers models in it.
    Returns:
        Modules of heads; empty for plain torch models.

    Example:
        >>> head_modules(nn.Sequential(nn.Linear(3, 2)))
        set()
    """
    pretrained = _class("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is None:
        return set()
    heads: set[nn.Module] = set()
    for whole in _outermost(model, pretrained):
        inside = {part for body in _backbones(whole, pretrained) for part in body.modules()}
        heads |= {part for part in whole.modules() if part not in inside}
    return heads


def first_adapter(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Find the first layer that PEFT has put an adapter on, else a model wrapped by PEFT.

    Args:
        model: Any module.
    Returns:
        Full name and module, or None.

    Example:
        >>> first_adapter(nn.Sequential(nn.Linear(3, 2))) is None
        True
    """
    # Prompt tuning wraps the model, yet puts nothing on its layers.
    for module_name, name in [
        ("peft.tuners.tuners_utils", "BaseTunerLayer"),
        ("peft.peft_model", "PeftModel"),
    ]:
        kind = _class(module_name, name)
        if kind is None:
            continue
        for full_name, module in model.named_modules():
            if isinstance(module, kind):
                return full_name, module
    return None


def untie(model: nn.Module, converted: set[nn.Module]) -> None:
    """Tell transformers of output embeddings that share their weight with the input no longer.

    Otherwise it would tie them again, and PEFT would warn of adapters on a tied layer.

    Args:
        model: The converted copy; its configurations change.
        converted: Its analogue layers.
    """
    pretrained = _class("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is None:
        return
    for part in model.modules():
        if not isinstance(part, pretrained):
            continue
        whole = cast(Any, part)
        tied = getattr(whole.config, "tie_word_embeddings", False)
        if tied and whole.get_output_embeddings() in converted:
            whole.config.tie_word_embeddings = False


def _class(module: str, name: str) -> type[nn.Module] | None:
    return getattr(sys.modules.get(module), name, None)


def _outermost(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    if isinstance(model, kind):
        return [model]
    return [found for child in model.children() for found in _outermost(child, kind)]


def _backbones(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    base = cast(nn.Module, model.base_model)
    if base is not model:
        return [base]
    inner = [found for child in model.children() for found in _outermost(child, kind)]
    return [body for part in inner for body in _backbones(part, kind)] or [model]
