"""Clips of speakers: split by clip, nobody twice, the same for the same seed."""

from __future__ import annotations

import itertools
import wave

import numpy as np
import pytest
import torch

from aihwkit_lora.errors import ConfigurationError, DataError, UnknownNameError
from aihwkit_lora.recipes.face_data import DATA_VARIABLE, data_folder
from aihwkit_lora.recipes.speaker_data import (
    DATA_SETS,
    FSDD_FOLDER,
    Recordings,
    SpeakerClips,
    SpeakerDataConfig,
    load_speakers,
)
from aihwkit_lora.recipes.speaker_features import sound_spikes

SMALL = SpeakerDataConfig(clips_per_speaker=20)


def numbered(name, *, speakers=4, clips=30, test=None):
    """Register a data set whose clip number stands in its spikes."""
    count = speakers * clips
    spikes = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 5, 10, 140)
    who = torch.arange(count) % speakers
    DATA_SETS.add(name, lambda _: Recordings(spikes=spikes, speakers=who, test=test))
    return SpeakerDataConfig(data=name, learnt=(2, 0, 3), forgotten=0, new=1)


@pytest.fixture
def data_set(request, monkeypatch):
    monkeypatch.setattr(DATA_SETS, "_entries", dict(DATA_SETS._entries))


def numbers(clips):
    return clips.spikes[:, 0, 0, 0].tolist()


def test_no_clip_is_on_two_sides_and_none_is_lost(data_set):
    data = load_speakers(numbered("numbered"))
    parts = [numbers(clips) for clips in (data.train, data.validation, data.test)]
    assert sorted(itertools.chain(*parts)) == list(range(120))
    assert [len(part) for part in parts] == [4 * 22, 4 * 2, 4 * 6]
    for clips in (data.train, data.validation, data.test):
        assert len(set(clips.labels.bincount().tolist())) == 1
        # Labels count the speakers in the order in which they are asked for.
        assert [(2, 0, 3, 1)[label] for label in clips.labels.tolist()] == [
            number % 4 for number in numbers(clips)
        ]
    assert (data.learnt, data.forgotten, data.kept, data.new) == ((0, 1, 2), 1, (0, 2), 3)


def test_data_set_may_say_which_clips_are_for_tests(data_set):
    test = torch.arange(120) >= 100
    data = load_speakers(numbered("numbered", test=test))
    assert sorted(numbers(data.test)) == list(range(100, 120))
    assert max(numbers(data.train) + numbers(data.validation)) < 100


def test_same_seed_same_clips_and_the_global_generator_stays_where_it_is():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = load_speakers(SMALL), load_speakers(SMALL)
    other = load_speakers(SpeakerDataConfig(clips_per_speaker=20, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.train.spikes, again.train.spikes)
    assert not torch.equal(first.train.spikes, other.train.spikes)


def test_voices_are_told_apart_by_more_than_loudness():
    data = load_speakers(SMALL)
    assert data.train.spikes.dtype == torch.uint8
    assert data.train.spikes.shape[1:] == (5, 10, 140)
    means = torch.stack([data.train.of(label).inputs.mean(dim=(0, 1)) for label in range(6)])
    nearest = torch.cdist(data.test.inputs.mean(dim=1), means).argmin(dim=1)
    # Six speakers, 24 clips: guessing gets 4 right; 12 or more has a chance under 1e-4.
    assert int((nearest == data.test.labels).sum()) >= 12


def clips(labels):
    spikes = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 5, 10, 140)
    return SpeakerClips(spikes=spikes, labels=torch.tensor(labels))


def test_few_are_the_first_of_each_speaker_in_order():
    labels = torch.tensor([2, 0, 0, 1, 0, 2, 2])
    spikes = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    clips = SpeakerClips(spikes=spikes, labels=labels)
    assert clips.few(1).spikes.flatten().tolist() == [0, 1, 3]
    assert clips.few(2).spikes.flatten().tolist() == [0, 1, 2, 3, 5]
    assert clips.few(3).labels.tolist() == labels.tolist()


def test_replay_is_a_fixed_part_and_is_repeated_to_balance():
    everything = clips([0] * 40 + [1] * 20 + [2] * 31)
    generator = torch.Generator().manual_seed(0)
    left = everything.replay(0.3, generator, whole=2)
    assert left.labels.bincount().tolist() == [12, 6, 31]
    assert len(set(numbers(left))) == 49
    level = left.balanced()
    assert level.labels.bincount().tolist() == [31, 31, 31]
    assert set(numbers(level)) == set(numbers(left))
    times = [numbers(level.of(1)).count(number) for number in set(numbers(left.of(1)))]
    assert sorted(times) == [5] * 5 + [6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learnt": (1,)}, r"at least two speakers in learnt, .* found \(1,\)"),
        ({"learnt": (1, 1, 2)}, "each once and none below 0"),
        ({"learnt": (-1, 1)}, "each once and none below 0"),
        ({"forgotten": 9}, r"forgotten to be one of the learnt speakers .* found 9"),
        ({"new": 4}, r"new to be none of the learnt speakers .* found 4"),
        ({"clips_per_speaker": 9}, "clips_per_speaker of at least 10, found 9"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        SpeakerDataConfig(**fields)


def test_unknown_data_set_is_refused():
    with pytest.raises(UnknownNameError, match=r"unknown data set of speakers 'fsd'. Did you mean"):
        SpeakerDataConfig(data="fsd")


def test_speaker_without_clips_is_refused(data_set):
    config = numbered("numbered", clips=9)
    with pytest.raises(DataError, match="'numbered': expected at least 10 clips of speaker 2, fou"):
        load_speakers(config)


def write(folder, name, samples, rate=8000, width=2):
    with wave.open(str(folder / name), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture
def fsdd(tmp_path, monkeypatch):
    folder = tmp_path / FSDD_FOLDER / "recordings"
    folder.mkdir(parents=True)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    return folder


def test_wav_files_are_read_by_speaker_and_take(fsdd):
    generator, sounds = np.random.default_rng(0), {}
    for speaker in ("zoe", "ann", "bob", "eve"):
        for take in range(34, 44):
            sounds[speaker, take] = 3000 * generator.standard_normal(2500)
            write(fsdd, f"7_{speaker}_{take}.wav", sounds[speaker, take])
    data = load_speakers(SpeakerDataConfig(data="fsdd", learnt=(0, 3), forgotten=3, new=1))
    assert len(data.test) == 3 * 4
    assert len(data.train) + len(data.validation) == 3 * 6
    for label, speaker in enumerate(("ann", "zoe", "bob")):
        expected = {
            sound_spikes(sounds[speaker, take].astype(np.int16)).tobytes() for take in range(40, 44)
        }
        found = {each.numpy().tobytes() for each in data.test.of(label).spikes}
        assert found == expected


def test_missing_or_other_sound_is_refused(fsdd):
    config = SpeakerDataConfig(data="fsdd")
    with pytest.raises(DataError, match=r"wav files of the Free Spoken Digit Dataset in .* none"):
        load_speakers(config)
    write(fsdd, "0_ann_0.wav", np.ones(4000), rate=16000)
    with pytest.raises(DataError, match="8000 Hz, 16 bit, 1 channel, found 16000 Hz, 16 bit, 1 ch"):
        load_speakers(config)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not (data_folder() / FSDD_FOLDER).exists(),
    reason="no spoken digits in the folder that AIHWKIT_LORA_DATA names",
)
def test_spoken_digits():
    data = load_speakers(SpeakerDataConfig(data="fsdd"))
    parts = (data.train, data.validation, data.test)
    assert [part.labels.bincount().tolist() for part in parts] == [[360] * 6, [40] * 6, [100] * 6]
    # 63 % of the inputs of the reference recipe are not zero.
    assert float((data.train.inputs > 0).double().mean()) == pytest.approx(0.63, abs=0.03)
