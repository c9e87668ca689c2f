"""A tensor that can be read, computed with and copied, but not written.

A frozen layer shows its weights through this type, so that code that expects ``layer.weight``
(PEFT, summaries, exports) works, and code that would write the array (merging an adapter,
PiSSA-style initialisation) is stopped before anything moves. Returning a copy instead would let
such code write into the copy and lose the adapter without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

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
# These take shape, type or device from a tensor, not its values.
_SHAPE_ONLY = {
    *(f"{start}_like" for start in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")),
    *(f"new_{end}" for end in ("empty", "empty_strided", "full", "ones", "tensor", "zeros")),
    *("expand_as", "reshape_as", "type_as", "view_as"),
}
_FIRST = ("self", "input", "tensor")
_counters: list[Counter[str]] = []


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

    def as_subclass(self, cls: Any) -> NoReturn:
        """Raise: the result would share memory with the weight, and could be written."""
        raise _refusal(self, "share its memory (as_subclass)")

    def set_(self, *_: Any, **__: Any) -> NoReturn:
        """Raise: torch does not announce this write to ``__torch_function__``."""
        raise _refusal(self, "write it (set)")

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
            result = tuple(result)
        protected = _protect_views(result, source)
        if _counters and getattr(func, "__name__", "") not in _SHAPE_ONLY:
            _count_reads(protected, (*args, *kwargs.values()))
        return iter(protected) if func is Tensor.__iter__ else protected


def read_only(values: Tensor, layer: str) -> ReadOnlyTensor:
    """Return a read-only view of ``values``.

    Args:
        values: Tensor to protect; copied only where it is not contiguous.
        layer: Full name of the layer, for error messages.
    """
    # An ordinary layer's weight is contiguous, so PEFT counts on reshape(-1) being a view of it.
    # Were it a copy, a merge into that (Supertuning's) would be lost without a word.
    dense = values.detach().contiguous()
    # Not dense.as_subclass: where that is a view already, the class's own method refuses.
    view: ReadOnlyTensor = Tensor.as_subclass(dense, ReadOnlyTensor)
    view._layer = layer
    return view


@contextmanager
def count_weight_reads() -> Iterator[Counter[str]]:
    """Count, by layer, the computations that use frozen weights as digital numbers.

    Such a computation does without the array: no converter, no noise, no drift within a read.
    Looking at shape, type or device is none, and neither is taking a view.

    Returns:
        Computations so far, by the layer's full name.

    Example:
        >>> weight = read_only(torch.ones(2, 2), layer="encoder.0")
        >>> with count_weight_reads() as reads:
        ...     _ = weight.T.shape, weight @ torch.ones(2), weight.norm()
        >>> dict(reads)
        {'encoder.0': 2}
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        # By identity: counters compare by content.
        _counters[:] = [other for other in _counters if other is not counter]


def _count_reads(result: Any, args: tuple[Any, ...]) -> None:
    if not any(_holds_values(part) for part in _flat(result)):
        return
    read = [part for argument in args for part in _flat(argument)]
    for counter in _counters:
        counter.update(part._layer for part in read if isinstance(part, ReadOnlyTensor))


def _holds_values(part: Any) -> bool:
    """Whether a result carries values of the weight out of it; a view of it does not."""
    outside = isinstance(part, Tensor | np.ndarray | float | list)
    return outside and not isinstance(part, ReadOnlyTensor)


def _refuse_writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    if func == _GRAD_FLAG_SETTER or name == "requires_grad_":
        # AdaLoRA clears the flag, which is true already; asking for a gradient is an error.
        wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        if wanted:
            raise _refusal(args[0], "train the weight")
        return
    if func is Tensor.__dlpack__:
        raise _refusal(args[0], "share its memory (dlpack)")
    # torch's own initialisers pass their tensor by name; _foreach_ operations pass lists.
    first = args[0] if args else next((kwargs[n] for n in _FIRST if n in kwargs), None)
    written = _flat(kwargs.get("out"))
    name = name.partition(".")[0]  # torch.ops.aten.add_.Tensor is called 'add_.Tensor'
    in_place = name.endswith("_") and not name.startswith("__") and name not in _HARMLESS
    in_place = in_place or bool(kwargs.get("inplace"))
    if func == _DATA_SETTER or func in _IN_PLACE_WITHOUT_UNDERSCORE or in_place:
        written += _flat(first)
    for candidate in written:
        if isinstance(candidate, ReadOnlyTensor):
            action = "data" if func == _DATA_SETTER else name.strip("_")
            raise _refusal(candidate, f"write it ({action})")


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
    if isinstance(result, np.ndarray):
        result.setflags(write=False)
        return result
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
