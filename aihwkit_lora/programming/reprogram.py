"""Writing frozen arrays on purpose, with every pulse counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.chips.write_policy import WritePolicy
from aihwkit_lora.errors import ConfigurationError, StageError, UnsupportedTileError
from aihwkit_lora.metering.ledger import Ledger
from aihwkit_lora.programming.program import record
from aihwkit_lora.programming.report import LayerProgramming, ProgramReport, layer_programming
from aihwkit_lora.programming.write_verify import WriteResult
from aihwkit_lora.programming.writer import WriteLevel, Writer
from aihwkit_lora.tiles.array import FrozenTileArray
from aihwkit_lora.tiles.freeze import frozen_layers, plain_name
from aihwkit_lora.tiles.layers import FrozenLayer
from aihwkit_lora.tiles.record import Cells, Programming

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@dataclass(frozen=True, eq=False)
class _Rewritten:
    layer: FrozenLayer
    array: FrozenTileArray
    report: LayerProgramming


def reprogram_(
    model: nn.Module,
    chip: Chip,
    targets: Mapping[str, Tensor] | None = None,
    *,
    ledger: Ledger | None = None,
    phase: str = "reprogram",
    seed: int | None = None,
    policy: WritePolicy | None = None,
    level: WriteLevel = "simulated",
) -> ProgramReport:
    """Write new weights into frozen arrays, cell by cell, from where the cells stand now.

    This is the one way to change a frozen model, and the path of every baseline. Cells that are
    in tolerance already cost one verification and no pulse, and so do cells that have failed
    before, until their target moves by more than the tolerance. A tile whose new weights no longer
    fit into the window is mapped anew, which usually moves all of its cells.

    Args:
        model: A frozen model, plain or wrapped by PEFT.
        chip: Conductance window and write policy.
        targets: New logical weights by layer name (as in ``target_modules(model)``), in the shape
            of the layer's ``weight``. A bias on the array stays as it is. If None, the active
            LoRA adapters are consolidated: their sum is written into the arrays and they start
            over from zero.
        ledger: Counts are added to it, by layer, under ``phase``.
        phase: Name of the phase in the ledger.
        seed: Seed of all pulses; drawn from torch's generator if None.
        policy: Write policy instead of the chip's.
        level: How counts come about, see ``program_``.
    Returns:
        Pulses, verify reads, failed cells and residual error per layer.
    Raises:
        StageError: There is no frozen layer of that name, no adapter to consolidate, or the
            layer's cells are unknown because it was not programmed by ``program_``.
        ConfigurationError: A target has another shape, or there is no such level.
        UnsupportedTileError: An adapter is more than a sum of plain LoRA branches.
        SealError: The model has sealed adapters, which belong to the arrays as they are.

    Example:
        >>> import aihwkit_lora as al
        >>> chip = al.chips.get("rm-180nm")
        >>> model = al.convert(nn.Sequential(nn.Linear(3, 2, bias=False)), chip)
        >>> _ = al.program_(model, chip, seed=0)
        >>> model = al.freeze_(model)
        >>> report = al.reprogram_(model, chip, {"0": 0.5 * model[0].weight}, seed=1)
        >>> report.pulses > 0
        True
    """
    layers = {plain_name(name): layer for name, layer in frozen_layers(model)}
    if not layers:
        raise StageError(
            f"{type(model).__name__}: expected frozen layers to write, got none. Call "
            "program_(model, chip) for a model that is not frozen."
        )
    adapters = _adapters(model) if targets is None else {}
    wanted = _consolidated(adapters) if targets is None else targets
    if unknown := sorted(set(wanted) - set(layers)):
        raise StageError(
            f"expected targets for frozen layers, got '{unknown[0]}'. Known: {', '.join(layers)}."
        )
    for module in model.modules():
        # Other arrays would no longer be those that a sealed adapter was made for.
        if refuse := getattr(module, "refuse_rewriting", None):
            refuse("reprogram_")
    writer = Writer.of(chip, policy=policy, level=level, seed=seed)
    written = [
        _rewrite(name, layers[name], target, chip, writer) for name, target in wanted.items()
    ]
    for part in written:
        part.layer.analog_module = part.array
    _start_over(adapters)
    report = ProgramReport(chip=chip, layers=tuple(part.report for part in written))
    record(report, ledger, phase)
    return report


def _adapters(model: nn.Module) -> dict[str, LoraLayer]:
    """LoRA wrappers of frozen layers that have an active adapter, by plain name."""
    # Importing PEFT takes seconds, and only whoever has adapters needs it.
    from peft.tuners.lora import LoraLayer

    found = {
        plain_name(f"{name}.base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and isinstance(module.get_base_layer(), FrozenLayer)
        and not module.disable_adapters
        and _active(module)
    }
    if not found:
        raise StageError(
            f"{type(model).__name__}: expected active LoRA adapters to consolidate, got none. "
            "Activate them, or pass targets={layer: weight}."
        )
    return found


def _consolidated(adapters: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    targets = {}
    for name, wrapper in adapters.items():
        variants = getattr(wrapper, "lora_variant", {})
        weight = torch.as_tensor(wrapper.get_base_layer().weight)
        for adapter in _active(wrapper):
            if adapter in variants:
                raise UnsupportedTileError(
                    f"layer '{name}', adapter '{adapter}': expected plain LoRA to consolidate, "
                    f"got {type(variants[adapter]).__name__}. Pass targets={{layer: weight}}."
                )
            # Every kind of LoraLayer around a weight has it.
            delta = wrapper.get_delta_weight(adapter)  # type: ignore[attr-defined]
            weight = weight + delta.detach()
        targets[name] = weight
    return targets


def _active(wrapper: LoraLayer) -> list[str]:
    return [adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A]


def _start_over(adapters: Mapping[str, LoraLayer]) -> None:
    for wrapper in adapters.values():
        for adapter in _active(wrapper):
            nn.init.zeros_(cast(nn.Linear, wrapper.lora_B[adapter]).weight)


def _rewrite(
    name: str, layer: FrozenLayer, target: Tensor, chip: Chip, writer: Writer
) -> _Rewritten:
    array = layer.analog_module
    known = array.programming
    _require_writable(name, layer, target)
    conductance, scale = array.programmed.conductance.clone(), array.programmed.scale.clone()
    blocks = array.blocks
    cells, goals, results = [], [], []
    parts = zip(known.cells, array.positions(), _split(target, array), strict=True)
    for tile, position, part in parts:
        wanted, scale_now = part.detach().float().cpu(), array.tile(*position)[1]
        normalised, factor = _normalised(wanted, scale_now, tile, writer.policy, chip.scaling)
        goal = _goal(normalised, tile, writer.policy)
        after, result = _rewrite_tile(tile, goal, writer)
        blocks.put(conductance, scale, position, after.weight, factor)
        cells.append(after)
        goals.append(goal)
        results.append(result)
    programming = Programming(source=chip.name, mapping=known.mapping, cells=tuple(cells))
    successor = array.rewritten(conductance, scale, programming)
    return _Rewritten(layer, successor, layer_programming(name, cells, goals, results))


def _rewrite_tile(tile: Cells, goal: Tensor, writer: Writer) -> tuple[Cells, WriteResult]:
    within_reach = tile.reachable(goal, writer.policy.tolerance)
    result = writer.write(within_reach, tile.state, tile.response, tile.encoding)
    untried = within_reach != goal
    failed = result.failed | untried
    after = Cells(
        tile.response,
        result.state,
        tile.encoding,
        # A cell that was not tried keeps the goal that it failed to reach.
        torch.where(untried, tile.goal, goal),
        failed,
        tile.wear + result.pulses,
    )
    return after, replace(result, failed=failed)


def _require_writable(name: str, layer: FrozenLayer, target: Tensor) -> None:
    expected = layer.weight_shape
    if tuple(target.shape) != expected:
        raise ConfigurationError(
            f"layer '{name}': expected a target of shape {expected}, got {tuple(target.shape)}."
        )
    if not layer.analog_module.programming.cells:
        raise StageError(
            f"layer '{name}': expected cells that program_ has programmed, got an array frozen as "
            f"'{layer.analog_module.programming.source}'. Call thaw_(model), program_(model, "
            "chip) and freeze_(model) first."
        )


def _split(target: Tensor, array: FrozenTileArray) -> list[Tensor]:
    rows, held = target.detach().flatten(1), array.logical_bias()
    if held is not None:
        rows = torch.cat([rows.to(held), held[:, None]], dim=1)
    columns = rows.split(array.blocks.in_sizes, dim=1)
    return [part for column in columns for part in column.split(array.blocks.out_sizes, dim=0)]


def _normalised(
    weight: Tensor,
    scale: Tensor,
    tile: Cells,
    policy: WritePolicy,
    scaling: Literal["tile", "column"],
) -> tuple[Tensor, Tensor]:
    """Normalised weights and output scales; the present scales wherever the weights fit.

    Cells that need not move fit by definition: some verified, or failed, beyond the window's end.
    """
    present = scale.detach().float().cpu()
    normalised = weight / present[:, None]
    within = normalised.abs() <= 1.0 + tile.encoding.weight_tolerance(policy.tolerance)
    fits = (within | _there(normalised, tile, policy)).all(1)
    if scaling == "tile":
        fits = fits.all().expand_as(fits)
    largest = weight.abs().amax(1)
    if scaling == "tile":
        largest = largest.max().expand_as(largest)
    factor = torch.where(fits, present, largest)
    return weight / factor[:, None], factor


def _goal(normalised: Tensor, tile: Cells, policy: WritePolicy) -> Tensor:
    """Wanted cell states. The pairs of a weight that is where it is wanted stay as they are.

    Split anew, such a weight would ask one cell to make up for the error of the other.
    """
    goal = tile.encoding.to_states(normalised)
    if tile.encoding.mapping.pairs == 0:
        return goal
    return torch.where(_there(normalised, tile, policy), tile.state.apparent, goal)


def _there(normalised: Tensor, tile: Cells, policy: WritePolicy) -> Tensor:
    return (normalised - tile.weight).abs() <= tile.encoding.weight_tolerance(policy.tolerance)
