"""Frozen-conductance mode: layers and tiles that can be read, but have no way to be written.

Frozen is a type here, not a flag. An aihwkit layer with ``requires_grad=False`` still moves:
its optimiser applies queued pulses, decay, clipping and remapping whatever the flag says. The
types below queue nothing, own nothing an optimiser knows, and keep conductances in plain buffers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

import torch
from aihwkit.nn.modules.base import AnalogLayerBase
from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn

from aihwkit_lora.errors import FrozenConductanceError
from aihwkit_lora.tiles.blocked import Blocks, ReadProbe, blocked_mvm, transposed_mvm
from aihwkit_lora.tiles.periphery import TileIO
from aihwkit_lora.tiles.readonly import ReadOnlyTensor, read_only
from aihwkit_lora.tiles.record import Programming

_WAY_OUT = (
    "Call reprogram_(model, chip) to write the arrays with every pulse counted, or thaw_(model) "
    "to get ordinary aihwkit layers back."
)


class _BlockedProduct(torch.autograd.Function):
    """Analogue product forward, exact transposed product backward, nothing queued.

    No activation is saved, because a frozen array has no weight gradient.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, array: FrozenTileArray) -> Tensor:
        """Read every tile once per row of ``vectors``, shape ``(vectors, in_features)``."""
        ctx.array = array
        return blocked_mvm(
            vectors, array.conductance, array.scale, array.blocks, array.io, tuple(array.probes)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Drive the columns, sense the rows."""
        array, grad = ctx.array, grads[0]
        for probe in array.probes:
            probe.on_transposed_read(len(grad))
        return transposed_mvm(grad, array.conductance, array.scale, array.blocks), None


class FrozenTile(TileModule):
    """One physical array of a frozen layer, as aihwkit's ``analog_tiles()`` finds it.

    It owns no tensor: conductances live in the layer's :class:`FrozenTileArray`. Every method of
    an aihwkit tile that writes raises :class:`FrozenConductanceError`.
    """

    supports_ddp: bool = True

    def __init__(self, array: FrozenTileArray, in_tile: int, out_tile: int) -> None:
        super().__init__()
        # In a tuple, so that torch does not register the parent as a child of its child.
        self._array = (array,)
        self.position = (in_tile, out_tile)

    @property
    def whereabouts(self) -> str:
        """Layer and position, for error messages."""
        in_tile, out_tile = self.position
        layer = self._array[0].layer_name
        return f"layer '{layer}', tile (input {in_tile}, output {out_tile})"

    @property
    def rpu_config(self) -> Any:
        """The configuration of the tile that was frozen."""
        return self._array[0].rpu_config

    @property
    def device(self) -> torch.device:
        """Where the conductances live."""
        return self._array[0].conductance.device

    @property
    def in_size(self) -> int:
        """Rows of the array in use."""
        return self._array[0].blocks.in_sizes[self.position[0]]

    @property
    def out_size(self) -> int:
        """Columns of the array in use."""
        return self._array[0].blocks.out_sizes[self.position[1]]

    def get_weights(
        self, apply_weight_scaling: bool = True, realistic: bool = False
    ) -> tuple[Tensor, None]:
        """Return a copy of the tile's weights, shape ``(out_size, in_size)``.

        Args:
            apply_weight_scaling: Whether the digital output scales are applied.
            realistic: Accepted for aihwkit's sake; a frozen tile is read exactly.
        """
        weight, scale = self._array[0].tile(*self.position)
        return (weight * scale[:, None] if apply_weight_scaling else weight.clone()).cpu(), None

    def extra_repr(self) -> str:
        """Size of the tile."""
        return f"{self.out_size}, {self.in_size}, frozen"

    # The parent holds all tensors; a tile has nothing to move, save or load.
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenTile:
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """A tile has no state of its own."""
        return kwargs.get("destination", args[0] if args else {})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _refuse(method: str) -> Callable[..., NoReturn]:
    def refuse(self: FrozenTile | FrozenLinear, *args: Any, **kwargs: Any) -> NoReturn:
        raise FrozenConductanceError(
            f"{self.whereabouts}: expected frozen conductances to be read, got {method}(). "
            f"{_WAY_OUT}"
        )

    refuse.__name__ = method
    refuse.__doc__ = f"Raise: {method} would write a frozen array."
    return refuse


# Every way that aihwkit offers to write a tile (reference: aihwkit 1.2.0, simulator/tiles).
for _name in [
    "set_weights",
    "program_weights",
    "drift_weights",
    "remap_weights",
    "decay_weights",
    "diffuse_weights",
    "reset",
    "reset_columns",
    "set_hidden_parameters",
    "set_hidden_update_index",
    "load_extra",
    "update",
    "update_indexed",
    "set_forward_parameters",
    "set_backward_parameters",
    "set_weights_uniform_random",
    "ensure_shared_weights",
    "set_delta_weights",
    "replace_with",
    "set_scales",
    "set_mapping_scales",
    "set_learned_out_scales",
    "set_input_range",
    "post_update_step",
]:
    setattr(FrozenTile, _name, _refuse(_name))


class FrozenTileArray(nn.Module):
    """All tiles of one layer as one blocked, read-only conductance tensor.

    Args:
        conductance: Normalised conductances, shape ``(in_tiles, rows, out_tiles * columns)``.
        scale: Digital output scales, shape ``(in_tiles, out_tiles, columns)``.
        blocks: How the layer is cut into tiles.
        io: Converters and noise.
        rpu_config: Configuration of the tiles that were frozen.
        programming: How the arrays were programmed.
        layer_name: Full name of the layer, for error messages.
    """

    conductance: Tensor
    scale: Tensor
    digest: Tensor

    def __init__(
        self,
        conductance: Tensor,
        scale: Tensor,
        blocks: Blocks,
        io: TileIO,
        rpu_config: Any,
        programming: Programming,
        layer_name: str = "",
    ) -> None:
        super().__init__()
        self.blocks, self.io, self.rpu_config = blocks, io, rpu_config
        self.programming, self.layer_name = programming, layer_name
        self.probes: list[ReadProbe] = []
        self.register_buffer("conductance", conductance)
        self.register_buffer("scale", scale)
        self.register_buffer("digest", torch.zeros(blocks.tiles, 32, dtype=torch.uint8))
        # Not a ModuleList: PEFT would take its "0" for a layer called "0" of an nn.Sequential.
        for i, o in self.positions():
            self.add_module(f"tile_in{i}_out{o}", FrozenTile(self, i, o))
        self.digest.copy_(self.current_digests())

    def positions(self) -> Iterator[tuple[int, int]]:
        """Index of every tile along input and output."""
        return self.blocks.positions()

    def tile(self, in_tile: int, out_tile: int) -> tuple[Tensor, Tensor]:
        """One tile's weights ``(out_size, in_size)`` and output scales ``(out_size,)``."""
        rows, columns = self.blocks.in_sizes[in_tile], self.blocks.out_sizes[out_tile]
        start = out_tile * self.blocks.columns
        weight = self.conductance[in_tile, :rows, start : start + columns].T
        return weight, self.scale[in_tile, out_tile, :columns]

    def current_digests(self) -> Tensor:
        """SHA-256 of every tile's conductances and scales as they are now, one row a tile."""
        rows = []
        for position in self.positions():
            digest = hashlib.sha256()
            for part in self.tile(*position):
                values = part.detach().float().cpu().contiguous()
                digest.update(str(tuple(values.shape)).encode())
                digest.update(values.numpy().tobytes())
            rows.append(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
        return torch.stack(rows).to(self.digest.device)

    def logical_weight(self) -> Tensor:
        """The matrix that the layer multiplies with, shape ``(out_features, in_features)``."""
        return self._joined(lambda weight, scale: weight * scale[:, None])

    def largest_weight(self) -> Tensor:
        """Weight at the window's end of each cell, shape ``(out_features, in_features)``."""
        return self._joined(lambda weight, scale: scale[:, None].expand_as(weight))

    def _joined(self, part: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        outs = range(len(self.blocks.out_sizes))
        columns = [
            torch.cat([part(*self.tile(i, o)) for o in outs])
            for i in range(len(self.blocks.in_sizes))
        ]
        return torch.cat(columns, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; see :func:`~aihwkit_lora.tiles.blocked.blocked_mvm`."""
        vectors = x.reshape(-1, self.blocks.in_features).to(self.conductance.dtype)
        # Joined out here: a view made inside the function could not be changed in place later, as
        # ReLU(inplace=True) does.
        y = self.blocks.join_outputs(_BlockedProduct.apply(vectors, self))
        return y.view(*x.shape[:-1], self.blocks.out_features).to(x.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load a checkpoint, unless it would rewrite arrays that ``program_`` has programmed."""
        for name in ("conductance", "scale"):
            stored = state_dict.get(prefix + name)
            present = getattr(self, name)
            if stored is None or not self.programming.cells or stored.shape != present.shape:
                continue
            if not torch.equal(stored.to(present), present):
                raise FrozenConductanceError(
                    f"'{prefix}{name}': expected the conductances that are programmed here, got "
                    "others from the checkpoint. Load it into a model that was frozen with "
                    "freeze_(model, programmed_by='checkpoint'), or write the arrays with "
                    "reprogram_(model, chip, targets)."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Probes belong to a running observation, not to the hardware.
        return {**self.__dict__, "probes": []}


class FrozenLinear(nn.Linear, AnalogLayerBase):
    """An ``AnalogLinear`` whose conductances cannot change.

    It is an ``nn.Linear`` for torch and PEFT and an analogue layer for aihwkit. ``weight`` is a
    read-only view of the logical weights; ``bias`` is digital and an ordinary, frozen parameter.

    Args:
        array: The frozen tiles.
        bias: Digital bias, shape ``(out_features,)``.
    """

    IS_CONTAINER: ClassVar[bool] = False

    def __init__(self, array: FrozenTileArray, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.in_features = array.blocks.in_features
        self.out_features = array.blocks.out_features
        self.analog_module = array
        values = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", values)
        if bias is None:
            # PEFT asks the model's first parameter for its device, so there has to be one.
            anchor = nn.Parameter(array.scale.new_empty(0), requires_grad=False)
            self.register_parameter("device_anchor", anchor)

    @property
    def layer_name(self) -> str:
        """Full name in the model that was frozen."""
        return self.analog_module.layer_name

    @property
    def whereabouts(self) -> str:
        """The layer, for error messages."""
        return f"layer '{self.layer_name}'"

    @property
    def weight(self) -> ReadOnlyTensor:  # type: ignore[override]
        """Logical weights, shape ``(out_features, in_features)``; writing raises."""
        return read_only(self.analog_module.logical_weight(), self.layer_name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise FrozenConductanceError(
                f"layer '{self.layer_name}': expected the frozen weight to be read, got an "
                f"assignment. {_WAY_OUT}"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Read the arrays, add partial sums and bias digitally.

        Args:
            x: Shape ``(..., in_features)``.
        Returns:
            Shape ``(..., out_features)``.
        """
        y: Tensor = self.analog_module(x)
        return y if self.bias is None else y + self.bias

    def reset_parameters(self) -> None:
        """Raise: initialising would write a frozen array."""
        _refuse("reset_parameters")(self)

    def get_weights(self, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Copies of the logical weights and the bias, as aihwkit's layers give them."""
        bias = None if self.bias is None else self.bias.detach().cpu().clone()
        return self.analog_module.logical_weight().detach().cpu(), bias

    def extra_repr(self) -> str:
        """Sizes and number of tiles."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tiles={self.analog_module.blocks.tiles}, frozen"
        )


for _name in [
    "set_weights",
    "drift_analog_weights",
    "program_analog_weights",
    "remap_analog_weights",
    "replace_rpu_config",
]:
    setattr(FrozenLinear, _name, _refuse(_name))
