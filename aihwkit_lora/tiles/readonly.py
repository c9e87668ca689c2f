"""A tensor that can be read, computed with and copied, but not written.

A frozen layer shows its weights through this type, so that code that expects ``layer.weight``
(PEFT, summaries, exports) works, and code that would write the array (merging an adapter,
PiSSA-style initialisation) is stopped before anything moves. Returning a copy instead would let
such code write into the copy and lose the adapter without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aihwkit_lora.errors import FrozenConductanceError

# Getters and setters of attributes reach __torch_function__ as these wrappers.
_DATA_SETTER = Tensor.data.__set__  # type: ignore[attr-defined]
_GRAD_FLAG_SETTER = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_IN_PLACE_WITHOUT_UNDERSCORE = {
    Tensor.__setitem__,
    Tensor.__iadd__,
    Tensor.__isub__,
    Tensor.__imul__,
    Tensor.__itruediv__,
    Tensor.__ifloordiv__,
    Tensor.__imod__,
    Tensor.__iand__,
    Tensor.__ior__,
    Tensor.__ixor__,
    Tensor.__ilshift__,
    Tensor.__irshift__,
    Tensor.__ipow__,
    Tensor.set_,
    Tensor.resize_,
}
# These end in an underscore, yet only change flags or return something new.
_HARMLESS = {"requires_grad_", "share_memory_", "__torch_function__"}


class ReadOnlyTensor(Tensor):
    """A view of frozen conductances; every in-place operation raises.

    Results of computations are ordinary tensors; views (``.T``, slices, ``.data``, ``.detach()``)
    stay read-only. ``.numpy()`` gives an array with its write flag off.

    Example:
        >>> weight = read_only(torch.ones(2, 2), layer="encoder.0")
        >>> float((weight * 2).sum())
        8.0
        >>> weight.data += 1
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.FrozenConductanceError: layer 'encoder.0': ...
    """

    _layer: str = ""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Refuse writes, compute everything else on ordinary tensors."""
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        source = next((a for a in args if isinstance(a, cls)), None)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func is Tensor.__iter__:
            return iter(_protect_views(tuple(result), source))
        if isinstance(result, np.ndarray):
            result.setflags(write=False)
            return result
        return _protect_views(result, source)


def read_only(values: Tensor, layer: str) -> ReadOnlyTensor:
    """Return a read-only view of ``values``.

    Args:
        values: Tensor to protect; it is not copied.
        layer: Full name of the layer, for error messages.
    """
    view: ReadOnlyTensor = values.detach().as_subclass(ReadOnlyTensor)
    view._layer = layer
    return view


def _refuse_writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    if func == _GRAD_FLAG_SETTER or name == "requires_grad_":
        # AdaLoRA clears the flag, which is true already; asking for a gradient is an error.
        wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        if wanted:
            raise _refusal(args[0], "train the weight")
        return
    # torch's own initialisers pass their tensor by name; _foreach_ operations pass lists.
    first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    written = _flat(kwargs.get("out"))
    in_place = name.endswith("_") and not name.startswith("__") and name not in _HARMLESS
    in_place = in_place or bool(kwargs.get("inplace"))
    if func == _DATA_SETTER or func in _IN_PLACE_WITHOUT_UNDERSCORE or in_place:
        written += _flat(first)
    for candidate in written:
        if isinstance(candidate, ReadOnlyTensor):
            raise _refusal(candidate, f"write it ({name.strip('_') or 'data'})")


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _refusal(weight: Tensor, action: str) -> FrozenConductanceError:
    layer = getattr(weight, "_layer", "")
    return FrozenConductanceError(
        f"layer '{layer}': expected the frozen weight to be read, got an attempt to {action}. "
        "Keep the adapter beside the array (no merge, no initialisation that rewrites the base), "
        "or call reprogram_(model, chip) to write the arrays with every pulse counted, or "
        "thaw_(model) to get ordinary aihwkit layers back."
    )


def _protect_views(result: Any, source: ReadOnlyTensor | None) -> Any:
    if type(result) in (tuple, list):
        return type(result)(_protect_views(part, source) for part in result)
    if source is None or not isinstance(result, Tensor):
        return result
    if type(result) is ReadOnlyTensor:
        result._layer = source._layer
        return result
    with torch._C.DisableTorchFunctionSubclass():
        shares = result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        if not shares or result.numel() == 0:
            return result
        return read_only(result, source._layer)
