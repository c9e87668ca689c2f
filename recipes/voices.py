"""Synthetic voices: speakers by pitch and vocal tract, words by vowels; no file is needed.

A voice is a source and a filter (Fant, "Acoustic Theory of Speech Production", 1960): the vocal
folds give a buzz whose harmonics fall off with frequency, the vocal tract's resonances, the
formants, let some of them through. Words move the formants between vowels; whose tract it is scales
all of them. The sum of harmonics is rendered directly, each as loud as the filter lets it be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aihwkit_lora.errors import ConfigurationError

SAMPLE_RATE_HZ = 8000
"""Samples per second, as of the Free Spoken Digit Dataset."""

VOWELS_HZ = np.array(
    [
        [270, 2290, 3010],  # heed
        [390, 1990, 2550],  # hid
        [530, 1840, 2480],  # head
        [660, 1720, 2410],  # had
        [730, 1090, 2440],  # hod
        [570, 840, 2410],  # hawed
        [440, 1020, 2240],  # hood
        [300, 870, 2240],  # who'd
    ],
    dtype=float,
)
"""Mean formants of men, rounded as published: Peterson and Barney, JASA 24 (1952), table II."""

WORDS = ((4, 0), (0, 4), (7, 2), (2, 7), (5, 1), (1, 5), (3, 6), (6, 3), (0, 7), (4, 6))
"""Ten words: two vowels each, as rows of :data:`VOWELS_HZ`."""

_BANDWIDTHS_HZ = np.array([80.0, 110.0, 160.0])
_STEP_SAMPLES = 40  # the filter moves every 5 ms


@dataclass(frozen=True, kw_only=True)
class Voice:
    """What stays the same whatever a speaker says.

    Args:
        pitch_hz: Mean frequency of the vocal folds, 50 to 400.
        tract: Factor on all formants: above 1 for a short vocal tract. 0.5 to 2.
        tilt_db: Fall of the source's spectrum per octave, in dB, at least 0.
        breath: Loudness of the breath beside the buzz, 0 to 1.
    Raises:
        ConfigurationError: A value is out of its range.

    Example:
        >>> Voice(pitch_hz=120.0, tract=1.0, tilt_db=10.0, breath=0.01).tract
        1.0
    """

    pitch_hz: float
    tract: float
    tilt_db: float
    breath: float

    def __post_init__(self) -> None:
        ranges = {
            "pitch_hz": (50.0, 400.0),
            "tract": (0.5, 2.0),
            "tilt_db": (0.0, np.inf),
            "breath": (0.0, 1.0),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigurationError(
                    f"voice: expected {name} from {low:g} to {high:g}, got {getattr(self, name)}."
                )


def voices(count: int) -> tuple[Voice, ...]:
    """Make voices that differ in all respects; the first ones stay the same for any number.

    Args:
        count: How many, at least 1.
    Raises:
        ConfigurationError: There are none.

    Example:
        >>> voices(3)[0] == voices(6)[0], len(set(voices(6)))
        (True, 6)
    """
    if count < 1:
        raise ConfigurationError(f"voices: expected a count of at least 1, got {count}.")
    # Multiples of irrational numbers fill the ranges evenly, however many there are.
    turns = np.outer(np.arange(1, count + 1), np.sqrt([5.0, 2.0, 3.0, 7.0])) % 1.0
    return tuple(
        Voice(
            pitch_hz=float(90.0 * 2.5**pitch),
            tract=float(0.88 + 0.3 * tract),
            tilt_db=float(7.0 + 6.0 * tilt),
            breath=float(0.002 + 0.02 * breath),
        )
        for pitch, tract, tilt, breath in turns
    )


def say(voice: Voice, word: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Render a word. Nobody says it twice alike: pitch, pace, vowels and loudness vary a little.

    Args:
        voice: Whose.
        word: Which of :data:`WORDS`.
        generator: Source of all randomness.
    Returns:
        Samples at 8 kHz, 0.3 to 0.55 s of them, peak 1.

    Example:
        >>> samples = say(voices(1)[0], word=3, generator=np.random.default_rng(0))
        >>> float(np.abs(samples).max()), 2400 <= len(samples) <= 4400
        (1.0, True)
    """
    samples = int(SAMPLE_RATE_HZ * generator.uniform(0.3, 0.55))
    time = np.linspace(0.0, 1.0, samples)
    frames = np.linspace(0.0, 1.0, samples // _STEP_SAMPLES + 1)
    pitch = _pitch_hz(voice, time, generator)
    harmonics = np.arange(1, int(0.5 * SAMPLE_RATE_HZ / pitch.max()) + 1)
    levels = _levels(voice, _formants_hz(voice, word, frames, generator), harmonics)
    phase = 2.0 * np.pi * np.cumsum(pitch) / SAMPLE_RATE_HZ + generator.uniform(0.0, 2.0 * np.pi)
    loudness = np.stack([np.interp(time, frames, level) for level in levels])
    buzz = (loudness * np.cos(harmonics[:, None] * phase)).sum(axis=0)
    buzz /= np.abs(buzz).max()
    sound = (buzz + voice.breath * generator.standard_normal(samples)) * _envelope(time, generator)
    spoken: NDArray[np.float32] = (sound / np.abs(sound).max()).astype(np.float32)
    return spoken


def _pitch_hz(
    voice: Voice, time: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """A pitch that falls towards the end, as in a statement, and trembles."""
    mean = voice.pitch_hz * np.exp(generator.normal(0.0, 0.05))
    tremble = 0.01 * np.sin(2.0 * np.pi * (generator.uniform(1.0, 3.0) * time + generator.random()))
    fall = generator.uniform(0.05, 0.25)
    pitch: NDArray[np.float64] = mean * (1.0 + fall * (0.5 - time) + tremble)
    return pitch


def _formants_hz(
    voice: Voice, word: int, frames: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Formants on their way from the first vowel to the second, shape ``(3, frames)``."""
    first, second = (
        VOWELS_HZ[vowel] * np.exp(generator.normal(0.0, 0.03, size=3)) for vowel in WORDS[word]
    )
    where = 1.0 / (1.0 + np.exp(-(frames - generator.uniform(0.4, 0.6)) / 0.06))
    path: NDArray[np.float64] = first[:, None] + (second - first)[:, None] * where
    return voice.tract * path


def _levels(
    voice: Voice, formants_hz: NDArray[np.float64], harmonics: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Loudness of each harmonic in each frame: source times resonances."""
    frequency = (voice.pitch_hz * harmonics)[:, None]
    source = 10.0 ** (-voice.tilt_db / 20.0 * np.log2(harmonics))[:, None]
    levels = source * np.ones((1, formants_hz.shape[1]))
    for centre, width in zip(formants_hz, _BANDWIDTHS_HZ, strict=True):
        # A resonator of second order: |H| = c² / |c² − f² + i·f·width|.
        levels = levels * centre**2 / np.hypot(centre**2 - frequency**2, frequency * width)
    return levels


def _envelope(time: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Swell, fade, and a dip between the two vowels."""
    rise, fade = generator.uniform(0.05, 0.12), generator.uniform(0.15, 0.3)
    dip = 1.0 - generator.uniform(0.2, 0.5) * np.exp(-(((time - 0.5) / 0.06) ** 2))
    shape: NDArray[np.float64] = np.minimum(1.0, np.minimum(time / rise, (1.0 - time) / fade)) * dip
    return shape
