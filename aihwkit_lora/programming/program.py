"""Programming models: every cell by write–verify, every pulse and read counted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from aihwkit.simulator.tiles.module import TileModule
from torch import Generator, Tensor, nn

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import StageError, UnsupportedTileError
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.programming.report import LayerProgramming, ProgramReport, layer_programming
from aihwkit_lora.programming.response import PulseResponse
from aihwkit_lora.programming.write_verify import write_verify
from aihwkit_lora.tiles.freeze import PROGRAMMING
from aihwkit_lora.tiles.grid import TileGrid, analog_layers, hold, hold_cells, tile_weight
from aihwkit_lora.tiles.layers import FrozenLayer
from aihwkit_lora.tiles.record import Cells, Programming

# Above this fraction of failed cells a layer does not compute what it was asked to; NeuRRAM's
# notebooks (github.com/weierwan/Neurram_48core) stay below 0.014.
_WORTH_A_WARNING = 0.10


@dataclass(frozen=True, eq=False)
class _Written:
    """One layer, written in simulation but not yet stored anywhere."""

    grid: TileGrid
    cells: tuple[Cells, ...]
    report: LayerProgramming


def program_(
    model: nn.Module,
    chip: Chip,
    *,
    ledger: Ledger | None = None,
    phase: str = "program",
    seed: int | None = None,
    policy: WritePolicy | None = None,
) -> ProgramReport:
    """Program every analogue tile by write–verify and count what it took.

    New cells are drawn for each tile, except for the tiles of a pulsed configuration: those
    describe their own cells, which are used as they are. All start freshly reset. The tiles then
    hold what the cells hold, errors and failed cells included.

    Args:
        model: Converted model. Each tile's target is the weight it holds; for a model that was
            programmed before and not changed since, the weight it was meant to hold.
        chip: Conductance window, write policy and device.
        ledger: Counts are added to it, by layer, under ``phase``.
        phase: Name of the phase in the ledger.
        seed: Seed of all cells and pulses; drawn from torch's generator if None.
        policy: Write policy instead of the chip's, for example with a larger budget for the fine
            steps of a pulsed preset.
    Returns:
        Pulses, verify reads, failed cells and residual error per layer.
    Raises:
        StageError: There is nothing to program, or a layer is frozen. Call ``thaw_(model)`` first,
            or ``reprogram_`` to write frozen arrays.
        UnsupportedTileError: A layer or its device cannot be programmed.
        ConductanceWindowError: A weight does not fit into the chip's window.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(40, 30, bias=False)), chip)
        >>> report = al.program_(model, chip, seed=0)
        >>> report.layers[0].counts["programmed_cells"], report.pulses > 1200
        (1200, True)
    """
    generator = seeded(seed)
    policy = policy or chip.write_policy
    written = []
    for name, layer in analog_layers(model):
        if isinstance(layer, FrozenLayer):
            raise StageError(
                f"layer '{name}': expected an unfrozen layer, got a frozen one. Call "
                "thaw_(model) first, or reprogram_(model, chip) to write frozen arrays."
            )
        written.append(_write_layer(TileGrid(layer, name), chip, policy, generator))
    if not written:
        raise StageError(
            f"{type(model).__name__}: expected analogue layers to program, got none. Call "
            "convert(net, chip), or aihwkit's convert_to_analog, first."
        )
    for part in written:
        _store(part, chip)
    report = ProgramReport(chip=chip, layers=tuple(part.report for part in written))
    record(report, ledger, phase)
    return report


def record(report: ProgramReport, ledger: Ledger | None, phase: str) -> None:
    """Add a report to a ledger and warn of layers where many cells failed.

    Args:
        report: What programming took.
        ledger: Where to add it; nowhere if None.
        phase: Name of the phase in the ledger.
    """
    # Ten cells, so that a layer of a handful of cells does not cry wolf.
    limit = _WORTH_A_WARNING
    for layer in report.layers:
        if ledger is not None:
            ledger.add(layer.counts, phase=phase, layer=layer.layer)
        if layer.counts["failed_cells"] > max(10, limit * layer.counts["programmed_cells"]):
            warnings.warn(
                f"layer '{layer.layer}': {layer.counts['failed_cells']} of "
                f"{layer.counts['programmed_cells']} cells did not reach their target. Raise "
                "max_pulses or tolerance of the write policy, or use a device with a wider range.",
                stacklevel=3,
            )


def seeded(seed: int | None) -> Generator:
    """Make a generator from a seed, or from torch's own generator if None.

    Several processes that train together need the same chip. Without a seed, all of them take the
    one that rank 0 draws, so all of them have to call this; each draws once from torch's generator,
    as a process that is alone does. Before ``torch.distributed`` is initialised, nobody knows of
    the others: pass a seed there.

    Args:
        seed: Any whole number.
    """
    if seed is not None:
        return Generator().manual_seed(seed)
    drawn = [int(torch.randint(2**62, ()))]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(drawn, src=0)
    return Generator().manual_seed(drawn[0])


def _write_layer(grid: TileGrid, chip: Chip, policy: WritePolicy, generator: Generator) -> _Written:
    full_scale = 1.0 if grid.pulsed else chip.state_full_scale
    cells, targets, results = [], [], []
    for tile, weight in zip(grid.each(), _wanted(grid, chip), strict=True):
        response = _response(grid, tile, tuple(weight.shape), policy, generator)
        target = weight * full_scale
        result = write_verify(target, response.fresh(generator), response, policy, generator)
        cells.append(Cells(response, result.state, full_scale, target, result.failed))
        targets.append(target)
        results.append(result)
    per_state = chip.mapping.half_width_siemens / full_scale
    report = layer_programming(grid.name, targets, results, per_state)
    return _Written(grid, tuple(cells), report)


def _wanted(grid: TileGrid, chip: Chip) -> list[Tensor]:
    """Normalised weights to program, tile by tile: what the tiles hold, without old errors."""
    known: Programming | None = getattr(grid.layer, PROGRAMMING, None)
    if known is not None and known.digest == grid.weight_digest():
        return [cells.goal / cells.full_scale for cells in known.cells]
    weights = [tile_weight(tile) for tile in grid.each()]
    for weight in weights:
        chip.mapping.require_fits(weight, grid.name)
    return weights


def _response(
    grid: TileGrid,
    tile: TileModule,
    shape: tuple[int, ...],
    policy: WritePolicy,
    generator: Generator,
) -> PulseResponse:
    if not grid.pulsed:
        return PulseResponse.draw(
            policy.device(), shape, generator, abrupt_reset=policy.abrupt_reset
        )
    try:
        return PulseResponse.from_tile(tile)
    except UnsupportedTileError as error:
        raise UnsupportedTileError(f"layer '{grid.name}': {error}") from error


def _store(written: _Written, chip: Chip) -> None:
    grid = written.grid
    for tile, cells in zip(grid.each(), written.cells, strict=True):
        if grid.pulsed:
            hold_cells(tile, cells.state.persistent, cells.response.parameters)
        else:
            hold(tile, cells.weight)
    programming = Programming(
        source=chip.name, mapping=chip.mapping, cells=written.cells, digest=grid.weight_digest()
    )
    setattr(grid.layer, PROGRAMMING, programming)
