"""Freezing and thawing models, and proving that nothing moved in between."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from aihwkit.nn import AnalogLinear
from torch import Tensor, nn

from aihwkit_lora.errors import FrozenConductanceError, StageError, UnsupportedTileError
from aihwkit_lora.tiles.frozen import FrozenLinear, FrozenTileArray
from aihwkit_lora.tiles.grid import (
    TileGrid,
    analog_layers,
    hold,
    hold_cells,
    tile_scale,
    tile_weight,
)
from aihwkit_lora.tiles.periphery import TileIO
from aihwkit_lora.tiles.record import Programming

PROGRAMMING = "_aihwkit_lora_programming"
"""Attribute of an aihwkit layer under which ``program_`` leaves its :class:`Programming`."""


def frozen_layers(model: nn.Module) -> Iterator[tuple[str, FrozenLinear]]:
    """Find the frozen layers of a model, with their full names.

    Args:
        model: Any module, also one wrapped by PEFT.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            yield name, module


def plain_name(name: str) -> str:
    """Name of a layer without what PEFT puts around it.

    Args:
        name: Full name in a model, wrapped by PEFT or not.

    Example:
        >>> plain_name("base_model.model.encoder.0.base_layer")
        'encoder.0'
    """
    return name.replace("base_model.model.", "").removesuffix(".base_layer")


def freeze_(model: nn.Module, *, programmed_by: str | None = None) -> nn.Module:
    """Replace every analogue layer by a frozen one, whose conductances have no way to change.

    All layers are checked before the first is replaced: after an error the model is as before.

    Args:
        model: A converted and programmed model, or a single analogue layer.
        programmed_by: Says, for layers that ``program_`` has not seen, how their arrays were
            programmed, for example ``"read back from chip 7"``. Layers that aihwkit's own
            ``program_analog_weights`` has programmed need no words.
    Returns:
        The model itself; for a single layer, the frozen layer that replaces it.
    Raises:
        StageError: There is nothing to freeze, a layer is frozen already, was never programmed,
            or was changed since.
        UnsupportedTileError: A layer or one of its settings has no frozen counterpart.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> _ = al.program_(model, chip, seed=0)
        >>> type(al.freeze_(model)[0]).__name__
        'FrozenLinear'
    """
    layers = dict(analog_layers(model))
    if not layers:
        raise StageError(
            f"{type(model).__name__}: expected analogue layers to freeze, got none. Call "
            "convert(net, chip), or aihwkit's convert_to_analog, first."
        )
    frozen = {name: _frozen(name, layer, programmed_by) for name, layer in layers.items()}
    return _replaced(model, frozen)


def thaw_(model: nn.Module) -> nn.Module:
    """Replace every frozen layer by an ordinary layer of aihwkit that holds the same weights.

    Args:
        model: A frozen model without adapters, or a single frozen layer.
    Returns:
        The model itself; for a single layer, the layer that replaces it.
    Raises:
        StageError: There is nothing to thaw, or adapters are attached.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> model = al.thaw_(al.freeze_(model, programmed_by="example"))
        >>> type(model[0]).__name__
        'AnalogLinear'
    """
    layers = dict(frozen_layers(model))
    if not layers:
        raise StageError(
            f"{type(model).__name__}: expected frozen layers to thaw, got none. Only what "
            "freeze_(model) has frozen can be thawed."
        )
    for name in layers:
        if name.endswith("base_layer"):
            raise StageError(
                f"layer '{name}': expected a model without adapters, got one wrapped by PEFT. "
                "Take the adapters off first, for example model = peft_model.unload()."
            )
    return _replaced(model, {name: _thawed(layer) for name, layer in layers.items()})


def target_modules(model: nn.Module) -> list[str]:
    """List the frozen layers by name, as PEFT's ``target_modules`` wants them.

    Args:
        model: A frozen model, also one that carries adapters already.
    Raises:
        StageError: There is no frozen layer below the model.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> al.target_modules(al.freeze_(model, programmed_by="example"))
        ['0']
    """
    names = [plain_name(name) for name, _ in frozen_layers(model) if name]
    if not names:
        raise StageError(
            f"{type(model).__name__}: expected frozen layers below the model, got none. Call "
            "freeze_(model) first; wrap a single layer in nn.Sequential, since PEFT replaces "
            "layers in their parent."
        )
    return names


def fingerprint(model: nn.Module) -> str:
    """Hash all frozen conductances and scales; equal before and after means nothing moved.

    Layers count in their order, not by name, so wrapping a model with PEFT changes nothing.

    Args:
        model: A frozen model.
    Returns:
        SHA-256 as 64 hexadecimal digits.
    Raises:
        StageError: There is no frozen layer.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> len(al.fingerprint(al.freeze_(model, programmed_by="example")))
        64
    """
    digest = hashlib.sha256()
    for layer in _required(model):
        digest.update(layer.analog_module.current_digests().cpu().numpy().tobytes())
    return digest.hexdigest()


def verify(model: nn.Module) -> None:
    """Compare every frozen tile with the digest taken when it was frozen.

    Args:
        model: A frozen model.
    Raises:
        StageError: There is no frozen layer.
        FrozenConductanceError: A tile has changed; the message names it.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> al.verify(al.freeze_(model, programmed_by="example"))
    """
    _required(model)
    for name, layer in frozen_layers(model):
        array = layer.analog_module
        same = (array.current_digests() == array.digest).all(dim=1).tolist()
        for (in_tile, out_tile), unchanged in zip(array.positions(), same, strict=True):
            if not unchanged:
                raise FrozenConductanceError(
                    f"layer '{name}', tile (input {in_tile}, output {out_tile}): expected the "
                    "conductances and scales that were frozen, got others. Something wrote "
                    "the layer's buffers directly; freeze a newly programmed model, or write on "
                    "purpose with reprogram_(model, chip)."
                )


def _required(model: nn.Module) -> list[FrozenLinear]:
    layers = [layer for _, layer in frozen_layers(model)]
    if not layers:
        raise StageError(
            f"{type(model).__name__}: expected frozen layers, got none. Call freeze_(model) first."
        )
    return layers


def _replaced(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    for name, layer in layers.items():
        layer.train(model.training)
        if not name:
            return layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def _frozen(name: str, layer: nn.Module, programmed_by: str | None) -> nn.Module:
    if isinstance(layer, FrozenLinear):
        raise StageError(
            f"layer '{name}': expected an unfrozen layer, got one that is frozen already. Call "
            "thaw_(model) first to start over."
        )
    grid = TileGrid(layer, name)
    programming = _programming(grid, programmed_by)
    io = TileIO.from_aihwkit(grid.rpu_config.forward, whole_batch=grid.torch_tiles, layer=name)
    weights = [cells.weight for cells in programming.cells]
    conductance, scale = blocked(grid, weights or [tile_weight(tile) for tile in grid.each()])
    device = next(grid.each()).device
    array = FrozenTileArray(
        conductance.to(device),
        scale.to(device),
        grid.blocks,
        io,
        grid.rpu_config,
        programming,
        name,
    )
    return FrozenLinear(array, grid.bias)


def _programming(grid: TileGrid, programmed_by: str | None) -> Programming:
    known: Programming | None = getattr(grid.layer, PROGRAMMING, None)
    if known is not None and known.digest == grid.weight_digest():
        return known
    if programmed_by is not None:
        return Programming(source=programmed_by)
    if known is not None:
        raise StageError(
            f"layer '{grid.name}': expected the weights that program_ left, got others. Something "
            "changed the tiles since: call program_(model, chip) again before freeze_(model)."
        )
    if grid.programmed_by_aihwkit:
        return Programming(source="aihwkit program_weights")
    raise StageError(
        f"layer '{grid.name}': expected a programmed layer, got a converted one. Call "
        "program_(model, chip) before freeze_(model), or say how it was programmed: "
        "freeze_(model, programmed_by='…')."
    )


def blocked(grid: TileGrid, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pack a layer's tiles into the blocked form of :class:`FrozenTileArray`.

    Args:
        grid: The layer.
        weights: Normalised weights of each tile, shape ``(out_size, in_size)``, inputs first.
    Returns:
        Conductances ``(in_tiles, rows, out_tiles * columns)`` and scales
        ``(in_tiles, out_tiles, columns)``, zero where a tile is smaller than the largest.
    """
    blocks = grid.blocks
    ins, outs = len(blocks.in_sizes), len(blocks.out_sizes)
    conductance = torch.zeros(ins, blocks.rows, outs * blocks.columns)
    scale = torch.zeros(ins, outs, blocks.columns)
    for position, tile, weight in zip(blocks.positions(), grid.each(), weights, strict=True):
        blocks.put(conductance, scale, position, weight, tile_scale(tile))
    return conductance, scale


def _thawed(layer: FrozenLinear) -> AnalogLinear:
    array = layer.analog_module
    blocks, bias = array.blocks, layer.bias
    ordinary = AnalogLinear(
        blocks.in_features, blocks.out_features, bias is not None, array.rpu_config
    )
    grid = TileGrid(ordinary, layer.layer_name)
    if grid.blocks != blocks:
        raise UnsupportedTileError(
            f"layer '{layer.layer_name}': expected tiles {blocks}, got {grid.blocks} from its "
            "configuration. Keep rpu_config.mapping as it was when the layer was converted."
        )
    cells = array.programming.cells
    for index, (tile, position) in enumerate(zip(grid.each(), array.positions(), strict=True)):
        weight, scale = array.tile(*position)
        if grid.pulsed and cells:
            hold_cells(tile, cells[index].state.persistent, cells[index].response.parameters)
        else:
            hold(tile, weight)
        tile.set_scales(scale.clone())
    if bias is not None and grid.bias is not None:
        grid.bias.data.copy_(bias.data)
    ordinary.to(array.conductance.device)
    if cells:
        digest = TileGrid(ordinary, layer.layer_name).weight_digest()
        setattr(ordinary, PROGRAMMING, replace(array.programming, digest=digest))
    return ordinary
