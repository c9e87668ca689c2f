"""What jobs share whose model names people: groups of them, and chips that err or age."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from aihwkit_lora.chips import Chip
from aihwkit_lora.recipes.drift_over_time import drift_on
from aihwkit_lora.recipes.noise_sweep import NoiseSweep, noise_sweep
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.staged_job import StagedJob
from aihwkit_lora.tiles.write_noise import noisy_chips


class Named(Protocol):
    """Whom a model names, and what it is tested on."""

    @property
    def test(self) -> Any:
        """Labelled samples that can be cut down to a few of each label."""
        ...

    @property
    def forgotten(self) -> int:
        """Label of who is forgotten."""
        ...

    @property
    def kept(self) -> tuple[int, ...]:
        """Labels of who stays."""
        ...

    @property
    def new(self) -> int:
        """Label of who joins."""
        ...


class Erring(Protocol):
    """Options that say how chips err."""

    @property
    def seed(self) -> int:
        """Of the series of chips."""
        ...

    @property
    def noise_chips(self) -> int:
        """Chips at each level of write noise."""
        ...

    @property
    def drift_repeats(self) -> int:
        """Draws of the fate of all cells."""
        ...

    @property
    def restore_microsiemens(self) -> float:
        """Write noise of the chip that is restored."""
        ...


class ClassifierJob(StagedJob):
    """The stages of a run whose model names people.

    Args:
        chip: Where the model runs, and whose prices hold.
        folder: Where stages, logs and pictures go.
        named: Whom the model names.
        erring: How chips err.
        shown: Test samples of each person, at most, that erring chips are shown.
    """

    def __init__(
        self, chip: Chip, folder: RunFolder, named: Named, erring: Erring, *, shown: int
    ) -> None:
        super().__init__(chip, folder)
        self._named, self._erring, self._shown = named, erring, shown

    def drift(self, base: nn.Module, adapted: nn.Module) -> Finished:
        """Let a year pass, or say why nobody knows what that would do: ``drift.json``."""
        start, test = time.perf_counter(), self._named.test.few(self._shown)
        sweep = drift_on(
            self.chip,
            {"base": base, "hybrid": adapted},
            test.inputs,
            test.labels,
            groups=self._groups,
            repeats=self._erring.drift_repeats,
            seed=self._erring.seed,
        )
        return self._looked_at("drift", adapted, start, sweep)

    def _noise_sweep(
        self, base: nn.Module, adapted: nn.Module, sigmas_microsiemens: tuple[float, ...]
    ) -> NoiseSweep:
        """See what write noise costs, with adapters and without."""
        test = self._named.test.few(self._shown)
        return noise_sweep(
            {"base": base, "hybrid": adapted},
            test.inputs,
            test.labels,
            groups=self._groups,
            sigmas_microsiemens=sigmas_microsiemens,
            chips=self._erring.noise_chips,
            seed=self._erring.seed,
            mapping=self.chip.mapping,
        )

    def _noisy(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The chip that is restored: the first of the series."""
        sigma = 1e-6 * self._erring.restore_microsiemens
        seed, mapping = self._erring.seed, self.chip.mapping
        return noisy_chips(model, sigma_siemens=sigma, seed=seed, mapping=mapping)

    @property
    def _groups(self) -> dict[str, tuple[int, ...]]:
        named = self._named
        return {"forget": (named.forgotten,), "retain": named.kept, "new": (named.new,)}
