"""Baselines that train all weights: arrays written after every step, or once at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aihwkit_lora.chips import Chip
from aihwkit_lora.metering import Ledger
from aihwkit_lora.metering.macs import Macs, count_macs
from aihwkit_lora.programming.reprogram import reprogram_
from aihwkit_lora.programming.writer import seeded
from aihwkit_lora.tiles import FrozenLinear, frozen_layers


class MasterLinear(nn.Module):
    """A frozen layer and a digital master copy of its weights, which gets the gradient.

    Outputs come from the arrays; the master copy only decides what is written next.

    Args:
        frozen: The layer with the arrays.
    """

    def __init__(self, frozen: FrozenLinear) -> None:
        super().__init__()
        self.frozen = frozen
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight = nn.Parameter(torch.as_tensor(frozen.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Read the arrays; route the weight gradient to the master copy."""
        # The second term is zero. Its gradient for the weight is that of the product.
        nothing = F.linear(x.detach(), self.weight - self.weight.detach())
        y: Tensor = self.frozen(x) + nothing
        return y


@count_macs(MasterLinear)
def _count(layer: MasterLinear, output: Tensor) -> Macs:
    # The arrays do the products with weights; only the outer product is digital.
    macs = output.numel() * layer.in_features
    return Macs(forward=0, input_gradient=0, weight_gradient=macs)


def train_all_weights_(model: nn.Module) -> nn.Module:
    """Give every frozen layer of a model a trainable master copy.

    Args:
        model: A frozen model without adapters.
    Returns:
        The model itself, all of whose parameters want a gradient.
    """
    for name, layer in list(frozen_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, MasterLinear(layer))
    return model.requires_grad_(True)


class Reprogrammer:
    """Writes the master copies into the arrays, counted.

    Args:
        model: What :func:`train_all_weights_` returned.
        chip: Whose arrays they are.
        ledger: Where pulses and reads are added.
        phase: Under which name.
        seed: Seed of all pulses.
    """

    def __init__(
        self, model: nn.Module, chip: Chip, ledger: Ledger, *, phase: str, seed: int
    ) -> None:
        self._model, self._chip, self._ledger, self._phase = model, chip, ledger, phase
        self._masters = {
            f"{name}.frozen": layer
            for name, layer in model.named_modules()
            if isinstance(layer, MasterLinear)
        }
        tolerance = chip.encoding.weight_tolerance(chip.write_policy.tolerance)
        self._ends = {name: _ends(master, tolerance) for name, master in self._masters.items()}
        self._generator = seeded(seed)

    @torch.no_grad()
    def __call__(self) -> None:
        """Clip the masters to the window and write them cell by cell.

        Cells that failed beyond the window's end stay there: clipping them would retry them all.
        """
        for name, master in self._masters.items():
            limit, stuck, start = self._ends[name]
            master.weight.copy_(torch.where(stuck, start, master.weight.clamp(-limit, limit)))
        targets = {name: master.weight for name, master in self._masters.items()}
        seed = int(torch.randint(2**62, (), generator=self._generator))
        reprogram_(
            self._model, self._chip, targets, ledger=self._ledger, phase=self._phase, seed=seed
        )


def _ends(master: MasterLinear, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight at the window's end for each cell, which cells stand beyond it, and all weights."""
    limit, start = master.frozen.analog_module.largest_weight(), master.weight.detach().clone()
    return limit, start.abs() > limit * (1.0 + tolerance), start


@torch.no_grad()
def deploy_(
    master: nn.Module,
    arrays: nn.Module,
    chip: Chip,
    *,
    ledger: Ledger,
    seed: int,
    phase: str = "deploy",
) -> None:
    """Write the weights of a torch model into arrays, once, and copy what is digital.

    Args:
        master: The model in torch.
        arrays: The same model on frozen arrays; changed.
        chip: Whose arrays they are.
        ledger: Where pulses and reads are added.
        seed: Of all pulses.
        phase: Under which name they are added.

    Example:
        >>> import aihwkit_lora as al
        >>> chip, ledger = al.chips.get("rm-180nm"), al.Ledger()
        >>> master = nn.Sequential(nn.Linear(3, 2, bias=False))
        >>> arrays = al.convert(nn.Sequential(nn.Linear(3, 2, bias=False)), chip)
        >>> _ = al.program_(arrays, chip, seed=0)
        >>> deploy_(master, al.freeze_(arrays), chip, ledger=ledger, seed=1)
        >>> ledger.total(phase="deploy")["programmed_cells"]
        6
    """
    weights = dict(master.named_parameters())
    targets = {name: weights[f"{name}.weight"].detach() for name, _ in frozen_layers(arrays)}
    reprogram_(arrays, chip, targets, ledger=ledger, phase=phase, seed=seed)
    for name, parameter in arrays.named_parameters():
        if name in weights:  # a frozen layer without a bias has a parameter that holds nothing
            parameter.copy_(weights[name])
