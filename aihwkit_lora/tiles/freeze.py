"""Freezing and thawing models, and proving that nothing moved in between."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from aihwkit.simulator.tiles.module import TileModule
from torch import nn

from aihwkit_lora.errors import (
    ConfigurationError,
    FrozenConductanceError,
    StageError,
    UnsupportedTileError,
)
from aihwkit_lora.tiles.array import FrozenTileArray
from aihwkit_lora.tiles.blocks import TileTensors
from aihwkit_lora.tiles.engines import Engine, EngineName, FusedEngine, fused_engine
from aihwkit_lora.tiles.grid import (
    TileGrid,
    analog_layers,
    blocked,
    hold,
    hold_cells,
    tile_weight,
)
from aihwkit_lora.tiles.layers import FrozenLayer, frozen_class, ordinary_layer
from aihwkit_lora.tiles.record import AihwkitDrift, Cells, Programming
from aihwkit_lora.tiles.reference import ReferenceEngine

# Where PEFT 0.21 keeps copies of whole layers.
_COPIES = re.compile(r"\.(modules_to_save|ln_tuning_layers)\.")

PROGRAMMING = "_aihwkit_lora_programming"
"""Attribute of an aihwkit layer under which ``program_`` leaves its :class:`Programming`."""


def frozen_layers(model: nn.Module) -> Iterator[tuple[str, FrozenLayer]]:
    """Find the frozen layers of a model, with their full names.

    Args:
        model: Any module, also one wrapped by PEFT.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenLayer):
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


@dataclass(frozen=True)
class EngineChoice:
    """What one frozen layer computes with, and why.

    Args:
        layer: Full name of the layer.
        engine: ``"fused"`` or ``"reference"``.
        reason: Why, as a sentence without its subject.
    """

    layer: str
    engine: str
    reason: str

    def __str__(self) -> str:
        return f"layer '{self.layer}': {self.engine}, since it {self.reason}"


def engines(model: nn.Module) -> list[EngineChoice]:
    """Tell what every frozen layer computes with, and why.

    Args:
        model: A frozen model.
    Raises:
        StageError: There is no frozen layer.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> print(al.engines(al.freeze_(model, programmed_by="example"))[0])
        layer '0': fused, since it follows all of the tile's settings
    """
    return [
        EngineChoice(plain_name(name), engine.name, engine.reason)
        for name, layer in required_layers(model)
        for engine in [layer.analog_module.engine]
    ]


def freeze_(
    model: nn.Module, *, programmed_by: str | None = None, engine: EngineName = "auto"
) -> nn.Module:
    """Replace every analogue layer by a frozen one, whose conductances have no way to change.

    All layers are checked before the first is replaced: after an error the model is as before.

    Args:
        model: A converted and programmed model, or a single analogue layer.
        programmed_by: Says, for layers that ``program_`` has not seen, how their arrays were
            programmed, for example ``"read back from chip 7"``. Layers that aihwkit's own
            ``program_analog_weights`` has programmed need no words.
        engine: What frozen layers compute with. ``"fused"`` is one blocked product for all tiles of
            a layer; ``"reference"`` are aihwkit's own tiles; ``"auto"`` takes the fused one where
            it follows all of a layer's settings. :func:`engines` tells which and why.
    Returns:
        The model itself; for a single layer, the frozen layer that replaces it.
    Raises:
        StageError: There is nothing to freeze, a layer is frozen already, was never programmed,
            or was changed since.
        UnsupportedTileError: A layer or one of its settings has no frozen counterpart.
        ConfigurationError: There is no such engine.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> _ = al.program_(model, chip, seed=0)
        >>> type(al.freeze_(model)[0]).__name__
        'FrozenLinear'
    """
    if engine not in get_args(EngineName):
        raise ConfigurationError(
            f"freeze_: expected engine {' or '.join(map(repr, get_args(EngineName)))}, got "
            f"{engine!r}."
        )
    layers = dict(analog_layers(model))
    if not layers:
        raise StageError(
            f"{type(model).__name__}: expected analogue layers to freeze, got none. Call "
            "convert(net, chip), or aihwkit's convert_to_analog, first."
        )
    _refuse_analogue_adapters(layers)
    frozen = {layer: _frozen(name, layer, programmed_by, engine) for name, layer in layers.items()}
    return _replaced(model, frozen)


def thaw_(model: nn.Module) -> nn.Module:
    """Replace every frozen layer by an ordinary layer of aihwkit that holds the same weights.

    Pulsed tiles are the exception: aihwkit clips what they are given to the bounds of their cells
    and adds write noise. Those that ``program_`` has programmed get their own cells back; others
    draw new cells, whose bounds can be narrower.

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
    return _replaced(model, {layer: _thawed(layer) for layer in layers.values()})


def target_modules(model: nn.Module) -> list[str]:
    """List the frozen layers by name, as PEFT's ``target_modules`` wants them.

    PEFT takes every layer whose name ends in one of these: a frozen ``head`` also stands for a
    digital ``decoder.head``. ``AnalogLoraConfig.for_model(model)`` names them so that no other
    layer is meant.

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
    for _, layer in required_layers(model):
        digest.update(layer.analog_module.current_digests().cpu().numpy().tobytes())
    return digest.hexdigest()


def verify(model: nn.Module) -> None:
    """Compare every frozen tile with the digest taken when it was frozen.

    Args:
        model: A frozen model.
    Raises:
        StageError: There is no frozen layer.
        FrozenConductanceError: A tile has changed, or PEFT has copied a frozen layer to train
            the copy; the message names it.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> al.verify(al.freeze_(model, programmed_by="example"))
    """
    for name, layer in required_layers(model):
        if _COPIES.search(name):
            raise FrozenConductanceError(
                f"layer '{plain_name(name)}': expected the array that was frozen, got a copy that "
                "PEFT has made of it, and a copy is an array that nobody has programmed. Name "
                "digital layers only in modules_to_save and the like; a frozen layer learns "
                "through its adapter."
            )
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


def required_layers(model: nn.Module) -> list[tuple[str, FrozenLayer]]:
    """List the frozen layers of a model that has to have some.

    Args:
        model: A frozen model, plain or wrapped by PEFT.
    Raises:
        StageError: There is none.
    """
    layers = list(frozen_layers(model))
    if not layers:
        raise StageError(
            f"{type(model).__name__}: expected frozen layers, got none. Call freeze_(model) first."
        )
    return layers


def _replaced(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new layers in the place of old ones, wherever in the model these are used."""
    for old, new in layers.items():
        new.train(old.training)
    for parent in list(model.modules()):
        # Not named_children(), which names a layer that is used twice only once.
        for name, child in list(parent._modules.items()):
            if child is not None and child in layers:
                setattr(parent, name, layers[child])
    return layers.get(model, model)


def _refuse_analogue_adapters(layers: dict[str, nn.Module]) -> None:
    for name in layers:
        if any(part.startswith("lora_") for part in name.split(".")):
            raise StageError(
                f"layer '{name}': expected adapters to be digital, got one on analogue tiles. "
                "Convert and freeze the base model first, then get_peft_model; or convert with "
                "exclude_modules naming every LoRA matrix."
            )


def _frozen(
    name: str, layer: nn.Module, programmed_by: str | None, engine: EngineName
) -> FrozenLayer:
    if isinstance(layer, FrozenLayer):
        raise StageError(
            f"layer '{name}': expected an unfrozen layer, got one that is frozen already. Call "
            "thaw_(model) first to start over."
        )
    replacement = frozen_class(layer, name)
    grid = TileGrid(layer, name)
    programming = _programming(grid, programmed_by)
    weights = [cells.weight for cells in programming.cells]
    tensors = blocked(grid, weights or [tile_weight(tile) for tile in grid.each()])
    array = FrozenTileArray(
        tensors.to(next(grid.each()).device),
        grid.blocks,
        _engine(grid, engine),
        grid.rpu_config,
        programming,
        name,
    )
    return replacement(layer, array, grid.bias)


def _engine(grid: TileGrid, wanted: EngineName) -> Engine:
    if wanted == "reference":
        return ReferenceEngine(grid, "was asked to read with aihwkit's own tiles")
    fused = fused_engine(next(grid.each()), grid.name)
    if isinstance(fused, FusedEngine):
        return fused
    if wanted == "fused":
        raise UnsupportedTileError(
            f"layer '{grid.name}': {fused} for the fused engine. Set rpu_config.{fused.field} "
            "accordingly before converting, or freeze with engine='auto', which reads with "
            "aihwkit's own tiles where it has to."
        )
    return ReferenceEngine(grid, f"needs aihwkit's own tiles (fused: {fused})")


def _programming(grid: TileGrid, programmed_by: str | None) -> Programming:
    known: Programming | None = getattr(grid.layer, PROGRAMMING, None)
    if known is not None and known.digest == grid.weight_digest():
        return known
    if programmed_by is not None:
        return Programming(source=programmed_by, drift=_drift(grid))
    if known is not None:
        raise StageError(
            f"layer '{grid.name}': expected the weights that program_ left, got others. Something "
            "changed the tiles since: call program_(model, chip) again before freeze_(model)."
        )
    if grid.programmed_by_aihwkit:
        return Programming(source="aihwkit program_weights", drift=_drift(grid))
    raise StageError(
        f"layer '{grid.name}': expected a programmed layer, got a converted one. Call "
        "program_(model, chip) before freeze_(model), or say how it was programmed: "
        "freeze_(model, programmed_by='…')."
    )


def _drift(grid: TileGrid) -> tuple[AihwkitDrift, ...]:
    """Take over how each cell drifts, where aihwkit has drawn that when it programmed."""
    if not grid.programmed_by_aihwkit:
        return ()
    return tuple(
        AihwkitDrift(
            tile.reference_combined_weights,
            tile.programmed_weights,
            tuple(tile.drift_noise_parameters),
        )
        for tile in grid.each()
    )


def _thawed(layer: FrozenLayer) -> nn.Module:
    array, ordinary = layer.analog_module, ordinary_layer(layer)
    grid = TileGrid(ordinary, layer.layer_name)
    if grid.blocks != array.blocks:
        raise UnsupportedTileError(
            f"layer '{layer.layer_name}': expected tiles {array.blocks}, got {grid.blocks} from "
            "its configuration. Keep rpu_config.mapping as it was when the layer was converted."
        )
    places = zip(grid.each(), array.positions(), strict=True)
    for index, (tile, position) in enumerate(places):
        cells = array.programming.cells[index] if grid.pulsed and array.programming.cells else None
        _refill(tile, array.programmed.tile(array.blocks, position), cells)
    array.engine.refill(grid)
    bias = layer._parameters["bias"]
    if bias is not None and grid.bias is not None:
        grid.bias.data.copy_(bias.data)
    ordinary.to(array.device)
    if array.programming.cells:
        digest = TileGrid(ordinary, layer.layer_name).weight_digest()
        setattr(ordinary, PROGRAMMING, replace(array.programming, digest=digest))
    return ordinary


def _refill(tile: TileModule, held: TileTensors, cells: Cells | None) -> None:
    """Give an ordinary tile what a frozen one holds, and a pulsed one its own cells."""
    if cells is not None:
        hold_cells(tile, cells)
    else:
        hold(tile, held.conductance[0].T)
    tile.set_scales(held.scale[0, 0].clone())
    if held.input_range is not None:
        tile.set_input_range(float(held.input_range[0, 0]))
    if held.out_noise is not None:
        drawn = tile.get_forward_parameters() | {"out_noise_values": held.out_noise[0, 0].clone()}
        tile.set_forward_parameters(drawn)
