"""What a new last layer can still read from a model's features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.registry import nearest
from aihwkit_lora.unlearning.metrics.checks import finite
from aihwkit_lora.unlearning.metrics.evaluation import Batch, evaluating, logits_of


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
) -> float:
    """Accuracy of a linear classifier that an attacker trains on hidden features.

    Logistic regression (L2, C = 1) on standardised features; the accuracy on test samples, from 0
    to 1. Ideal: the value of a retrained model, which is well above chance. To ask about the
    forgotten classes alone train on all of them and pass test samples of those classes.

    Source: arXiv:2604.08271.

    Args:
        train_features: Shape ``(N, features)``; see :func:`collect_features`.
        train_labels: Shape ``(N,)``, two classes or more.
        test_features: Shape ``(M, features)``.
        test_labels: Shape ``(M,)``.
    Raises:
        DataError: Shapes do not fit, a feature is not finite, or there is only one class.

    Example:
        >>> features, labels = torch.tensor([[0.0], [0.1], [1.0], [1.1]]), torch.arange(4) // 2
        >>> linear_probe(features, labels, features, labels)
        1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = finite("train_features", train_features, dimensions=2, at_least=2)
    test = finite("test_features", test_features, dimensions=2)
    _check_labels("train", train, train_labels)
    _check_labels("test", test, test_labels)
    _check_pair(train, train_labels, test)
    probe: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    probe.fit(train.cpu().numpy(), train_labels.cpu().numpy())
    return float(probe.score(test.cpu().numpy(), test_labels.cpu().numpy()))


def _check_labels(kind: str, features: Tensor, labels: Tensor) -> None:
    if labels.shape != features.shape[:1]:
        raise DataError(
            f"{kind}_labels: expected shape ({len(features)},), one for each row of "
            f"{kind}_features, got {tuple(labels.shape)}."
        )


def _check_pair(train: Tensor, labels: Tensor, test: Tensor) -> None:
    if len(labels.unique()) < 2:
        raise DataError(
            f"train_labels: expected two classes or more, got only {int(labels[0])}. Add samples "
            "of another class."
        )
    if test.shape[1] != train.shape[1]:
        raise DataError(
            f"test_features: expected {train.shape[1]} features as in train_features, got "
            f"{test.shape[1]}."
        )


def collect_features(
    model: nn.Module,
    layer: str,
    batches: Iterable[Batch],
    *,
    inputs: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run a model over batches and keep what one of its layers gives.

    The model is left as it was. A layer that runs several times in a pass counts with its last one.

    Args:
        model: Any model.
        layer: Name in ``model.named_modules()``.
        batches: Inputs and targets on the model's device.
        inputs: Keep what goes into the layer, such as the features in front of the last layer.
        seed: Of read noise.
    Returns:
        Features, flattened to ``(N, features)``, and targets, ``(N,)``, on the CPU.
    Raises:
        ConfigurationError: The model has no such layer.
        DataError: There is no batch, or the model does not run the layer.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
        >>> batch = (torch.tensor([[-1.0, 0.0, 1.0]]), torch.tensor([0]))
        >>> collect_features(model, "1", [batch], inputs=True)
        (tensor([[0., 0., 1.]]), tensor([0]))
    """
    layers = dict(model.named_modules())
    if layer not in layers:
        raise ConfigurationError(f"layer '{layer}': not in this model. {nearest(layer, layers)}")
    seen: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        value = given[0] if inputs else output
        first = value[0] if isinstance(value, tuple) else value
        seen[:] = [first.detach().flatten(start_dim=1).cpu()]

    features, labels = [], []
    hook = layers[layer].register_forward_hook(keep)
    try:
        with evaluating(model, seed=seed):
            for given, target in batches:
                logits_of(model, given)
                features += seen
                labels.append(target.cpu())
                seen.clear()
    finally:
        hook.remove()
    if not features:
        raise DataError(
            f"layer '{layer}': expected the model to run it, got nothing from {len(labels)} "
            "batches. Pass a batch or more, and a layer that the model calls."
        )
    return torch.cat(features), torch.cat(labels)
