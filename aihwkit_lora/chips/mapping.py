"""How weights become conductances: one cell per weight, around an offset."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aihwkit_lora.errors import ConductanceWindowError


@dataclass(frozen=True, kw_only=True)
class ConductanceMapping:
    """A window of conductances that normalised weights from -1 to 1 are spread over.

    A weight ``w`` is stored as ``G = middle + half_width · w``; a digital subtraction of
    ``middle · Σx`` takes the offset out again (code of arXiv:2601.10037: G = 50 + 30·w/max|w| µS).

    Args:
        g_min_siemens: Lower end of the window, 0 or more.
        g_max_siemens: Upper end of the window, above ``g_min_siemens``.
    Raises:
        ConductanceWindowError: The window is empty, inverted or negative.

    Example:
        >>> window = ConductanceMapping(g_min_siemens=20e-6, g_max_siemens=80e-6)
        >>> round(window.middle_siemens * 1e6), round(window.half_width_siemens * 1e6)
        (50, 30)
    """

    g_min_siemens: float
    g_max_siemens: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.g_min_siemens < self.g_max_siemens:
            raise ConductanceWindowError(
                "conductance window: expected 0 <= g_min_siemens < g_max_siemens, got "
                f"{self.g_min_siemens * 1e6:g} µS to {self.g_max_siemens * 1e6:g} µS. "
                "Swap or correct the two."
            )

    @property
    def middle_siemens(self) -> float:
        """Conductance of the weight 0."""
        return 0.5 * (self.g_min_siemens + self.g_max_siemens)

    @property
    def half_width_siemens(self) -> float:
        """Conductance between the weights 0 and 1."""
        return 0.5 * (self.g_max_siemens - self.g_min_siemens)

    def to_siemens(self, weight: Tensor) -> Tensor:
        """Conductance of normalised weights, same shape, in siemens.

        Args:
            weight: Normalised weights; -1 to 1 fills the window.
        """
        return self.middle_siemens + self.half_width_siemens * weight

    def require_fits(self, weight: Tensor, layer: str) -> None:
        """Check that every weight has a conductance within the window.

        Args:
            weight: Normalised weights of any shape.
            layer: Full name of the layer, for the error message.
        Raises:
            ConductanceWindowError: A weight is beyond -1 to 1, or not a number.
        """
        if weight.numel() == 0:
            return
        lowest, highest = float(weight.min()), float(weight.max())
        # One part in a million: aihwkit's scaling divides and multiplies in float32.
        if lowest >= -1.000001 and highest <= 1.000001:
            return
        found = [
            1e6 * (self.middle_siemens + self.half_width_siemens * w) for w in (lowest, highest)
        ]
        raise ConductanceWindowError(
            f"layer '{layer}': expected normalised weights from -1 to 1, the window "
            f"{self.g_min_siemens * 1e6:g} to {self.g_max_siemens * 1e6:g} µS, got {lowest:.3g} "
            f"to {highest:.3g}, that is {found[0]:.3g} to {found[1]:.3g} µS. Call the layer's "
            "remap_analog_weights(), or convert with rpu_config.mapping.weight_scaling_omega = 1.0."
        )
