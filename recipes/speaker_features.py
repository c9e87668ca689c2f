"""From sound, or from spikes of an artificial cochlea, to spike counts in 140 bands × 10 windows.

Sound goes through a bank of 140 mel bands every 10 ms; a band's level within the 60 dB below the
clip's peak charges an integrate-and-fire cell, and its spikes are counted in ten windows of 60 ms.
Every clip is kept at five onsets (as it is, 20 and 40 ms earlier and later), from which training
draws one at random.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aihwkit_lora.errors import DataError
from aihwkit_lora.recipes.spiking import BANDS, WINDOWS

SAMPLE_RATE_HZ = 8000
"""Samples per second of sound."""

ONSETS_MS = (0, -40, -20, 20, 40)
"""By how much a clip is shifted; the first one is the clip as it is."""

SCALE = 0.1
"""Input of the network per spike."""

_FRAME, _HOP, _FFT = 512, 80, 1024
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 3900.0
_RANGE_DB = 60.0
_FRAMES_PER_WINDOW = 6  # of 10 ms
_SPIKES_PER_WINDOW = 10.0  # of a band at the clip's peak
_MARGIN = 4  # frames before and after, for the onsets
_CHANNELS_PER_BAND = 5
_EVENT_WINDOW_MS = 100


def sound_spikes(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """Count the spikes that a cochlea makes of a sound.

    Args:
        samples: At 8 kHz, of any length and scale, shape ``(n,)``.
    Returns:
        Shape ``(onsets, windows, bands)``, 0 to 10. What lies after 0.6 s is cut off.
    Raises:
        DataError: There are no samples, or nothing but silence.

    Example:
        >>> tone = np.sin(2.0 * np.pi * 440.0 / 8000.0 * np.arange(4000))
        >>> spikes = sound_spikes(tone)
        >>> spikes.shape, int(spikes[0, 4].argmax()), int(spikes[0, 4].max())
        ((5, 10, 140), 30, 10)
    """
    levels = _levels(np.asarray(samples, dtype=np.float32))
    frames = WINDOWS * _FRAMES_PER_WINDOW
    starts = (_MARGIN - shift // 10 for shift in ONSETS_MS)
    shifted = np.stack([levels[start : start + frames] for start in starts])
    charge = np.cumsum(shifted * (_SPIKES_PER_WINDOW / _FRAMES_PER_WINDOW), axis=1)
    # Sums of 60 rounded levels: the last digits must not decide about a spike.
    fired = np.floor(charge + 1e-6)[:, _FRAMES_PER_WINDOW - 1 :: _FRAMES_PER_WINDOW]
    spikes: NDArray[np.uint8] = np.diff(fired, axis=1, prepend=0.0).astype(np.uint8)
    return spikes


def event_spikes(times_s: NDArray[Any], units: NDArray[Any]) -> NDArray[np.uint8]:
    """Count the spikes of a cochlea of 700 channels, five channels to a band, in 100 ms windows.

    Args:
        times_s: When each spike was, in seconds, shape ``(n,)``. Those after 1 s are cut off.
        units: Its channel, 0 to 699, same shape.
    Returns:
        Shape ``(onsets, windows, bands)``; counts above 255 become 255.
    Raises:
        DataError: A channel is out of range.

    Example:
        >>> spikes = event_spikes(np.array([0.05, 0.06, 0.19]), np.array([0, 4, 699]))
        >>> int(spikes[0, 0, 0]), int(spikes[0, 1, 139]), int(spikes[3, 2, 139])
        (2, 1, 1)
    """
    times_ms, bands = 1000.0 * np.asarray(times_s, dtype=float), np.asarray(units, dtype=np.int64)
    if len(bands) and not 0 <= bands.min() <= bands.max() < BANDS * _CHANNELS_PER_BAND:
        raise DataError(
            f"expected channels from 0 to {BANDS * _CHANNELS_PER_BAND - 1}, found {bands.min()} to "
            f"{bands.max()}."
        )
    spikes = np.zeros((len(ONSETS_MS), WINDOWS, BANDS), dtype=np.int64)
    for counts, shift in zip(spikes, ONSETS_MS, strict=True):
        window = np.floor((times_ms + shift) / _EVENT_WINDOW_MS).astype(np.int64)
        heard = (window >= 0) & (window < WINDOWS)
        np.add.at(counts, (window[heard], bands[heard] // _CHANNELS_PER_BAND), 1)
    return spikes.clip(max=255).astype(np.uint8)


def inputs(spikes: Tensor) -> Tensor:
    """What the network sees of clips as they are.

    Args:
        spikes: Counts, shape ``(clips, onsets, windows, bands)``.
    Returns:
        Shape ``(clips, windows, bands)``.

    Example:
        >>> inputs(torch.full((2, 5, 10, 140), 3)).amax()
        tensor(0.3000)
    """
    return SCALE * spikes[:, 0].float()


def varied(spikes: Tensor, *, kept: float = 0.8) -> Tensor:
    """What the network sees while it trains: a random onset, and some spikes lost.

    Args:
        spikes: Counts, shape ``(clips, onsets, windows, bands)``.
        kept: Probability that a spike stays, 0 to 1.
    Returns:
        Shape ``(clips, windows, bands)``.

    Example:
        >>> varied(torch.full((2, 5, 10, 140), 3), kept=1.0).amin()
        tensor(0.3000)
    """
    onset = torch.randint(spikes.shape[1], (len(spikes),))
    chosen = spikes[torch.arange(len(spikes)), onset].float()
    return SCALE * torch.binomial(chosen, torch.full_like(chosen, kept))


def _levels(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """Level of each band, 0 (60 dB below the peak, or less) to 1, shape ``(frames, bands)``."""
    frames = WINDOWS * _FRAMES_PER_WINDOW + 2 * _MARGIN
    # The first frame of the clip is centred on its first sample.
    heard = np.zeros((frames - 1) * _HOP + _FRAME, dtype=np.float32)
    start = _FRAME // 2 + _MARGIN * _HOP
    cut = samples[: len(heard) - start]
    heard[start : start + len(cut)] = cut
    slices = np.lib.stride_tricks.sliding_window_view(heard, _FRAME)[::_HOP]
    power = np.abs(np.fft.rfft(slices * _window(), _FFT)) ** 2 @ _bands().T
    loudest = power.max()
    if not loudest > 0.0:
        raise DataError(f"expected a sound, found {len(samples)} samples of silence.")
    decibels = 10.0 * np.log10(np.maximum(power / loudest, 1e-30))
    levels: NDArray[np.float64] = np.clip(1.0 + decibels / _RANGE_DB, 0.0, 1.0)
    return levels


@cache
def _window() -> NDArray[np.float64]:
    """Periodic Hann window."""
    window: NDArray[np.float64] = np.hanning(_FRAME + 1)[:-1]
    return window


@cache
def _bands() -> NDArray[np.float64]:
    """Triangles, equally wide on the mel scale, shape ``(bands, frequencies)``."""
    lowest, highest = (2595.0 * np.log10(1.0 + f / 700.0) for f in (_LOWEST_HZ, _HIGHEST_HZ))
    edges = 700.0 * (10.0 ** (np.linspace(lowest, highest, BANDS + 2) / 2595.0) - 1.0)
    frequency = np.fft.rfftfreq(_FFT, 1.0 / SAMPLE_RATE_HZ)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
    bands: NDArray[np.float64] = np.clip(np.minimum(rising, falling), 0.0, None)
    return bands
