"""What a conversion costs by resolution and technology, from a regression over published ADCs.

T. Andrulis, R. Chen, H.-S. Lee, J. S. Emer, V. Sze, "Modeling Analog-Digital-Converter Energy and
Area for Compute-In-Memory Accelerator Design", arXiv:2404.06553, fitted to B. Murmann's ADC
performance survey. The coefficients are those of hwcomponents-adc 1.0.21.
"""

from __future__ import annotations

import math

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.pricing import Quantity, Status

SOURCE = "hwcomponents-adc 1.0.21 (arXiv:2404.06553)"

# The best Schreier figure of merit of the survey's best fifth, in dB, linear in the bits ...
_BEST_FOM, _BEST_FOM_PER_BIT = 128.3068287398817, 3.220511510977562
# ... and the logarithm of what the survey's best fifth takes beyond it.
_LOG_ENERGY, _PER_LOG_NODE, _PER_LOG_BITS = (
    26.0496215686518,
    1.8800369206815004,
    -2.8291256050594527,
)
_BEST_FIFTH = -1.4702022133784405
# At this rate of conversions the energy begins to rise with the rate, in decibels and log hertz.
_FOM_OF_RATE, _FOM_PER_LOG_RATE = 213.7806687348118, -2.8719030399529957


def adc_energy(bits: int, node_m: float) -> Quantity:
    """Energy of one conversion, at any rate up to :func:`adc_rate_limit`.

    The published designs that this follows are the best fifth of the survey, and none of them
    shares the narrow pitch of an array's columns: take it for the low end of what can be built.

    Args:
        bits: Effective number of bits, 4 or more.
        node_m: Technology node, in metres.
    Returns:
        Joules per conversion, static energy included.
    Raises:
        ConfigurationError: Fewer than 4 bits, which the regression does not cover, or no size.

    Example:
        >>> f"{adc_energy(8, 180e-9).value * 1e12:.1f} pJ", adc_energy(8, 180e-9).source
        ('44.1 pJ', 'hwcomponents-adc 1.0.21 (arXiv:2404.06553), 8 bit at 180 nm')
    """
    _require(bits, node_m)
    ratio_db = bits * 20 * math.log10(2) + 10 * math.log10(1.5)
    ideal = 0.5 * 10 ** ((ratio_db - _best_fom(bits)) / 10)
    excess = _LOG_ENERGY + _PER_LOG_NODE * math.log(node_m * 1e9) + _PER_LOG_BITS * math.log(bits)
    picojoules = ideal * math.exp(excess + _BEST_FIFTH)
    return Quantity(
        value=picojoules * 1e-12,
        unit="J",
        source=f"{SOURCE}, {bits} bit at {node_m * 1e9:g} nm",
        status=Status.LIBRARY,
    )


def adc_rate_limit(bits: int) -> float:
    """Rate up to which :func:`adc_energy` holds, in conversions per second.

    Args:
        bits: Effective number of bits, 4 or more.

    Example:
        >>> f"{adc_rate_limit(10):.1e}"
        '1.1e+08'
    """
    return math.exp((_best_fom(bits) - _FOM_OF_RATE) / _FOM_PER_LOG_RATE)


def _best_fom(bits: int) -> float:
    return _BEST_FOM + _BEST_FOM_PER_BIT * bits


def _require(bits: int, node_m: float) -> None:
    if bits < 4:
        raise ConfigurationError(
            f"adc_energy: expected bits of 4 or more, got {bits}. The regression over published "
            "converters does not cover fewer; give a price of your own."
        )
    if not 0.0 < node_m < 1e-5:
        raise ConfigurationError(
            f"adc_energy: expected a technology node in metres, such as 130e-9, got {node_m}."
        )
