"""The cochlea: bands, windows and onsets, each against something computed otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aihwkit_lora.errors import DataError
from aihwkit_lora.recipes.speaker_features import (
    ONSETS_MS,
    event_spikes,
    inputs,
    sound_spikes,
    varied,
)

RATE = 8000


def tone(frequency, seconds=0.6):
    return np.sin(2.0 * np.pi * frequency / RATE * np.arange(int(RATE * seconds)))


def noise(seconds, seed=0):
    return np.random.default_rng(seed).standard_normal(int(RATE * seconds))


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 3000.0])
def test_tone_is_loudest_in_the_band_around_it(frequency):
    mel = lambda f: 2595.0 * np.log10(1.0 + f / 700.0)  # noqa: E731
    band = 141 * (mel(frequency) - mel(60.0)) / (mel(3900.0) - mel(60.0)) - 1.0
    spikes = sound_spikes(tone(frequency))[0, 1:-1].sum(axis=0)
    assert abs(int(spikes.argmax()) - band) <= 1.0
    # Near its peak a band fires at the full rate: 10 a window.
    assert spikes.max() == pytest.approx(80, abs=2)
    assert spikes[abs(np.arange(140) - band) > 60].max() < 40


def test_loudness_makes_no_difference():
    sound = noise(0.5)
    assert np.array_equal(sound_spikes(sound), sound_spikes(2.0**-7 * sound))


@pytest.mark.parametrize("shift", [20, 40])
def test_later_onset_is_silence_before_the_clip(shift):
    sound = noise(0.4)
    later = np.concatenate([np.zeros(RATE * shift // 1000), sound])
    assert np.array_equal(sound_spikes(later)[0], sound_spikes(sound)[ONSETS_MS.index(shift)])
    # And the other way round: the shifted clip, pulled back.
    early = sound_spikes(later)[ONSETS_MS.index(-shift)]
    assert np.array_equal(early, sound_spikes(sound)[0])


def test_clip_ends_in_silence_and_is_cut_off_after_the_last_window():
    short = sound_spikes(noise(0.2))[0]
    assert short[:3].any(axis=1).all()
    assert not short[4:].any()
    long = noise(1.5)
    assert np.array_equal(sound_spikes(long)[0], sound_spikes(long[: int(0.68 * RATE)])[0])


@pytest.mark.parametrize("samples", [np.zeros(4000), np.zeros(0)])
def test_silence_is_refused(samples):
    with pytest.raises(DataError, match=f"expected a sound, found {len(samples)} samples"):
        sound_spikes(samples)


def test_events_are_counted_one_by_one():
    generator = np.random.default_rng(0)
    times, units = generator.uniform(0.0, 1.2, 3000), generator.integers(0, 700, 3000)
    found = event_spikes(times, units)
    for number, shift in enumerate(ONSETS_MS):
        expected = np.zeros((10, 140), dtype=int)
        for time, unit in zip(times, units, strict=True):
            window = int((1000.0 * time + shift) // 100)
            if 0 <= window < 10:
                expected[window, unit // 5] += 1
        assert np.array_equal(found[number], expected)
    many = event_spikes(np.full(300, 0.5), np.full(300, 7))
    assert many[0, 5, 1] == 255


@pytest.mark.parametrize("unit", [-1, 700])
def test_channels_out_of_range_are_refused(unit):
    with pytest.raises(DataError, match=r"expected channels from 0 to 699, found"):
        event_spikes(np.array([0.1]), np.array([unit]))


def test_network_sees_a_tenth_per_spike_of_the_clip_as_it_is():
    spikes = torch.randint(0, 11, (3, 5, 10, 140), dtype=torch.uint8)
    assert torch.equal(inputs(spikes), 0.1 * spikes[:, 0].float())


def test_training_sees_random_onsets_with_some_spikes_lost():
    torch.manual_seed(0)
    onsets = torch.arange(1, 6).view(1, 5, 1, 1).expand(400, 5, 10, 140)
    whole = varied(onsets, kept=1.0)
    seen = (10.0 * whole[:, 0, 0]).round()
    assert torch.equal(whole, (0.1 * seen)[:, None, None].expand_as(whole))
    # Each of five onsets is drawn 80 times in 400; below 45 has a chance under 1e-5.
    assert seen.int().bincount()[1:].min() > 45
    thin = varied(onsets.new_full((100, 5, 10, 140), 10), kept=0.8)
    # 1.4 million draws: five standard deviations of the mean are 0.0017.
    assert float(thin.mean()) == pytest.approx(0.8, abs=0.0017)
    assert float(thin.std()) == pytest.approx(0.1 * (10 * 0.8 * 0.2) ** 0.5, rel=0.01)
