"""Interference-free low-rank adaptation: new adapters do not see what earlier tasks look like."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aihwkit_lora.continual.objectives.catalogue import register
from aihwkit_lora.continual.objectives.objective import Data, Penalised
from aihwkit_lora.errors import ConfigurationError, DataError, StageError, UnsupportedTileError
from aihwkit_lora.unlearning.objectives.terms import run
from aihwkit_lora.unlearning.reference import adapted_layers, adapters_in_training

InputSpace = dict[str, Tensor]
"""By name of the layer: an orthonormal basis of old inputs, shape ``(inputs, directions)``."""


@register
@dataclass(frozen=True, kw_only=True)
class InfLoRA(Penalised):
    """Fix A to directions of the new inputs that are orthogonal to old inputs; train B only.

    :meth:`prepare_` runs the model once over the new data and takes ``H = Xᵀ X / n`` of each
    layer's inputs. With M, an orthonormal basis of old inputs, A becomes the top singular vectors
    of ``H − M Mᵀ H``, divided by √3, and is fixed. On inputs within the span of M the new adapter
    then adds nothing. :meth:`finish_` extends M by the fewest directions of H with which it holds
    ``threshold`` of ``‖H‖²``. (The authors store the complement of M once that is smaller, which
    saves memory and changes nothing else.) Linear layers only.

    Args:
        threshold: Share of ‖H‖² that M holds after a task, above 0 and up to 1.
        space: M of each layer; grows with each task.
    """

    name: ClassVar[str] = "inflora"
    summary: ClassVar[str] = "Fix A to directions that old inputs lack, train B only"
    formula: ClassVar[str] = "CE; A = U_r(H − M Mᵀ H)ᵀ/√3 fixed"
    source: ClassVar[str] = "Liang and Li 2024, arXiv:2404.00228"
    threshold: float = 0.95
    space: InputSpace = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the threshold."""
        super().__post_init__()
        self.require("threshold", "above 0 and up to 1", 0 < self.threshold <= 1)

    def prepare_(self, model: nn.Module, data: Data = ()) -> None:
        """Set and fix A of the adapter in training, in every layer that has it.

        Raises:
            StageError: Not exactly one adapter is in training.
            DataError: There is no sample.
            UnsupportedTileError: The adapter sits on a layer that is not linear.
            ConfigurationError: Old inputs leave fewer directions than the rank.
        """
        adapter = _only_one(model)
        layers = {name: layer for name, layer in adapted_layers(model) if adapter in layer.r}
        # Everything is known to work before the first layer is changed.
        chosen = {
            name: self._directions(name, layers[name].r[adapter], moment)
            for name, moment in second_moments(model, data).items()
            if name in layers
        }
        for name, directions in chosen.items():
            weight = layers[name].lora_A[adapter].weight
            with torch.no_grad():
                weight.copy_(directions.T / math.sqrt(3))
            weight.requires_grad_(False)
            weight.grad = None

    def finish_(self, model: nn.Module, data: Data = ()) -> None:
        """Count the task's inputs, as its trained layers see them, among the old ones.

        Raises:
            DataError: There is no sample.
            UnsupportedTileError: An adapter sits on a layer that is not linear.
        """
        for name, moment in second_moments(model, data).items():
            basis = self.space.get(name, moment[:, :0])
            self.space[name] = extended(basis, moment, self.threshold)

    def _directions(self, name: str, rank: int, moment: Tensor) -> Tensor:
        basis = self.space.get(name, moment[:, :0])
        left = moment - basis @ (basis.T @ moment)
        vectors, values, _ = torch.linalg.svd(left)
        # Directions without any weight in them are rounding errors, not inputs.
        free = int((values > 1e-6 * torch.linalg.matrix_norm(moment, 2)).sum())
        if free < rank:
            raise ConfigurationError(
                f"layer '{name}': expected new inputs with at least {rank} directions that old "
                f"ones lack, one for each rank, got {free}. Lower r or threshold."
            )
        return _signed(vectors[:, :rank])


def second_moments(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Take ``Xᵀ X / n`` of what the adapted layers read; a pass over the data, reads counted.

    Args:
        model: Runs in evaluation mode.
        data: Batches of ``(inputs, …)``.
    Returns:
        By name of the layer, shape ``(inputs, inputs)``, in double precision.
    Raises:
        DataError: There is no sample.
        UnsupportedTileError: An adapted layer is not linear.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
        >>> second_moments(model, [(torch.eye(3),)])["0"].diagonal()
        tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    training = model.training
    model.eval()
    with torch.no_grad(), ExitStack() as stack:
        for name, layer in adapted_layers(model):
            _require_linear(name, layer)
            hook = layer.register_forward_pre_hook(_adding(name, sums, counts))
            stack.callback(hook.remove)
        for inputs, *_ in data:
            run(model, inputs)
    model.train(training)
    if not sums:
        raise DataError(
            "objective 'inflora': expected samples of the task, got none. Pass its data."
        )
    return {name: total / counts[name] for name, total in sums.items()}


def extended(basis: Tensor, moment: Tensor, threshold: float) -> Tensor:
    """Extend a basis by the fewest directions with which it holds a share of a matrix's square.

    Args:
        basis: Orthonormal columns, shape ``(inputs, directions)``.
        moment: Shape ``(inputs, inputs)``.
        threshold: Share of the squared Frobenius norm, above 0 and up to 1.
    Returns:
        Shape ``(inputs, directions or more)``, orthonormal columns.

    Example:
        >>> moment = torch.diag(torch.tensor([3.0, 1.0, 0.1]))
        >>> extended(moment[:, :0], moment, 0.95).shape
        torch.Size([3, 2])
    """
    left = moment - basis @ (basis.T @ moment)
    vectors, values, _ = torch.linalg.svd(left)
    total = moment.square().sum()
    held = (total - values.square().sum() + values.square().cumsum(0)) / total
    already = float((total - values.square().sum()) / total)
    if already >= threshold:
        return basis
    wanted = int((held < threshold).sum()) + 1
    # A share of exactly 1 may be missed by rounding; there are no more directions than inputs.
    wanted = min(wanted, len(moment) - basis.shape[1])
    # QR takes out what rounding left of the old directions.
    longer: Tensor = torch.linalg.qr(torch.cat([basis, vectors[:, :wanted]], dim=1)).Q
    return longer


def _adding(name: str, sums: dict[str, Tensor], counts: dict[str, int]) -> Callable[..., None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().double().flatten(0, -2)
        sums[name] = sums.get(name, 0.0) + x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    return add


def _only_one(model: nn.Module) -> str:
    names = sorted(adapters_in_training(model))
    if len(names) != 1:
        raise StageError(
            "objective 'inflora': expected one adapter in training, got "
            f"{', '.join(names) or 'none'}. Call add_adapter_(model, name, config) first."
        )
    return names[0]


def _require_linear(name: str, layer: Any) -> None:
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        raise UnsupportedTileError(
            f"layer '{name}': expected adapters on linear layers for 'inflora', got one on a "
            f"{type(base).__name__}. Leave it out of target_modules, or take another objective."
        )


def _signed(vectors: Tensor) -> Tensor:
    """Make the largest entry of each column positive, since an SVD may return either sign."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    signed: Tensor = vectors * vectors.gather(0, largest).sign()
    return signed
