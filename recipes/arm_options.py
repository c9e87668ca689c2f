"""What options of recipes with several baselines have in common."""

from __future__ import annotations

from aihwkit_lora.errors import ConfigurationError


class ArmOptions:
    """Which arms to run and how chips are varied; mixed into a dataclass that has the fields.

    Args:
        baseline: Whether to run baselines at all.
        baselines: Their names, with commas between them.
        noise_microsiemens: Write noise that is looked at, in µS.
        noise_chips: Simulated chips at each level of it.
        drift_repeats: How often the fate of all cells is drawn, on a chip with a drift model.
        restore_microsiemens: Write noise of the chip that is restored, in µS.
        seed: Of everything that is random.
    """

    baseline: bool
    baselines: str
    noise_microsiemens: tuple[int, ...]
    noise_chips: int
    drift_repeats: int
    restore_microsiemens: float
    seed: int

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the baselines to run, in the order given."""
        names = (name.strip() for name in self.baselines.split(","))
        return tuple(dict.fromkeys(filter(None, names))) if self.baseline else ()

    def _require(self, name: str, expected: str, satisfied: bool) -> None:
        if not satisfied:
            raise ConfigurationError(f"expected {name} {expected}, found {getattr(self, name)}.")

    def _require_sigmas(self) -> None:
        sigmas = self.noise_microsiemens
        fits = bool(sigmas) and min(sigmas) >= 0 and len(set(sigmas)) == len(sigmas)
        self._require("noise_microsiemens", "with some σ of 0 µS or more, each once", fits)
