"""Spike data in HDF5: read by speaker, fetched once, checked."""

from __future__ import annotations

import gzip
import hashlib
import sys

import numpy as np
import pytest

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes import speaker_events
from aihwkit_lora.recipes.face_data import DATA_VARIABLE
from aihwkit_lora.recipes.speaker_data import SpeakerDataConfig, load_speakers
from aihwkit_lora.recipes.speaker_features import event_spikes

SPEAKERS = [5] * 30 + [2] * 10 + [9] * 20


def layout(path, speakers=SPEAKERS, without=()):
    """A small file of the layout of the published ones; returns times and units."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (extra 'snn')")
    generator = np.random.default_rng(0)
    times = [np.sort(generator.uniform(0, 1.1, 200)).astype(np.float16) for _ in speakers]
    units = [generator.integers(0, 700, 200).astype(np.uint16) for _ in speakers]
    with h5py.File(path, "w") as file:
        for name, values, kind in (("times", times, np.float16), ("units", units, np.uint16)):
            stored = file.create_dataset(
                f"spikes/{name}", (len(values),), dtype=h5py.vlen_dtype(np.dtype(kind))
            )
            for index, value in enumerate(values):
                stored[index] = value
        file["labels"] = np.arange(len(speakers), dtype=np.uint16) % 20
        if "speaker" not in without:
            file["extra/speaker"] = np.array(speakers, dtype=np.uint16)
    return times, units


def test_speakers_are_ranked_by_their_clips(tmp_path):
    times, units = layout(tmp_path / "small.h5")
    spikes, speakers = speaker_events.read(tmp_path / "small.h5", (0, 2))
    assert speakers.tolist() == [0] * 30 + [2] * 10
    for found, clip in zip(spikes, [*range(30), *range(30, 40)], strict=True):
        assert np.array_equal(found, event_spikes(times[clip], units[clip]))


def test_only_some_clips_of_each(tmp_path):
    layout(tmp_path / "small.h5")
    _, speakers = speaker_events.read(tmp_path / "small.h5", (1, 0), 4)
    assert speakers.tolist() == [1] * 4 + [0] * 4


def test_other_files_are_refused(tmp_path):
    layout(tmp_path / "small.h5", without=("speaker",))
    with pytest.raises(DataError, match="expected spikes/times, spikes/units and extra/speaker"):
        speaker_events.read(tmp_path / "small.h5", (0,))
    layout(tmp_path / "small.h5")
    with pytest.raises(DataError, match=r"expected clips of speakers \(3,\), found none"):
        speaker_events.read(tmp_path / "small.h5", (3,))


@pytest.mark.parametrize("name", ["ssc", "shd"])
def test_recipe_finds_the_file_in_the_data_folder(tmp_path, monkeypatch, name):
    (tmp_path / "heidelberg").mkdir()
    layout(tmp_path / "heidelberg" / f"{name}_train.h5")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    config = SpeakerDataConfig(data=name, learnt=(0, 1), forgotten=1, new=2, download=False)
    data = load_speakers(config)
    assert data.test.labels.bincount().tolist() == [6, 4, 2]
    assert data.train.spikes.shape[1:] == (5, 10, 140)


def publish(folder, content, said=None):
    folder.mkdir()
    packed = gzip.compress(content)
    (folder / "small.h5.gz").write_bytes(packed)
    md5 = said or hashlib.md5(packed, usedforsecurity=False).hexdigest()
    (folder / "md5sums.txt").write_text(f"0123  other.h5.gz\n{md5}  small.h5.gz\n")
    return folder.as_uri()


def test_file_is_fetched_once_checked_and_unpacked(tmp_path):
    source, cache = publish(tmp_path / "server", b"spikes" * 1000), tmp_path / "cache"
    file = speaker_events.fetch("small.h5", cache, source=source)
    assert file.read_bytes() == b"spikes" * 1000
    assert [each.name for each in cache.iterdir()] == ["small.h5"]
    assert speaker_events.fetch("small.h5", cache, download=False, source="nowhere") == file


def test_damaged_file_is_refused_and_not_kept(tmp_path):
    source = publish(tmp_path / "server", b"spikes", said="0" * 32)
    with pytest.raises(DataError, match=f"'small.h5.gz': expected MD5 sum {'0' * 32}, got"):
        speaker_events.fetch("small.h5", tmp_path / "cache", source=source)
    assert not list((tmp_path / "cache").iterdir())


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none. Allow download=True, or get here/small.h5.gz and"):
        speaker_events.fetch("small.h5", tmp_path, download=False, source="here")
    source = (tmp_path / "nobody").as_uri()
    with pytest.raises(DataError, match=r"expected to fetch .*small.h5.gz, got"):
        speaker_events.fetch("small.h5", tmp_path, source=source)


def test_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigurationError, match=r"h5py to be installed, got none. Install aihwk"):
        speaker_events.read(tmp_path / "small.h5", (0,))
