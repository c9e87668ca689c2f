"""Models retrained without the forgotten data: made once, kept on disk, and what they cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aihwkit_lora.chips.chip import Chip
from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.metering.counts import Counts
from aihwkit_lora.metering.ledger import Ledger

PHASE = "retrain"
"""Phase of the ledger that writing retrained models is counted under."""


@dataclass(frozen=True, eq=False)
class Retrained:
    """Retrained models, and what it took to make them.

    Args:
        models: At least one, that differ in their seed.
        counts: What was counted for all of them; None if nothing was.
    """

    models: tuple[nn.Module, ...]
    counts: Counts | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrainedReferences:
    """Retrained models that are trained once and loaded from then on.

    Files are named by a hash of the configuration and the seed, so another configuration is
    another file. They hold weights only. With a chip the models are also programmed into its
    arrays, as the model under test was, each time anew from the same seed: that is what retraining
    would cost on the chip, and it is counted under the phase ``"retrain"``.

    Args:
        folder: Where weights are kept; made when needed.
        key: Whatever determines the result besides the seed, such as data, options and epochs;
            anything that JSON can hold.
        build: Makes the untrained network.
        retrain: From a seed to a trained network of that shape; it must not see the forgotten data.
        seeds: One model each; two or more give the floor of what can be expected.
        chip: What they are programmed into; None leaves them digital.
        training: What one retraining takes besides, if somebody counted it.
    Raises:
        ConfigurationError: There is no seed, one comes twice, or the key is nothing that JSON can
            hold.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> references = RetrainedReferences(
        ...     folder=folder,
        ...     key={"epochs": 3},
        ...     build=lambda: nn.Linear(3, 2),
        ...     retrain=lambda seed: nn.Linear(3, 2),
        ...     seeds=(0, 1),
        ... )
        >>> first, again = references.load(), references.load()
        >>> bool((first.models[1].weight == again.models[1].weight).all())
        True
    """

    folder: Path | str
    key: Mapping[str, Any]
    build: Callable[[], nn.Module]
    retrain: Callable[[int], nn.Module]
    seeds: Sequence[int] = (0, 1, 2)
    chip: Chip | None = None
    training: Counts | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigurationError(
                f"retrained references: expected different seeds, got {list(self.seeds)}."
            )
        _ = self.digest

    @property
    def digest(self) -> str:
        """Hash of the key, as it stands in the names of the files."""
        try:
            text = json.dumps(dict(self.key), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"retrained references: expected a key that JSON can hold, got {self.key!r} "
                f"({error}). Pass names and numbers."
            ) from error
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, ledger: Ledger | None = None) -> Retrained:
        """Train what is not there yet, load all, and program them if there is a chip.

        Args:
            ledger: Where writing them is counted.
        Raises:
            DataError: A file holds something else.
        """
        own = Ledger()
        models = tuple(self._on_chip(self._trained(seed), seed, own) for seed in self.seeds)
        counts = own.total()
        if self.training is not None:
            counts = Counts.sum([counts, *[self.training] * len(models)])
        if ledger is not None and counts:
            ledger.add(counts, phase=PHASE, layer="")
        return Retrained(models, counts or None)

    def _trained(self, seed: int) -> nn.Module:
        path = Path(self.folder) / f"retrained-{self.digest}-{seed}.pt"
        model = self.build()
        if path.exists():
            _fill(model, path)
            return model
        trained = self.retrain(seed)
        _fit(model, trained.state_dict(), path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(model.state_dict(), part)
        part.replace(path)
        return model

    def _on_chip(self, model: nn.Module, seed: int, ledger: Ledger) -> nn.Module:
        if self.chip is None:
            return model
        from aihwkit_lora.programming.program import program_
        from aihwkit_lora.tiles.convert import convert
        from aihwkit_lora.tiles.freeze import freeze_

        converted = convert(model, self.chip)
        program_(converted, self.chip, ledger=ledger, phase=PHASE, seed=seed)
        return freeze_(converted)


def _fill(model: nn.Module, path: Path) -> None:
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises whatever the broken file provokes
        raise DataError(
            f"'{path}': expected the weights of a retrained model, got a file that torch cannot "
            f"read ({type(error).__name__}). Delete it, and it is trained anew."
        ) from error
    _fit(model, stored, path)


def _fit(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(
            f"'{path}': expected weights of the network that build() makes, got others ({reason}). "
            "Let retrain() return the same network, or delete the file if build() has changed."
        ) from error
