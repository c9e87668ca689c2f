"""What jobs share whose model names people: groups of them, and chips that err or age."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from aihwkit_lora.chips import Chip
from aihwkit_lora.recipes.arm_options import ArmOptions
from aihwkit_lora.recipes.drift_over_time import drift_on
from aihwkit_lora.recipes.noise_sweep import NoiseSweep, noise_sweep
from aihwkit_lora.recipes.people import People
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.recipes.staged_job import StagedJob
from aihwkit_lora.tiles.write_noise import noisy_chips


class ClassifierJob[Options: ArmOptions, Known: People[Any]](StagedJob):
    """The stages of a run whose model names people.

    Args:
        config: Options.
        people: Whom the model names.
        chip: Where the model runs, and whose prices hold.
        folder: Where stages, logs and pictures go.
        shown: Test samples of each person, at most, that erring chips are shown.
    """

    def __init__(
        self, config: Options, people: Known, chip: Chip, folder: RunFolder, *, shown: int
    ) -> None:
        super().__init__(chip, folder)
        self.config, self.people, self._shown = config, people, shown

    def drift(self, base: nn.Module, adapted: nn.Module) -> Finished:
        """Let a year pass, or say why nobody knows what that would do: ``drift.json``."""
        start, test = time.perf_counter(), self.people.test.few(self._shown)
        sweep = drift_on(
            self.chip,
            {"base": base, "hybrid": adapted},
            test.inputs,
            test.labels,
            groups=self.people.groups,
            repeats=self.config.drift_repeats,
            seed=self.config.seed,
        )
        return self._looked_at("drift", adapted, start, sweep)

    def _noise_sweep(
        self, base: nn.Module, adapted: nn.Module, sigmas_microsiemens: tuple[float, ...]
    ) -> NoiseSweep:
        """See what write noise costs, with adapters and without."""
        test = self.people.test.few(self._shown)
        return noise_sweep(
            {"base": base, "hybrid": adapted},
            test.inputs,
            test.labels,
            groups=self.people.groups,
            sigmas_microsiemens=sigmas_microsiemens,
            chips=self.config.noise_chips,
            seed=self.config.seed,
            mapping=self.chip.mapping,
        )

    def _noisy(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The chip that is restored: the first of the series."""
        sigma = 1e-6 * self.config.restore_microsiemens
        seed, mapping = self.config.seed, self.chip.mapping
        return noisy_chips(model, sigma_siemens=sigma, seed=seed, mapping=mapping)
