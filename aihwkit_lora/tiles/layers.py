"""Frozen layers: for torch and PEFT an ordinary layer, for aihwkit an analogue one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from aihwkit.nn import (
    AnalogConv1d,
    AnalogConv1dMapped,
    AnalogConv2d,
    AnalogConv2dMapped,
    AnalogConv3d,
    AnalogConv3dMapped,
    AnalogLinear,
    AnalogLinearMapped,
)
from aihwkit.nn.modules.base import AnalogLayerBase
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, FrozenConductanceError, UnsupportedTileError
from aihwkit_lora.tiles.array import WAY_OUT, FrozenTileArray, refuse
from aihwkit_lora.tiles.readonly import ReadOnlyTensor, read_only


class FrozenLayer(AnalogLayerBase, nn.Module):
    """An analogue layer whose conductances cannot change.

    ``weight`` is a read-only view of the logical weights. ``bias`` is digital and an ordinary
    parameter that wants no gradient, or, where the array holds it, read-only as well.

    Args:
        source: The layer of aihwkit that it replaces.
        array: The frozen tiles.
        bias: Digital bias, shape ``(out_features,)``.
    """

    IS_CONTAINER: ClassVar[bool] = False
    SETTINGS: ClassVar[tuple[str, ...]] = ()
    """Attributes that are taken over from the layer that is replaced."""

    analog_module: FrozenTileArray
    # aihwkit's own takes no assign=, and cares for configurations that a frozen layer keeps.
    load_state_dict = nn.Module.load_state_dict

    def __init__(self, source: nn.Module, array: FrozenTileArray, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.source_class = type(source)
        for name in self.SETTINGS:
            setattr(self, name, getattr(source, name))
        self.analog_module = array
        # Set by hand: torch refuses to register a parameter where the class has a property.
        self._parameters["bias"] = None if bias is None else _fixed_parameter(bias)
        if bias is None:
            # PEFT asks the model's first parameter for its device, so there has to be one.
            self.register_parameter(
                "device_anchor", _fixed_parameter(torch.empty(0, device=array.device))
            )

    @property
    def layer_name(self) -> str:
        """Full name in the model that was frozen."""
        return self.analog_module.layer_name

    @property
    def whereabouts(self) -> str:
        """The layer, for error messages."""
        return f"layer '{self.layer_name}'"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the logical weight."""
        blocks = self.analog_module.blocks
        return (blocks.out_features, blocks.in_features)

    @property
    def weight(self) -> ReadOnlyTensor:
        """Logical weights, in the shape that torch's layer has; writing raises."""
        weight = self.analog_module.logical_weight().view(self.weight_shape)
        return read_only(weight, self.layer_name)

    @property
    def bias(self) -> Tensor | None:
        """Bias, shape ``(out_features,)``: digital, or read-only on the array."""
        held = self.analog_module.logical_bias()
        return self._parameters["bias"] if held is None else read_only(held, self.layer_name)

    def __setattr__(self, name: str, value: Any) -> None:
        on_array = name == "bias" and self._on_array()
        if name == "weight" or on_array:
            # PEFT 0.21 gives a layer its own weight once more when it unloads an adapter.
            if isinstance(value, ReadOnlyTensor) and torch.equal(value, getattr(self, name)):
                return
            raise FrozenConductanceError(
                f"layer '{self.layer_name}': expected the frozen {name} to be read, got an "
                f"assignment. {WAY_OUT}"
            )
        super().__setattr__(name, value)

    def _on_array(self) -> bool:
        array = self._modules.get("analog_module")
        return isinstance(array, FrozenTileArray) and array.blocks.bias_row

    def reset_parameters(self) -> None:
        """Raise: initialising would write a frozen array."""
        refuse("reset_parameters")(self)

    def get_weights(self, **_: Any) -> tuple[Tensor, Tensor | None]:
        """Copies of the logical weights ``(out_features, in_features)`` and the bias."""
        weight, held = self.analog_module.get_weights()
        digital = self._parameters["bias"]
        return weight, held if digital is None else digital.detach().cpu().clone()

    def extra_repr(self) -> str:
        """What torch's layer says, tiles and engine."""
        # Past AnalogLayerBase, which would name the configuration of a tile.
        plain = super(AnalogLayerBase, self).extra_repr()
        array = self.analog_module
        return f"{plain}, tiles={array.blocks.tiles}, frozen, {array.engine.name}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "device_anchor", None)  # it holds nothing

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        anchored = "device_anchor" in self._parameters
        anchor = {prefix + "device_anchor": torch.empty(0)} if anchored else {}
        super()._load_from_state_dict({**state_dict, **anchor}, prefix, *rest, **named)


for _name in [
    "set_weights",
    "drift_analog_weights",
    "program_analog_weights",
    "remap_analog_weights",
    "replace_rpu_config",
]:
    setattr(FrozenLayer, _name, refuse(_name))


def _fixed_parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)


# Torch declares weight and bias as attributes; here they are properties that nobody can set.
class FrozenLinear(FrozenLayer, nn.Linear):  # type: ignore[misc]
    """A frozen ``AnalogLinear``; for torch and PEFT an ``nn.Linear``."""

    SETTINGS = ("in_features", "out_features")

    def forward(self, x: Tensor) -> Tensor:
        """Read the arrays, add partial sums and bias digitally.

        Args:
            x: Shape ``(..., in_features)``.
        Returns:
            Shape ``(..., out_features)``.
        """
        y: Tensor = self.analog_module(x, self._parameters["bias"])
        return y


class _FrozenConv(FrozenLayer, nn.modules.conv._ConvNd):  # type: ignore[misc,override]
    """A frozen convolution: every patch of the input is one vector for the tiles."""

    SETTINGS = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("transposed", "output_padding", "groups", "padding_mode"),
        "_reversed_padding_repeated_twice",
    )
    TORCH: ClassVar[type[nn.Module]]
    """What an adapter of such a layer is made of."""

    def __new__(cls, source: object = None, *args: Any, **options: Any) -> Any:
        if isinstance(source, int):
            # PEFT 0.21 makes the matrices of an adapter by type(base_layer)(channels, rank, …).
            # They belong into the digital unit.
            return cls.TORCH(source, *args, **options)
        return super().__new__(cls)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the logical weight, ``(out_channels, in_channels, *kernel_size)``."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Read the arrays once for every position of the kernel.

        Args:
            x: Shape ``(batch, in_channels, *sizes)`` or ``(in_channels, *sizes)``.
        Returns:
            Shape ``(batch, out_channels, *sizes)`` or ``(out_channels, *sizes)``.
        """
        dimensions = len(self.kernel_size)
        batched = x if x.dim() == dimensions + 2 else x[None]
        patches, sizes = self._patches(batched)
        y: Tensor = self.analog_module(patches, self._parameters["bias"])
        y = y.transpose(1, 2).reshape(len(batched), self.out_channels, *sizes)
        return y if batched is x else y[0]

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Vectors ``(batch, positions, in_channels * kernel)`` and sizes of the output."""
        x = F.pad(x, self._reversed_padding_repeated_twice)
        for dimension, (size, step, apart) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True), start=2
        ):
            # A window over the dilated kernel, of which every ``apart``-th value counts.
            x = x.unfold(dimension, apart * (size - 1) + 1, step)[..., ::apart]
        dimensions = len(self.kernel_size)
        sizes = tuple(x.shape[2 : 2 + dimensions])
        # (batch, channels, *sizes, *kernel) -> (batch, *sizes, channels, *kernel)
        x = x.movedim(1, 1 + dimensions)
        return x.flatten(1 + dimensions).flatten(1, dimensions), sizes


class FrozenConv1d(_FrozenConv, nn.Conv1d):  # type: ignore[misc,override]
    """A frozen ``AnalogConv1d``; for torch and PEFT an ``nn.Conv1d``."""

    TORCH = nn.Conv1d


class FrozenConv2d(_FrozenConv, nn.Conv2d):  # type: ignore[misc,override]
    """A frozen ``AnalogConv2d``; for torch and PEFT an ``nn.Conv2d``."""

    TORCH = nn.Conv2d


class FrozenConv3d(_FrozenConv, nn.Conv3d):  # type: ignore[misc,override]
    """A frozen ``AnalogConv3d``; for torch and PEFT an ``nn.Conv3d``."""

    TORCH = nn.Conv3d


LAYERS: dict[type[nn.Module], type[FrozenLayer]] = {}
"""What each layer of aihwkit is replaced by, by its exact class: a subclass may do anything."""


def freezes(*classes: type[nn.Module]) -> Callable[[type[FrozenLayer]], type[FrozenLayer]]:
    """Return a decorator for the frozen form of some layers of aihwkit.

    Args:
        classes: Classes of layers, perhaps your own, with their tiles in ``analog_module`` or
            ``array``.
    Raises:
        ConfigurationError: A class has a frozen form already.

    Example:
        >>> class Own(AnalogLinear): ...
        >>> @freezes(Own)
        ... class FrozenOwn(FrozenLinear): ...
        >>> LAYERS.pop(Own).__name__
        'FrozenOwn'
    """
    if taken := [each.__name__ for each in classes if each in LAYERS]:
        raise ConfigurationError(
            f"freezes: expected classes without a frozen form, got {', '.join(taken)}. Derive a "
            "class of your own."
        )

    def store(frozen: type[FrozenLayer]) -> type[FrozenLayer]:
        LAYERS.update(dict.fromkeys(classes, frozen))
        return frozen

    return store


def frozen_class(layer: nn.Module, name: str) -> type[FrozenLayer]:
    """Find the frozen form of a layer.

    Args:
        layer: A layer of aihwkit.
        name: Its full name, for the error message.
    Raises:
        UnsupportedTileError: There is none, and the message names the decorator that would add
            one; or the layer's padding is given in words.
    """
    if type(layer) not in LAYERS:
        known = ", ".join(sorted(each.__name__ for each in LAYERS))
        tiles = sorted({type(tile).__name__ for tile in layer.analog_tiles()})  # type: ignore[operator]
        raise UnsupportedTileError(
            f"layer '{name}': expected one of {known}, got {type(layer).__name__} with "
            f"{', '.join(tiles) or 'no tiles'}. Convert without it (exclude_modules), or give it a "
            "frozen form with the decorator aihwkit_lora.tiles.layers.freezes("
            f"{type(layer).__name__})."
        )
    if any(isinstance(pad, str) for pad in getattr(layer, "padding", ())):
        raise UnsupportedTileError(
            f"layer '{name}': expected padding in numbers, got a word, with which no analogue "
            "convolution of aihwkit 1.2.0 runs. Give the torch layer numbers before "
            "converting."
        )
    return LAYERS[type(layer)]


freezes(AnalogLinear, AnalogLinearMapped)(FrozenLinear)
freezes(AnalogConv1d, AnalogConv1dMapped)(FrozenConv1d)
freezes(AnalogConv2d, AnalogConv2dMapped)(FrozenConv2d)
freezes(AnalogConv3d, AnalogConv3dMapped)(FrozenConv3d)


def ordinary_layer(frozen: FrozenLayer) -> nn.Module:
    """Make an unfrozen layer of the class that was frozen; its weights are random.

    Args:
        frozen: A frozen layer.
    """
    array = frozen.analog_module
    bias, config = frozen.bias is not None, array.rpu_config
    if isinstance(frozen, FrozenLinear):
        return frozen.source_class(
            frozen.in_features, frozen.out_features, bias=bias, rpu_config=config
        )
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    settings = {name: getattr(frozen, name) for name in names}
    return frozen.source_class(**settings, bias=bias, rpu_config=config)
