"""The same model on many chips: what would be read had programming erred a little differently.

Every cell gets a random error on top of what was programmed, within the chip's window, as in the
noise study of arXiv:2601.10037 (its code draws 100 such chips). Computed, never written back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aihwkit_lora.chips.mapping import ConductanceMapping
from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.tiles.array import FrozenTileArray
from aihwkit_lora.tiles.blocked import ReadProbe
from aihwkit_lora.tiles.blocks import Blocks, TileTensors
from aihwkit_lora.tiles.engines import Engine, FusedEngine
from aihwkit_lora.tiles.freeze import plain_name, required_layers
from aihwkit_lora.tiles.grid import TileGrid
from aihwkit_lora.tiles.many_chips import many_chips_mvm, stackable


@contextmanager
def noisy_chips(
    model: nn.Module,
    *,
    sigma_siemens: float = 5e-6,
    seed: int = 0,
    chip: int = 0,
    mapping: ConductanceMapping | None = None,
) -> Iterator[nn.Module]:
    """Let a frozen model be read, inside the block, as one of many simulated programmings.

    The conductance of each cell is ``G + N(0, sigma)``, limited to the window; a cell that
    write-verify left beyond the window gets no further out. What was programmed stays as it is,
    and so does the fingerprint; after the block reads see it again, exactly.

    Args:
        model: A frozen model, plain or wrapped by PEFT.
        sigma_siemens: Standard deviation of the error of a cell, 0 or more.
        seed: Of a series of chips, 0 or more.
        chip: Which of the series, counted from 0. Equal numbers mean equal errors.
        mapping: Cells and window of layers whose programming does not say.
    Yields:
        The model itself.
    Raises:
        StageError: There is no frozen layer, an array is not read as it was programmed (drifted,
            or a noisy chip already), or nobody says how its weights are mapped to cells.
        ConfigurationError: The deviation, the seed or the number is negative or not a number.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> x, before = torch.ones(1, 3), al.fingerprint(model)
        >>> clean = model(x)
        >>> with noisy_chips(model, seed=1, mapping=chip.mapping):
        ...     print(bool((model(x) == clean).all()), al.fingerprint(model) == before)
        False True
        >>> bool((model(x) == clean).all())
        True
    """
    noise = WriteNoise(sigma_siemens, seed, mapping)
    arrays = _arrays(model)
    # All are computed before the first one changes: after an error nothing has.
    seen = noise.of(arrays, chip)
    with _showing(arrays, seen):
        yield model


def evaluate_noisy[Result](
    model: nn.Module,
    evaluate: Callable[[nn.Module], Result],
    *,
    chips: int = 100,
    sigma_siemens: float = 5e-6,
    seed: int = 0,
    mapping: ConductanceMapping | None = None,
) -> list[Result]:
    """Evaluate a model on many simulated programmings, one after the other.

    Args:
        model: A frozen model, plain or wrapped by PEFT.
        evaluate: From the model, as one chip would compute it, to any result.
        chips: How many, at least 1.
        sigma_siemens: Standard deviation of the error of a cell, 0 or more.
        seed: Of the series; see :func:`noisy_chips`.
        mapping: Cells and window of layers whose programming does not say.
    Returns:
        One result for each chip.
    Raises:
        ConfigurationError: There is no chip, or see :func:`noisy_chips`.
        StageError: See :func:`noisy_chips`.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> sums = evaluate_noisy(
        ...     model, lambda m: float(m(torch.ones(1, 3)).sum()), chips=3, mapping=chip.mapping
        ... )
        >>> len(sums)
        3
    """
    _require_chips(chips)
    options = {"sigma_siemens": sigma_siemens, "seed": seed, "mapping": mapping}
    results = []
    for chip in range(chips):
        with noisy_chips(model, chip=chip, **options):  # type: ignore[arg-type]
            results.append(evaluate(model))
    return results


@torch.no_grad()
def noisy_outputs(
    model: nn.Module,
    inputs: Any,
    *,
    chips: int = 100,
    sigma_siemens: float = 5e-6,
    seed: int = 0,
    mapping: ConductanceMapping | None = None,
    at_once: int = 20,
) -> Tensor:
    """Compute what many simulated programmings say to the same inputs, many in one pass.

    The model runs in evaluation mode. Chips are the ones of :func:`noisy_chips`; how many are
    computed at once changes the time and the memory, not the result. One by one it goes where a
    pass for several is impossible: an operation of the model that ``torch.func.vmap`` does not
    know, or somebody who observes the model, since each chip's reads take a charge of their own.

    Args:
        model: A frozen model, plain or wrapped by PEFT; gives logits, or an object with
            ``logits``.
        inputs: A tensor of shape ``(n, ...)``, or a tuple or dict of arguments.
        chips: How many, at least 1.
        sigma_siemens: Standard deviation of the error of a cell, 0 or more.
        seed: Of the series.
        mapping: Cells and window of layers whose programming does not say.
        at_once: Chips in one pass, at least 1.
    Returns:
        Shape ``(chips, n, outputs)``.
    Raises:
        ConfigurationError: ``chips`` or ``at_once`` is below 1, or see :func:`noisy_chips`.
        StageError: See :func:`noisy_chips`.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2)), chip)
        >>> model = al.freeze_(model, programmed_by="example")
        >>> noisy_outputs(model, torch.ones(4, 3), chips=5, mapping=chip.mapping).shape
        torch.Size([5, 4, 2])
    """
    _require_chips(chips)
    _require_chips(at_once, "at_once")
    noise, arrays = WriteNoise(sigma_siemens, seed, mapping), _arrays(model)
    if any(array.probes for _, array in arrays):
        at_once = 1
    outputs: list[Tensor] = []
    with _evaluating(model):
        while len(outputs) < chips:
            numbers = range(len(outputs), min(len(outputs) + at_once, chips))
            drawn = [noise.of(arrays, chip) for chip in numbers]
            together = _together(model, inputs, arrays, drawn) if at_once > 1 else None
            if together is None:
                at_once = 1
                together = [_alone(model, inputs, arrays, seen) for seen in drawn]
            outputs.extend(together)
    return torch.stack(outputs)


@dataclass(frozen=True)
class WriteNoise:
    """Errors of the cells of a series of chips.

    Args:
        sigma_siemens: Their standard deviation, 0 or more.
        seed: Of the series, 0 or more.
        mapping: Cells and window of layers whose programming does not say.
    Raises:
        ConfigurationError: The deviation or the seed is negative or not a number.

    Example:
        >>> WriteNoise(sigma_siemens=5e-6, seed=0).generator(chip=3).initial_seed() > 0
        True
    """

    sigma_siemens: float
    seed: int = 0
    mapping: ConductanceMapping | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma_siemens) and self.sigma_siemens >= 0.0):
            raise ConfigurationError(
                "write noise: expected sigma_siemens of 0 S or more, got "
                f"{self.sigma_siemens!r}. 5 µS are 5e-6."
            )
        if self.seed < 0:
            raise ConfigurationError(f"write noise: expected a seed of 0 or more, got {self.seed}.")

    def generator(self, chip: int) -> torch.Generator:
        """Source of one chip's errors.

        Args:
            chip: Its number, 0 or more.
        Raises:
            ConfigurationError: The number is negative.
        """
        if chip < 0:
            raise ConfigurationError(f"write noise: expected a chip of 0 or more, got {chip}.")
        words = np.random.SeedSequence((self.seed, chip)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))

    def of(self, arrays: Sequence[tuple[str, FrozenTileArray]], chip: int) -> list[TileTensors]:
        """What the arrays of a model hold on one chip.

        Args:
            arrays: With the names of their layers.
            chip: Its number, 0 or more.
        Raises:
            StageError: Nobody says how the weights of an array are mapped to cells.
            ConfigurationError: The number is negative.
        """
        generator = self.generator(chip)
        return [self._array(name, array, generator) for name, array in arrays]

    def _array(self, name: str, array: FrozenTileArray, generator: torch.Generator) -> TileTensors:
        mapping = array.programming.mapping or self.mapping
        if mapping is None:
            raise StageError(
                f"layer '{name}': expected to know the cells of a weight and their window, got an "
                f"array frozen as '{array.programming.source}'. Pass mapping=chip.mapping."
            )
        conductance, scale = array.programmed.conductance.clone(), array.programmed.scale.clone()
        for index, position in enumerate(array.positions()):
            held = array.programmed.tile(array.blocks, position)
            error = self._error(_positions(array, index, held, mapping), mapping, generator)
            weight = held.conductance[0].T + error.to(held.conductance)
            array.blocks.put(conductance, scale, position, weight, held.scale[0, 0])
        return replace(array.programmed, conductance=conductance)

    def _error(
        self, positions: Tensor, mapping: ConductanceMapping, generator: torch.Generator
    ) -> Tensor:
        """Error of normalised weights whose cells are at some positions of the window."""
        drawn = torch.randn(positions.shape, generator=generator)
        moved = positions + drawn * (self.sigma_siemens / mapping.half_width_siemens)
        within = torch.clamp(moved, positions.clamp(max=-1.0), positions.clamp(min=1.0))
        return mapping.weights(within - positions)


def _positions(
    array: FrozenTileArray, index: int, held: TileTensors, mapping: ConductanceMapping
) -> Tensor:
    """Where the cells of a tile are, ``(cells_per_weight, out_size, rows)``, on the CPU."""
    if array.programming.cells:
        return mapping.to_positions(array.programming.cells[index].siemens).float()
    return mapping.positions(held.conductance[0].T.cpu())


def _arrays(model: nn.Module) -> list[tuple[str, FrozenTileArray]]:
    arrays = [(plain_name(name), layer.analog_module) for name, layer in required_layers(model)]
    for name, array in arrays:
        if array.tensors is not array.programmed:
            raise StageError(
                f"layer '{name}': expected an array that is read as it was programmed, got one "
                f"that is read as another chip, or {array.seconds:g} s later. Leave the block of "
                "noisy_chips first, or call drift_(model, 0.0)."
            )
    return arrays


@contextmanager
def _showing(
    arrays: Sequence[tuple[str, FrozenTileArray]], seen: Sequence[TileTensors]
) -> Iterator[None]:
    try:
        for (_, array), tensors in zip(arrays, seen, strict=True):
            array.show_at(0.0, tensors)
        yield
    finally:
        for _, array in arrays:
            array.show_at(0.0, None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards every module is in the mode it was in.

    Args:
        model: Any model.

    Example:
        >>> model = nn.Sequential(nn.Dropout()).train()
        >>> with _evaluating(model):
        ...     print(model[0].training)
        False
        >>> model[0].training
        True
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Run a model and take its logits.

    Args:
        model: Gives a tensor, or an object with ``logits``.
        inputs: A tensor, or a tuple or dict of arguments.

    Example:
        >>> _logits_of(nn.Identity(), (torch.ones(2),))
        tensor([1., 1.])
    """
    if isinstance(inputs, dict):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def _alone(
    model: nn.Module,
    inputs: Any,
    arrays: Sequence[tuple[str, FrozenTileArray]],
    seen: Sequence[TileTensors],
) -> Tensor:
    with _showing(arrays, seen):
        return _logits_of(model, inputs)


def _together(
    model: nn.Module,
    inputs: Any,
    arrays: Sequence[tuple[str, FrozenTileArray]],
    drawn: Sequence[Sequence[TileTensors]],
) -> Sequence[Tensor] | None:
    """Outputs of several chips from one pass; None if the model knows no such pass.

    Each array is told apart by chip: adding a zero that differs by chip makes ``vmap`` hand all
    chips' vectors to the array, chip by chip, even where they are still equal.
    """
    zeros = torch.zeros(len(drawn), device=arrays[0][1].device)

    def run(zero: Tensor) -> Tensor:
        with ExitStack() as undo:
            for _, array in arrays:
                hook = array.register_forward_pre_hook(partial(_add, zero))
                undo.callback(hook.remove)
            return _logits_of(model, inputs)

    with ExitStack() as undo:
        for index, (_, array) in enumerate(arrays):
            undo.callback(setattr, array, "engine", array.engine)
            array.engine = _ManyChips(array.engine, [seen[index] for seen in drawn])
        try:
            outputs: Tensor = torch.func.vmap(run, randomness="different")(zeros)
        except (RuntimeError, NotImplementedError):
            return None  # a mistake of the model's own comes up again, chip by chip
    return list(outputs)


def _add(zero: Tensor, array: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] + zero.to(args[0].dtype), *args[1:])


@dataclass(frozen=True, eq=False)
class _ManyChips:
    """An engine whose vectors belong to several chips, chip by chip.

    Args:
        one: Reads the array of one chip.
        chips: What the array holds on each chip.
    """

    one: Engine
    chips: Sequence[TileTensors]
    name: str = "many chips"
    reason: str = "reads several chips in one pass"

    def read(
        self,
        x: Tensor,
        tensors: TileTensors,
        blocks: Blocks,
        probes: tuple[ReadProbe, ...] = (),
    ) -> Tensor:
        """Read the array of every chip, each for its own vectors."""
        own = x.unflatten(0, (len(self.chips), -1))
        if isinstance(self.one, FusedEngine) and stackable(tensors, self.one.io):
            return many_chips_mvm(own, self.chips, blocks, self.one.io).flatten(0, 1)
        parts = zip(own, self.chips, strict=True)
        return torch.cat([self.one.read(part, held, blocks, probes) for part, held in parts])

    def read_back(self, grad: Tensor, tensors: TileTensors, blocks: Blocks) -> Tensor:
        """Read backwards; nobody trains many chips at once, but torch may ask."""
        own = zip(grad.unflatten(0, (len(self.chips), -1)), self.chips, strict=True)
        return torch.cat([self.one.read_back(part, held, blocks) for part, held in own])

    def finish(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """What the periphery of one chip does."""
        return self.one.finish(y, bias)

    def refill(self, grid: TileGrid) -> None:
        """As the engine of one chip."""
        self.one.refill(grid)

    def for_tile(self, index: int) -> Engine:
        """As the engine of one chip."""
        return self.one.for_tile(index)


def _require_chips(count: int, name: str = "chips") -> None:
    if count < 1:
        raise ConfigurationError(f"write noise: expected {name} of 1 or more, got {count}.")
