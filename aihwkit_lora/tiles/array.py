"""The frozen tiles of one layer: conductances that can be read, and no way to write them.

Frozen is a type here, not a flag. An aihwkit layer with ``requires_grad=False`` still moves:
its optimiser applies queued pulses, decay, clipping and remapping whatever the flag says. The
types below queue nothing, own neither parameter nor buffer, and hand out copies and read-only
views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import torch
from aihwkit.simulator.parameters.base import RPUConfigBase
from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn

from aihwkit_lora.errors import FrozenConductanceError
from aihwkit_lora.tiles.blocked import ReadProbe, exact_mvm
from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.engines import Engine
from aihwkit_lora.tiles.readonly import ReadOnlyTensor, read_only
from aihwkit_lora.tiles.record import Programming

WAY_OUT = (
    "Call reprogram_(model, chip) to write the arrays with every pulse counted, drift_(model, "
    "seconds) to see them at a later time, or thaw_(model) to get ordinary aihwkit layers back."
)


class _Read(torch.autograd.Function):
    """Analogue product forward, transposed product backward, nothing queued, nothing saved.

    No activation is kept, because a frozen array has no weight gradient.
    """

    @staticmethod
    def forward(vectors: Tensor, array: FrozenTileArray) -> Tensor:
        """Read every tile once per row of ``vectors``, shape ``(vectors, in_features)``."""
        probes = tuple(array.probes)
        return array.engine.read(vectors, array.tensors, array.blocks, probes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, FrozenTileArray], output: Tensor) -> None:
        """Remember which array it was, for the way back."""
        ctx.array = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Drive the columns, sense the rows."""
        return _ReadBack.apply(grads[0], ctx.array), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], vectors: Tensor, array: FrozenTileArray
    ) -> tuple[Tensor, int]:
        """Read the vectors of all samples; the array treats each vector for itself."""
        return _over_samples(_Read, in_dims[0], vectors, array)


_beside_compilers: list[Callable[..., Tensor]] = []


def _read(vectors: Tensor, array: FrozenTileArray) -> Tensor:
    """Read once; torch.compile leaves reads alone: how often one repeats depends on the data."""
    if not torch.compiler.is_compiling():
        y: Tensor = _Read.apply(vectors, array)
        return y
    if not _beside_compilers:  # late, since it imports the compiler
        _beside_compilers.append(torch.compiler.disable(_Read.apply))
    return _beside_compilers[0](vectors, array)


class _ReadBack(torch.autograd.Function):
    """The transposed product; its own gradient is the linear map forwards."""

    @staticmethod
    def forward(grad: Tensor, array: FrozenTileArray) -> Tensor:
        """Read every tile backwards once per row of ``grad``, shape ``(vectors, out_features)``."""
        for probe in array.probes:
            probe.on_transposed_read(grad)
        return array.engine.read_back(grad.float(), array.tensors, array.blocks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, FrozenTileArray], output: Tensor) -> None:
        """Remember which array it was, for the way back."""
        ctx.array = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Multiply without converters: only the slope of the map counts here."""
        return exact_mvm(grads[0], ctx.array.tensors, ctx.array.blocks), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], grad: Tensor, array: FrozenTileArray
    ) -> tuple[Tensor, int]:
        """Send back the gradients of all samples."""
        return _over_samples(_ReadBack, in_dims[0], grad, array)


def _over_samples(
    function: type[torch.autograd.Function],
    dim: int | None,
    vectors: Tensor,
    array: FrozenTileArray,
) -> tuple[Tensor, int]:
    assert dim is not None  # vmap calls this only if a tensor is batched, and there is just one
    samples = vectors.movedim(dim, 0)
    out: Tensor = function.apply(samples.flatten(0, 1), array)
    return out.unflatten(0, samples.shape[:2]), 0


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
        return self._array[0].device

    @property
    def is_cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    @property
    def analog_bias(self) -> bool:
        """Whether the last row of the array holds the bias."""
        return self._array[0].blocks.bias_row

    @property
    def in_size(self) -> int:
        """Rows of the array in use, without one that holds the bias."""
        return self._array[0].blocks.in_sizes[self.position[0]] - self.analog_bias

    @property
    def out_size(self) -> int:
        """Columns of the array in use."""
        return self._array[0].blocks.out_sizes[self.position[1]]

    def get_weights(
        self, apply_weight_scaling: bool = True, realistic: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return copies of the tile's weights ``(out_size, in_size)`` and, if on it, its bias.

        Args:
            apply_weight_scaling: Whether the digital output scales are applied.
            realistic: Accepted for aihwkit's sake; a frozen tile is read exactly.
        """
        weight, scale = self._array[0].tile(*self.position)
        values = (weight * scale[:, None] if apply_weight_scaling else weight).cpu()
        bias = values[:, self.in_size].clone() if self.analog_bias else None
        return values[:, : self.in_size], bias

    def extra_repr(self) -> str:
        """Size of the tile."""
        return f"{self.out_size}, {self.in_size}, frozen"

    def forward(self, x: Tensor, *_: Any, **__: Any) -> NoReturn:
        """Raise: tiles are read together, by their layer."""
        raise FrozenConductanceError(
            f"{self.whereabouts}: expected the layer to be read, got a call of one tile. Call the "
            "layer, or take a copy of the tile's weights with get_weights()."
        )

    # The parent holds all tensors; a tile has nothing to move, save or load.
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Do nothing, unless asked for another configuration: tiles move with their layer.

        Raises:
            FrozenConductanceError: A configuration is given, which in aihwkit rebuilds the tile.
        """
        if any(isinstance(value, RPUConfigBase) for value in (*args, *kwargs.values())):
            refuse("to")(self)
        return self

    def cpu(self) -> Self:
        """Do nothing: tiles move with their layer."""
        return self

    def cuda(self, device: Any = None) -> Self:
        """Do nothing: tiles move with their layer."""
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """A tile has no state of its own."""
        return kwargs.get("destination", args[0] if args else {})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        # Raw handles of an aihwkit tile: there is nothing behind them here.
        if name in _RAW_HANDLES:
            raise NoRawHandleError(
                f"{self.whereabouts}: expected frozen conductances to be read, got a request for "
                f"'{name}', through which they could be written. {WAY_OUT}"
            )
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RAW_HANDLES:
            refuse(name)(self)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class NoRawHandleError(FrozenConductanceError, AttributeError):
    """A frozen tile was asked for a handle of aihwkit that can write; it has none.

    Being an ``AttributeError`` too, it makes ``hasattr`` and ``getattr`` with a default work.
    """


_RAW_HANDLES = frozenset(
    {"tile", "analog_ctx", "shared_weights", "_shared_weight_tensor", "mapping_scales"}
    | {"out_scaling_alpha", "input_range", "alpha", "programmed_weights", "bias"}
)


def refuse(method: str) -> Callable[..., NoReturn]:
    """Make a method that refuses to write.

    Args:
        method: Its name, as the message gives it.
    """

    def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise FrozenConductanceError(
            f"{self.whereabouts}: expected frozen conductances to be read, got {method}(). "
            f"{WAY_OUT}"
        )

    refused.__name__ = method
    refused.__doc__ = f"Raise: {method} would write a frozen array."
    return refused


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
    "init_input_processing",
    "post_update_step",
    "read_weights",
]:
    setattr(FrozenTile, _name, refuse(_name))


class FrozenTileArray(nn.Module):
    """All tiles of one layer as blocked, read-only tensors.

    The tensors are neither parameters nor buffers, so that nothing that walks over those
    (optimisers, weight averaging, broadcasts, casts) reaches them. ``state_dict`` holds copies.
    They stay in 32-bit floats whatever the model is cast to: a cast is no way to write an array.

    Args:
        tensors: What the tiles hold.
        blocks: How the layer is cut into tiles.
        engine: Computes reads.
        rpu_config: Configuration of the tiles that were frozen.
        programming: How the arrays were programmed.
        layer_name: Full name of the layer, for error messages.
    """

    def __init__(
        self,
        tensors: TileTensors,
        blocks: Blocks,
        engine: Engine,
        rpu_config: Any,
        programming: Programming,
        layer_name: str = "",
    ) -> None:
        super().__init__()
        self.blocks, self.engine, self.rpu_config = blocks, engine, rpu_config
        self.programming, self.layer_name = programming, layer_name
        self.probes: list[ReadProbe] = []
        self._programmed = tensors
        self._at: tuple[float, TileTensors] | None = None
        self.fate: Any = None  # what drift_ drew for the cells, kept for its next call
        # Not a ModuleList: PEFT would take its "0" for a layer called "0" of an nn.Sequential.
        for i, o in self.positions():
            self.add_module(f"tile_in{i}_out{o}", FrozenTile(self, i, o))
        self.digest = self.current_digests()

    @property
    def whereabouts(self) -> str:
        """The layer, for error messages."""
        return f"layer '{self.layer_name}'"

    def get_weights(self, **_: Any) -> tuple[Tensor, Tensor | None]:
        """Copies of the logical weights and, if it is on the array, the bias."""
        bias = self.logical_bias()
        return self.logical_weight().cpu().clone(), None if bias is None else bias.cpu().clone()

    @property
    def tensors(self) -> TileTensors:
        """What a read sees now: as programmed, or as drifted until the time of ``drift_``."""
        return self._programmed if self._at is None else self._at[1]

    @property
    def programmed(self) -> TileTensors:
        """What was programmed, whatever the time."""
        return self._programmed

    @property
    def seconds(self) -> float:
        """Time since programming at which the array is read."""
        return 0.0 if self._at is None else self._at[0]

    def show_at(self, seconds: float, tensors: TileTensors | None) -> None:
        """Let reads see the array at another time; what was programmed stays as it is.

        Args:
            seconds: Time since programming.
            tensors: What the tiles hold then; None for what was programmed.
        """
        self._at = None if tensors is None else (seconds, tensors)

    @property
    def device(self) -> torch.device:
        """Where the conductances live."""
        return self._programmed.conductance.device

    @property
    def conductance(self) -> ReadOnlyTensor:
        """Programmed conductances, normalised, ``(in_tiles, rows, out_tiles * columns)``."""
        return read_only(self._programmed.conductance.clone(), self.layer_name)

    @property
    def scale(self) -> ReadOnlyTensor:
        """Programmed digital output scales, shape ``(in_tiles, out_tiles, columns)``."""
        return read_only(self._programmed.scale.clone(), self.layer_name)

    def rewritten(
        self, conductance: Tensor, scale: Tensor, programming: Programming
    ) -> FrozenTileArray:
        """Make the array that takes this one's place after it was written on purpose.

        Args:
            conductance: Normalised conductances in blocked form.
            scale: Digital output scales in blocked form.
            programming: How it was written.
        """
        old = self._programmed
        tensors = TileTensors(conductance, scale, old.input_range, old.out_noise)
        successor = FrozenTileArray(
            tensors, self.blocks, self.engine, self.rpu_config, programming, self.layer_name
        )
        # An observation that is running goes on with the new array.
        successor.probes = self.probes
        return successor

    def positions(self) -> Iterator[tuple[int, int]]:
        """Index of every tile along input and output."""
        return self.blocks.positions()

    def tile(self, in_tile: int, out_tile: int) -> tuple[Tensor, Tensor]:
        """Copies of a tile's weights ``(out_size, rows)`` and output scales ``(out_size,)``."""
        part = self._programmed.tile(self.blocks, (in_tile, out_tile))
        return part.conductance[0].T.clone(), part.scale[0, 0].clone()

    def current_digests(self) -> Tensor:
        """SHA-256 of every tile's programmed tensors as they are now, one row a tile."""
        return self._digests(self._programmed)

    def _digests(self, tensors: TileTensors) -> Tensor:
        rows = []
        for position in self.positions():
            digest = hashlib.sha256()
            for name, part in tensors.tile(self.blocks, position).named():
                values = part[0].T if name == "conductance" else part[0, 0]
                values = values.detach().float().cpu().contiguous()
                digest.update(str(tuple(values.shape)).encode())
                digest.update(values.numpy().tobytes())
            rows.append(torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))
        return torch.stack(rows)

    def logical_weight(self) -> Tensor:
        """The matrix that the layer multiplies with, shape ``(out_features, in_features)``."""
        return self._joined()[:, : self.blocks.in_features]

    def logical_bias(self) -> Tensor | None:
        """The bias that the array holds, shape ``(out_features,)``; None if it holds none."""
        if not self.blocks.bias_row:
            return None
        # The last row of the only tiles along the input.
        row = self._programmed.conductance[0, -1].view(1, self.blocks.out_tiles, -1)
        return self.blocks.join_outputs(row * self._programmed.scale)[0]

    def largest_weight(self) -> Tensor:
        """Weight at the window's end of each cell, shape ``(out_features, in_features)``."""
        scale = self.blocks.join_outputs(self._programmed.scale)
        parts = [scale[i, :, None].expand(-1, n) for i, n in enumerate(self.blocks.in_sizes)]
        return torch.cat(parts, dim=1)[:, : self.blocks.in_features]

    def _joined(self) -> Tensor:
        """Logical weights of all rows, the bias row included, ``(out_features, rows)``."""
        blocks, held = self.blocks, self._programmed
        each = held.conductance.unflatten(2, (blocks.out_tiles, blocks.columns))
        scaled = blocks.join_outputs((each * held.scale[:, None]).flatten(0, 1))
        rows = scaled.unflatten(0, (blocks.in_tiles, blocks.rows))
        parts = zip(rows, blocks.in_sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts]).T

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Read the tiles, add up partial sums and the digital bias.

        Args:
            x: Shape ``(..., in_features)``, any floating type; read as 32-bit floats.
            bias: Digital bias, shape ``(out_features,)``.
        Returns:
            Shape ``(..., out_features)``, in the type of ``x``.
        """
        with torch.autocast(x.device.type, enabled=False):
            vectors = x.reshape(-1, self.blocks.in_features).float()
            y = self.engine.finish(_read(vectors, self), bias)
        return y.view(*x.shape[:-1], self.blocks.out_features).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a move to another device, and ignore casts."""
        device = fn(torch.empty(0, device=self.device)).device
        if device.type == "meta":
            raise FrozenConductanceError(
                f"layer '{self.layer_name}': expected a device that holds data, got 'meta', which "
                "would lose the conductances. Move the model to a real device."
            )
        if device != self.device:
            self._programmed = self._programmed.to(device)
            self._at = self._at and (self._at[0], self._at[1].to(device))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, value in self._programmed.named():
            destination[prefix + name] = value.detach().clone()
        destination[prefix + "digest"] = self.digest.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a checkpoint into arrays that wait for one; others must hold the same already."""
        present = {**dict(self._programmed.named()), "digest": self.digest}
        loaded: dict[str, Tensor] = {}
        for name, own in present.items():
            stored = state_dict.get(prefix + name)
            if stored is None:
                missing_keys.extend([prefix + name] * strict)
            elif stored.shape != own.shape:
                error_msgs.append(
                    f"layer '{self.layer_name}': expected '{prefix}{name}' of shape "
                    f"{tuple(own.shape)}, got {tuple(stored.shape)}. Convert with the tile sizes "
                    "of the model that was saved."
                )
            else:
                loaded[name] = stored.detach().to(own.device, own.dtype, copy=True)
        if strict:
            known = {prefix + name for name in present}
            own_keys = (key for key in state_dict if key.startswith(prefix))
            unexpected_keys.extend(key for key in own_keys if key not in known)
        if len(loaded) == len(present):
            self._take(loaded, prefix)

    def _take(self, loaded: dict[str, Tensor], prefix: str) -> None:
        digest = loaded.pop("digest")
        tensors, awaited = TileTensors(**loaded), self.programming.source == "checkpoint"
        for name, own in self._programmed.named():
            if not awaited and not torch.equal(loaded[name], own):
                raise FrozenConductanceError(
                    f"'{prefix}{name}': expected the conductances that are programmed here, got "
                    "others from the checkpoint. Load it into a model that was frozen with "
                    "freeze_(model, programmed_by='checkpoint'), or write the arrays with "
                    "reprogram_(model, chip, targets)."
                )
        if not torch.equal(self._digests(tensors), digest.cpu()):
            raise FrozenConductanceError(
                f"'{prefix}conductance': expected the conductances whose digests the checkpoint "
                "holds, got others. It was changed or cast after it was saved; save it anew."
            )
        self._programmed, self._at = tensors, None
        self.digest = digest

    def __getstate__(self) -> dict[str, Any]:
        # Probes belong to a running observation, not to the hardware.
        return {**self.__dict__, "probes": []}


# In aihwkit, the analog_module of a layer that fits one tile is that tile.
for _name in [
    "set_weights",
    "program_weights",
    "drift_weights",
    "remap_weights",
    "reset",
    "update",
]:
    setattr(FrozenTileArray, _name, refuse(_name))
