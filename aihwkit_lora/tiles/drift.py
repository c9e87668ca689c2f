"""How frozen arrays look some time after they were programmed: computed, never written back."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from aihwkit.exceptions import AihwkitException
from aihwkit.inference.compensation.base import BaseDriftCompensation
from aihwkit.inference.noise.base import BaseNoiseModel
from aihwkit.inference.noise.reram import ReRamWan2022NoiseModel
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.tiles.array import FrozenTileArray
from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.freeze import plain_name, required_layers


def drift_(
    model: nn.Module, seconds: float, *, noise_model: BaseNoiseModel | None = None
) -> nn.Module:
    """Let every frozen array be read as it is some time after programming.

    Conductances at that time come from one of aihwkit's noise models, and the outputs are
    compensated as the layer's configuration asks for. What was programmed stays as it is, and so
    does the fingerprint. Coefficients that belong to a cell (for PCM the exponent of its drift)
    are drawn once, so later calls follow the same cells through time; noise that accumulates is
    drawn anew in each call, from torch's generator.

    Args:
        model: A frozen model, plain or wrapped by PEFT.
        seconds: Time since programming, 0 or more; 0 goes back to what was programmed, exactly.
        noise_model: How the cells drift. If None, ``rpu_config.noise_model`` of each layer.
    Returns:
        The model itself.
    Raises:
        StageError: There is no frozen layer, or an array was frozen after aihwkit had drifted it.
        ConfigurationError: The time is negative or not a number, a layer has no noise model, or
            the model has no data for this time.

    Example:
        >>> import aihwkit_lora as al
        >>> from aihwkit.inference import PCMLikeNoiseModel
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> model, x = al.freeze_(model, programmed_by="example"), torch.ones(1, 3)
        >>> fresh, before = model(x), al.fingerprint(model)
        >>> old = al.drift_(model, 86400.0, noise_model=PCMLikeNoiseModel())(x)
        >>> bool((old == fresh).all()), al.fingerprint(model) == before
        (False, True)
        >>> bool((al.drift_(model, 0.0)(x) == fresh).all())
        True
    """
    if not (math.isfinite(seconds) and seconds >= 0.0):
        raise ConfigurationError(
            f"drift_: expected a time since programming of 0 s or more, got {seconds!r}."
        )
    layers = [(plain_name(name), layer.analog_module) for name, layer in required_layers(model)]
    # All layers are computed before the first one changes: after an error nothing has.
    seen: list[TileTensors | None] = [None] * len(layers)
    if seconds > 0.0:
        seen = [_drifted(name, array, seconds, noise_model) for name, array in layers]
    for (_, array), tensors in zip(layers, seen, strict=True):
        array.show_at(seconds, tensors)
    return model


@dataclass(frozen=True, eq=False)
class _Fate:
    """What was drawn for the cells of one array, once and for all.

    Args:
        noise_model: By which model.
        programmed: The tensors it was drawn for.
        parameters: Of each tile, for each conductance of a weight.
        baselines: Readout of each tile right after programming; empty without compensation.
    """

    noise_model: BaseNoiseModel
    programmed: TileTensors
    parameters: tuple[tuple[Tensor | None, ...], ...]
    baselines: tuple[Any, ...]


def _drifted(
    name: str, array: FrozenTileArray, seconds: float, noise_model: BaseNoiseModel | None
) -> TileTensors:
    wanted = noise_model or getattr(array.rpu_config, "noise_model", None)
    if wanted is None:
        raise ConfigurationError(
            f"layer '{name}': expected a noise model that says how its cells drift, got none from "
            f"{type(array.rpu_config).__name__}. Pass drift_(model, seconds, noise_model=...), one "
            "of aihwkit.inference.noise."
        )
    fate = _fate(name, array, wanted)
    conductance, scale = array.programmed.conductance.clone(), array.programmed.scale.clone()
    for index, position in enumerate(array.positions()):
        held = array.programmed.tile(array.blocks, position)
        weight = _weight_after(name, held, fate, index, seconds)
        factor = _compensation_factor(array, held, weight, fate, index)
        array.blocks.put(conductance, scale, position, weight, held.scale[0, 0] * factor)
    return replace(array.programmed, conductance=conductance, scale=scale)


def _weight_after(name: str, held: TileTensors, fate: _Fate, index: int, seconds: float) -> Tensor:
    programmed = held.conductance[0].T.contiguous()
    model = _mended(fate.noise_model)
    try:
        weight: Tensor = model.apply_drift_noise(
            programmed.cpu(), list(fate.parameters[index]), seconds
        )
    except AihwkitException as error:
        raise ConfigurationError(
            f"layer '{name}': expected a time that {type(model).__name__} has data for, got "
            f"{seconds:g} s. {error}."
        ) from error
    if not bool(weight.isfinite().all()):
        raise ConfigurationError(
            f"layer '{name}': expected finite conductances {seconds:g} s after programming, got "
            f"others from {type(model).__name__}. Choose a later time, or another model."
        )
    return weight.to(programmed)


def _fate(name: str, array: FrozenTileArray, noise_model: BaseNoiseModel) -> _Fate:
    known: _Fate | None = array.fate
    fitting = known is not None and known.programmed is array.programmed
    if known is not None and fitting and known.noise_model == noise_model:
        return known
    tiles = [array.programmed.tile(array.blocks, position) for position in array.positions()]
    own_model = getattr(array.rpu_config, "noise_model", None)
    by_aihwkit = array.programming.drift if noise_model is own_model else ()
    for held, drawn in zip(tiles, by_aihwkit, strict=bool(by_aihwkit)):
        if not torch.equal(drawn.programmed.cpu(), held.conductance[0].T.cpu()):
            raise StageError(
                f"layer '{name}': expected an array as aihwkit has programmed it, got one that it "
                "has drifted since. Call freeze_(model) before any drift_analog_weights(...)."
            )
    parameters = tuple(drawn.parameters for drawn in by_aihwkit) or tuple(
        _drawn(noise_model, held) for held in tiles
    )
    fate = _Fate(noise_model, array.programmed, parameters, _baselines(array, tiles))
    array.fate = fate
    return fate


def _baselines(array: FrozenTileArray, tiles: list[TileTensors]) -> tuple[Any, ...]:
    """What the compensation of each tile compares with; nothing if there is none."""
    compensation: BaseDriftCompensation | None = getattr(
        array.rpu_config, "drift_compensation", None
    )
    if compensation is None:
        return ()
    readouts = (_Readout(compensation, array, held, i) for i, held in enumerate(tiles))
    return tuple(compensation.init_baseline(readout) for readout in readouts)


def _drawn(noise_model: BaseNoiseModel, held: TileTensors) -> tuple[Tensor | None, ...]:
    conductances, _ = noise_model.g_converter.convert_to_conductances(
        held.conductance[0].T.contiguous().cpu()
    )
    return tuple(noise_model.generate_drift_coefficients(each) for each in conductances)


def _mended(noise_model: BaseNoiseModel) -> BaseNoiseModel:
    """Work around a fault of aihwkit 1.2.0.

    ``ReRamWan2022NoiseModel`` sets ``prog_coeff_g_max_reference`` to the 40 µS that its
    coefficients were fitted for, but scales by ``coeff_g_max_reference``, which is its own
    ``g_max``: at any other ``g_max`` the noise of 40 µS is applied unscaled.
    """
    fitted_for = getattr(noise_model, "prog_coeff_g_max_reference", None)
    if not isinstance(noise_model, ReRamWan2022NoiseModel) or fitted_for is None:
        return noise_model
    mended = copy(noise_model)
    mended.coeff_g_max_reference = fitted_for
    return mended


class _Readout:
    """A tile as aihwkit's drift compensations see it: something to read a test pattern with."""

    def __init__(
        self,
        compensation: BaseDriftCompensation,
        array: FrozenTileArray,
        held: TileTensors,
        index: int,
    ) -> None:
        self._array, self._held, self._index = array, held, index
        self._pattern: Tensor = compensation.get_readout_tensor(held.conductance.shape[1])

    def _forward_drift_readout_tensor(
        self, reset_if: bool = False, exact_reference: bool = False
    ) -> Tensor:
        pattern = self._pattern.to(self._array.device)
        if exact_reference:
            return pattern @ self._target().T.to(pattern)
        _, rows, columns = self._held.conductance.shape
        bare = replace(self._held, scale=torch.ones_like(self._held.scale), input_range=None)
        engine = self._array.engine.for_tile(self._index)
        return engine.read(pattern, bare, Blocks((rows,), (columns,)))

    def _target(self) -> Tensor:
        """Weights that were to be programmed; those that were, if nobody knows."""
        programming = self._array.programming
        if programming.drift:
            return programming.drift[self._index].target
        if programming.cells:
            return programming.cells[self._index].wanted_weight
        return self._held.conductance[0].T


def _compensation_factor(
    array: FrozenTileArray, held: TileTensors, weight: Tensor, fate: _Fate, index: int
) -> Tensor | float:
    if not fate.baselines:
        return 1.0
    compensation: BaseDriftCompensation = array.rpu_config.drift_compensation
    drifted = replace(held, conductance=weight.T[None])
    read = _Readout(compensation, array, drifted, index)._forward_drift_readout_tensor()
    factor: Tensor = compensation.apply(read, fate.baselines[index])
    return factor
