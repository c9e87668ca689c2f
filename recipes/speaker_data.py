"""Clips of speakers for the speaker workload: data sets, and how they are split by clip."""

from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes import speaker_events
from aihwkit_lora.recipes.face_data import data_folder
from aihwkit_lora.recipes.people import People
from aihwkit_lora.recipes.speaker_features import SAMPLE_RATE_HZ, inputs, sound_spikes
from aihwkit_lora.recipes.voices import WORDS, say, voices
from aihwkit_lora.registry import Registry

FSDD_FOLDER = "free-spoken-digit-dataset"
"""Where the Free Spoken Digit Dataset lies in the folder with real data."""

_FSDD_FIRST_TEST_TAKE = 40  # of 50
_CLIPS_OF_A_VOICE = 120


@dataclass(frozen=True, kw_only=True)
class SpeakerDataConfig:
    """Who is learnt, forgotten and added.

    Args:
        data: ``"voices"`` (synthetic, the default), ``"fsdd"`` (Free Spoken Digit Dataset),
            ``"ssc"`` or ``"shd"`` (Spiking Speech Commands, Spiking Heidelberg Digits).
        learnt: Speakers who are learnt first, at least two. In ``"fsdd"`` they are numbered by
            name, in ``"ssc"`` and ``"shd"`` from the one with most clips downwards.
        forgotten: The one of ``learnt`` who is forgotten.
        new: The speaker who joins afterwards.
        clips_per_speaker: How many clips to use of each speaker; None for all (120 of a voice).
        seed: Seed of voices, split and everything after.
        download: Whether a missing data set may be fetched from the internet.
    Raises:
        ConfigurationError: The speakers do not fit together, or there are too few clips.
        UnknownNameError: There is no such data set.

    Example:
        >>> SpeakerDataConfig(forgotten=3).new
        5
    """

    data: str = "voices"
    learnt: tuple[int, ...] = (0, 1, 2, 3, 4)
    forgotten: int = 1
    new: int = 5
    clips_per_speaker: int | None = None
    seed: int = 0
    download: bool = True

    def __post_init__(self) -> None:
        DATA_SETS.get(self.data)
        if len(set(self.learnt)) < max(2, len(self.learnt)) or min(self.learnt) < 0:
            raise ConfigurationError(
                "expected at least two speakers in learnt, each once and none below 0, found "
                f"{self.learnt}."
            )
        if self.forgotten not in self.learnt:
            raise ConfigurationError(
                f"expected forgotten to be one of the learnt speakers {self.learnt}, found "
                f"{self.forgotten}."
            )
        if self.new in self.learnt or self.new < 0:
            raise ConfigurationError(
                f"expected new to be none of the learnt speakers {self.learnt} and not below 0, "
                f"found {self.new}."
            )
        if self.clips_per_speaker is not None and self.clips_per_speaker < 10:
            raise ConfigurationError(
                f"expected clips_per_speaker of at least 10, found {self.clips_per_speaker}."
            )

    @property
    def speakers(self) -> tuple[int, ...]:
        """Everybody, in the order of the network's outputs."""
        return (*self.learnt, self.new)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpeakerClips:
    """Labelled clips.

    Args:
        spikes: Counts at five onsets, shape ``(n, onsets, windows, bands)``.
        labels: Index of the network's output for the speaker, shape ``(n,)``.

    Example:
        >>> spikes = torch.zeros(3, 5, 10, 140, dtype=torch.uint8)
        >>> clips = SpeakerClips(spikes=spikes, labels=torch.tensor([0, 0, 1]))
        >>> len(clips.of(1)), clips.balanced().labels.tolist(), clips.inputs.shape
        (1, [0, 0, 1, 1], torch.Size([3, 10, 140]))
    """

    spikes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> Tensor:
        """What the network sees of the clips, as they are."""
        return inputs(self.spikes)

    def take(self, index: Tensor) -> SpeakerClips:
        """Return the clips at ``index``, a mask or positions of shape ``(m,)``."""
        return SpeakerClips(spikes=self.spikes[index], labels=self.labels[index])

    def of(self, *labels: int) -> SpeakerClips:
        """Return the clips with one of these labels, in the same order."""
        return self.take(torch.isin(self.labels, torch.tensor(labels)))

    def few(self, most: int) -> SpeakerClips:
        """Return the first clips of each label, at most so many, in the same order.

        Args:
            most: At least 1.
        """
        ordinal = torch.zeros_like(self.labels)
        for label in self.labels.unique().tolist():
            own = self.labels == label
            ordinal[own] = torch.arange(int(own.sum()))
        return self.take(ordinal < most)

    def replay(self, fraction: float, generator: Generator, *, whole: int) -> SpeakerClips:
        """Return all clips of one speaker and a fixed part of everybody else's.

        Args:
            fraction: Of each other speaker's clips, 0 to 1; at least one clip.
            generator: Draws which.
            whole: Label of the speaker whose clips are all returned.
        """
        parts = []
        for label in self.labels.unique().tolist():
            own = (self.labels == label).nonzero().flatten()
            count = len(own) if label == whole else max(1, round(fraction * len(own)))
            parts.append(own[torch.randperm(len(own), generator=generator)[:count]])
        return self.take(torch.cat(parts))

    def balanced(self) -> SpeakerClips:
        """Return the clips, repeated until every label has as many as the largest."""
        most = int(self.labels.bincount().max())
        parts = []
        for label in self.labels.unique().tolist():
            own = (self.labels == label).nonzero().flatten()
            parts.append(own.repeat(-(-most // len(own)))[:most])
        return self.take(torch.cat(parts))


class SpeakerData(People[SpeakerClips]):
    """Clips of everybody."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recordings:
    """Clips as a data set has them.

    Args:
        spikes: Counts, shape ``(n, onsets, windows, bands)``, bytes.
        speakers: Number of the speaker, shape ``(n,)``.
        test: Which clips the data set keeps for tests, shape ``(n,)``; None if it does not say.
    """

    spikes: Tensor
    speakers: Tensor
    test: Tensor | None = None


DATA_SETS = Registry[Callable[[SpeakerDataConfig], Recordings]]("data set of speakers")
"""Data sets by name: from the configuration to clips of its speakers."""


def load_speakers(config: SpeakerDataConfig) -> SpeakerData:
    """Load and split the clips of the speakers in ``config``.

    No clip is on two sides. A tenth of the training clips is for validation. Neither reads nor
    moves torch's global random state: the same config gives the same clips.

    Args:
        config: Speakers, data set and seed.
    Raises:
        DataError: The data set is missing, or lacks one of the speakers.

    Example:
        >>> data = load_speakers(SpeakerDataConfig(clips_per_speaker=20))
        >>> len(data.train), len(data.validation), len(data.test), data.kept
        (84, 12, 24, (0, 2, 3, 4))
    """
    generator = Generator().manual_seed(config.seed)
    found = DATA_SETS.get(config.data)(config)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    labels = torch.full_like(found.speakers, -1)
    for label, speaker in enumerate(config.speakers):
        labels[found.speakers == speaker] = label
        own = (found.speakers == speaker).nonzero().flatten()
        if len(own) < 10:
            raise DataError(
                f"data set '{config.data}': expected at least 10 clips of speaker {speaker}, "
                f"found {len(own)}. Change learnt, forgotten or new."
            )
        for part, chosen in zip(parts, _split(own, found.test, config, generator), strict=True):
            part.append(chosen)
    everything = SpeakerClips(spikes=found.spikes, labels=labels)
    train, validation, test = (everything.take(torch.cat(part)) for part in parts)
    return SpeakerData(
        train=train,
        validation=validation,
        test=test,
        learnt=tuple(range(len(config.learnt))),
        forgotten=config.learnt.index(config.forgotten),
        new=len(config.learnt),
    )


def _split(
    own: Tensor, test: Tensor | None, config: SpeakerDataConfig, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of one speaker's training, validation and test clips."""
    own = own[torch.randperm(len(own), generator=generator)][: config.clips_per_speaker]
    fifth = torch.arange(len(own)) < round(0.2 * len(own))
    held = fifth if test is None else test[own]
    rest = own[~held]
    validation = max(1, round(0.1 * len(rest)))
    return rest[validation:], rest[:validation], own[held]


@DATA_SETS.register("voices")
def _voices(config: SpeakerDataConfig) -> Recordings:
    """Render clips of synthetic voices; each says the ten words in turn."""
    everybody = voices(max(config.speakers) + 1)
    count = config.clips_per_speaker or _CLIPS_OF_A_VOICE
    spikes = [
        sound_spikes(say(everybody[speaker], number % len(WORDS), generator))
        for speaker in config.speakers
        for generator in (np.random.default_rng([config.seed, speaker]),)
        for number in range(count)
    ]
    speakers = torch.tensor(config.speakers).repeat_interleave(count)
    return Recordings(spikes=torch.from_numpy(np.stack(spikes)), speakers=speakers)


@DATA_SETS.register("fsdd")
def _fsdd(config: SpeakerDataConfig) -> Recordings:
    """Read ``{digit}_{speaker}_{take}.wav``; takes from 40 on are for tests."""
    folder = data_folder() / FSDD_FOLDER / "recordings"
    files = sorted(folder.glob("*_*_*.wav"))
    if not files:
        raise DataError(
            f"expected the wav files of the Free Spoken Digit Dataset in '{folder}', found none. "
            "Clone https://github.com/Jakobovski/free-spoken-digit-dataset there, or set "
            "AIHWKIT_LORA_DATA to the folder that holds it."
        )
    names = sorted({file.stem.split("_")[1] for file in files})
    wanted = {name for number, name in enumerate(names) if number in config.speakers}
    files = [file for file in files if file.stem.split("_")[1] in wanted]
    takes = torch.tensor([int(file.stem.split("_")[2]) for file in files])
    return Recordings(
        spikes=torch.from_numpy(np.stack([sound_spikes(_samples(file)) for file in files])),
        speakers=torch.tensor([names.index(file.stem.split("_")[1]) for file in files]),
        test=takes >= _FSDD_FIRST_TEST_TAKE,
    )


def _samples(file: Path) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    with wave.open(str(file)) as sound:
        found = (sound.getframerate(), 8 * sound.getsampwidth(), sound.getnchannels())
        if found != (SAMPLE_RATE_HZ, 16, 1):
            raise DataError(
                f"'{file}': expected {SAMPLE_RATE_HZ} Hz, 16 bit, 1 channel, found {found[0]} Hz, "
                f"{found[1]} bit, {found[2]} channels."
            )
        return np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2")


@DATA_SETS.register("ssc")
def _ssc(config: SpeakerDataConfig) -> Recordings:
    return _events("ssc_train.h5", config)


@DATA_SETS.register("shd")
def _shd(config: SpeakerDataConfig) -> Recordings:
    return _events("shd_train.h5", config)


def _events(name: str, config: SpeakerDataConfig) -> Recordings:
    file = speaker_events.fetch(name, data_folder() / "heidelberg", download=config.download)
    spikes, speakers = speaker_events.read(file, config.speakers, config.clips_per_speaker)
    return Recordings(spikes=torch.from_numpy(spikes), speakers=torch.from_numpy(speakers))
