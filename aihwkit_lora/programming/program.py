"""Programming models: every cell by write–verify, every pulse and read counted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

from aihwkit.simulator.tiles.module import TileModule
from torch import Tensor, nn

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.chips.mapping import CellEncoding
from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import StageError, UnsupportedTileError
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.programming.report import LayerProgramming, ProgramReport, layer_programming
from aihwkit_lora.programming.response import PulseResponse
from aihwkit_lora.programming.writer import WriteLevel, Writer
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
    level: WriteLevel = "simulated",
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
        level: How counts come about: ``"simulated"`` pulse by pulse; ``"sampled"`` from the
            chip's statistics of pulses, with the errors of its programming noise; ``"mean"``, the
            same number of pulses for every cell that needs any, and no errors.
    Returns:
        Pulses, verify reads, failed cells and residual error per layer.
    Raises:
        StageError: There is nothing to program, or a layer is frozen. Call ``thaw_(model)`` first,
            or ``reprogram_`` to write frozen arrays.
        UnsupportedTileError: A layer or its device cannot be programmed.
        ConductanceWindowError: A weight does not fit into the chip's window.
        ConfigurationError: There is no such level.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(40, 30, bias=False)), chip)
        >>> report = al.program_(model, chip, seed=0)
        >>> report.layers[0].counts["programmed_cells"], report.pulses > 1200
        (1200, True)
    """
    writer = Writer.of(chip, policy=policy, level=level, seed=seed)
    written = []
    for name, layer in analog_layers(model):
        if isinstance(layer, FrozenLayer):
            raise StageError(
                f"layer '{name}': expected an unfrozen layer, got a frozen one. Call "
                "thaw_(model) first, or reprogram_(model, chip) to write frozen arrays."
            )
        written.append(_write_layer(TileGrid(layer, name), chip, writer))
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
    for layer in report.layers:
        if ledger is not None:
            ledger.add(layer.counts, phase=phase, layer=layer.layer)
        _warn_of_failures(layer)
        _warn_of_wear(layer, report.chip)


def _warn_of_failures(layer: LayerProgramming) -> None:
    failed, programmed = layer.counts["failed_cells"], layer.counts["programmed_cells"]
    # Ten cells, so that a layer of a handful of cells does not cry wolf.
    if failed > max(10, _WORTH_A_WARNING * programmed):
        warnings.warn(
            f"layer '{layer.layer}': {failed} of {programmed} cells did not reach their target. "
            "Raise max_pulses or tolerance of the write policy, or use a device with a wider "
            "range.",
            stacklevel=4,
        )


def _warn_of_wear(layer: LayerProgramming, chip: Chip) -> None:
    endurance = chip.endurance_pulses
    if endurance is not None and layer.most_worn > endurance.value:
        warnings.warn(
            f"layer '{layer.layer}': a cell has taken {layer.most_worn} pulses, more than the "
            f"{endurance.value:.3g} ({endurance.status}) that cells of '{chip.name}' are taken to "
            "survive. Write less often, or set endurance_pulses of the chip.",
            stacklevel=4,
        )


def _write_layer(grid: TileGrid, chip: Chip, writer: Writer) -> _Written:
    encoding = _encoding(grid, chip)
    known: Programming | None = getattr(grid.layer, PROGRAMMING, None)
    if known is not None and known.digest != grid.weight_digest():
        known = None
    cells, goals, results = [], [], []
    for index, (tile, weight) in enumerate(
        zip(grid.each(), _wanted(grid, chip, known), strict=True)
    ):
        goal = encoding.to_states(weight)
        response = _response(grid, tile, tuple(goal.shape), writer)
        result = writer.write(goal, response.fresh(writer.generator), response, encoding)
        # Only the cells of a pulsed tile are the ones of last time.
        before = known.cells[index].wear if known is not None and grid.pulsed else 0
        wear = result.pulses + before
        cells.append(Cells(response, result.state, encoding, goal, result.failed, wear))
        goals.append(goal)
        results.append(result)
    return _Written(grid, tuple(cells), layer_programming(grid.name, cells, goals, results))


def _encoding(grid: TileGrid, chip: Chip) -> CellEncoding:
    """A pulsed tile brings its own cells, one per weight, whose states are the weights."""
    if grid.pulsed:
        return CellEncoding(mapping=chip.mapping.single_ended())
    return chip.encoding


def _wanted(grid: TileGrid, chip: Chip, known: Programming | None) -> list[Tensor]:
    """Normalised weights to program, tile by tile: what the tiles hold, without old errors."""
    if known is not None:
        return [cells.wanted_weight for cells in known.cells]
    weights = [tile_weight(tile) for tile in grid.each()]
    for weight in weights:
        chip.mapping.require_fits(weight, grid.name)
    return weights


def _response(
    grid: TileGrid, tile: TileModule, shape: tuple[int, ...], writer: Writer
) -> PulseResponse:
    policy = writer.policy
    if not grid.pulsed:
        return PulseResponse.draw(
            policy.device(), shape, writer.generator, abrupt_reset=policy.abrupt_reset
        )
    try:
        own = PulseResponse.from_tile(tile)
    except UnsupportedTileError as error:
        raise UnsupportedTileError(f"layer '{grid.name}': {error}") from error
    return replace(own, parameters={k: v[None] for k, v in own.parameters.items()})


def _store(written: _Written, chip: Chip) -> None:
    grid = written.grid
    for tile, cells in zip(grid.each(), written.cells, strict=True):
        if grid.pulsed:
            hold_cells(tile, cells)
        else:
            hold(tile, cells.weight)
    programming = Programming(
        source=chip.name,
        mapping=written.cells[0].encoding.mapping,
        cells=written.cells,
        digest=grid.weight_digest(),
    )
    setattr(grid.layer, PROGRAMMING, programming)
