"""Synthetic voices: pitch and formants are where they were put, and no two clips are alike."""

from __future__ import annotations

import numpy as np
import pytest

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes.voices import SAMPLE_RATE_HZ, VOWELS_HZ, WORDS, Voice, say, voices

PLAIN = {"tract": 1.0, "tilt_db": 6.0, "breath": 0.0}


def rendered(voice, word=0, seed=0):
    return say(voice, word, np.random.default_rng(seed)).astype(float)


@pytest.mark.parametrize("pitch_hz", [100.0, 150.0, 220.0])
def test_pitch_is_that_of_the_voice(pitch_hz):
    sound = rendered(Voice(pitch_hz=pitch_hz, **PLAIN))
    middle = sound[len(sound) // 4 : -len(sound) // 4]
    alike = np.correlate(middle, middle, "full")[len(middle) - 1 :]
    shortest = int(SAMPLE_RATE_HZ / (1.5 * pitch_hz))
    longest = int(SAMPLE_RATE_HZ / (0.67 * pitch_hz))
    period = shortest + int(alike[shortest:longest].argmax())
    # 5 % from take to take at one standard deviation, and a fall of up to 12 % either way.
    assert SAMPLE_RATE_HZ / period == pytest.approx(pitch_hz, rel=0.25)


@pytest.mark.parametrize("tract", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("word", [4, 7])
def test_first_formant_moves_with_word_and_tract(tract, word):
    # A low pitch has a harmonic near every formant.
    sound = rendered(Voice(pitch_hz=60.0, **{**PLAIN, "tract": tract}), word)
    start = sound[: int(0.35 * len(sound))]
    spectrum = np.abs(np.fft.rfft(start * np.hanning(len(start)), 8192))
    frequency = np.fft.rfftfreq(8192, 1.0 / SAMPLE_RATE_HZ)
    low = (frequency > 180.0) & (frequency < 800.0 * tract)
    loudest = frequency[low][spectrum[low].argmax()]
    assert loudest == pytest.approx(tract * VOWELS_HZ[WORDS[word][0], 0], rel=0.2)


def test_takes_differ_and_seeds_repeat():
    voice = voices(2)[1]
    assert np.array_equal(rendered(voice, seed=1), rendered(voice, seed=1))
    lengths = {len(rendered(voice, seed=seed)) for seed in range(10)}
    assert len(lengths) > 5
    assert all(0.3 * SAMPLE_RATE_HZ - 1 <= n <= 0.55 * SAMPLE_RATE_HZ for n in lengths)


def test_every_voice_can_say_every_word():
    for voice in voices(12):
        for word in range(len(WORDS)):
            sound = rendered(voice, word)
            assert np.isfinite(sound).all()
            assert np.abs(sound).max() == pytest.approx(1.0)


def test_voices_differ_however_many_there_are():
    everybody = voices(40)
    assert everybody[:7] == voices(7)
    assert len({voice.pitch_hz for voice in everybody}) == 40
    assert all(90.0 <= voice.pitch_hz <= 225.0 for voice in everybody)


@pytest.mark.parametrize(
    ("name", "value"), [("pitch_hz", 40.0), ("tract", 2.5), ("tilt_db", -1.0), ("breath", 1.5)]
)
def test_impossible_voices_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"voice: expected {name} from .* got {value}"):
        Voice(**{"pitch_hz": 100.0, **PLAIN, name: value})


def test_nobody_is_refused():
    with pytest.raises(ConfigurationError, match="a count of at least 1, got 0"):
        voices(0)
