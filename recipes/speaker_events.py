"""Spiking Speech Commands and Spiking Heidelberg Digits: fetched once, read by speaker.

Cramer, Stradmann, Schemmel and Zenke, IEEE TNNLS 33 (2022): spikes of 700 channels of a cochlea
model, one HDF5 file per part. Reading needs h5py (extra ``snn``).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.speaker_features import event_spikes

SOURCE = "https://zenkelab.org/datasets"
"""Where the files are published, compressed, with their MD5 sums in ``md5sums.txt``."""


def fetch(name: str, folder: Path, *, download: bool = True, source: str = SOURCE) -> Path:
    """Find a file, or download it, check its sum and unpack it.

    Args:
        name: Such as ``ssc_train.h5``.
        folder: Where it is kept.
        download: Whether it may be fetched.
        source: Address of the folder to fetch it from.
    Returns:
        Where it is.
    Raises:
        DataError: It is missing and may not or cannot be fetched, or arrives damaged.

    Example:
        >>> fetch("ssc_train.h5", Path("nowhere"), download=False)
        Traceback (most recent call last):
        ...
        aihwkit_lora.errors.DataError: expected 'nowhere/ssc_train.h5', found none. ...
    """
    file = folder / name
    if file.exists():
        return file
    if not download:
        raise DataError(
            f"expected '{file}', found none. Allow download=True, or get {source}/{name}.gz and "
            "unpack it there."
        )
    folder.mkdir(parents=True, exist_ok=True)
    packed = folder / f"{name}.gz"
    try:
        sums = _open(f"{source}/md5sums.txt").read().decode()
        with _open(f"{source}/{name}.gz") as remote, packed.open("wb") as local:
            shutil.copyfileobj(remote, local)
    except OSError as error:
        packed.unlink(missing_ok=True)
        raise DataError(f"expected to fetch {source}/{name}.gz, got: {error}.") from error
    _check(packed, sums)
    _unpack(packed, file)
    return file


def read(
    file: Path, speakers: Sequence[int], most: int | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Count the spikes of some speakers' clips.

    Args:
        file: HDF5 with ``spikes/times``, ``spikes/units`` and ``extra/speaker``.
        speakers: Which, 0 being the one with most clips.
        most: Clips to read of each, the first ones of the file; all if None.
    Returns:
        Counts ``(n, onsets, windows, bands)`` and speakers ``(n,)``.
    Raises:
        ConfigurationError: h5py is not installed.
        DataError: The file has another layout.
    """
    h5py = _h5py()
    with h5py.File(file, "r") as stored:
        try:
            times, units = stored["spikes/times"], stored["spikes/units"]
            names = np.asarray(stored["extra/speaker"]).astype(np.int64)
        except KeyError as error:
            raise DataError(
                f"'{file}': expected spikes/times, spikes/units and extra/speaker, got: {error}."
            ) from error
        ranked = _most_clips_first(names)
        known = [(rank, ranked[rank]) for rank in speakers if rank < len(ranked)]
        chosen = [
            (clip, rank) for rank, name in known for clip in np.flatnonzero(names == name)[:most]
        ]
        spikes = [event_spikes(times[clip], units[clip]) for clip, _ in chosen]
    if not spikes:
        raise DataError(f"'{file}': expected clips of speakers {tuple(speakers)}, found none.")
    return np.stack(spikes), np.array([rank for _, rank in chosen], dtype=np.int64)


def _most_clips_first(names: NDArray[np.int64]) -> NDArray[np.int64]:
    found, clips = np.unique(names, return_counts=True)
    ranked: NDArray[np.int64] = found[np.argsort(-clips, kind="stable")]
    return ranked


def _open(address: str) -> Any:
    return urllib.request.urlopen(address, timeout=60)


def _check(packed: Path, sums: str) -> None:
    wanted = {line.split()[-1].lstrip("*"): line.split()[0] for line in sums.splitlines() if line}
    with packed.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    expected = wanted.get(packed.name)
    if expected != found:
        packed.unlink()
        raise DataError(
            f"'{packed.name}': expected MD5 sum {expected}, got {found}. Try again; the transfer "
            "may have been cut off."
        )


def _unpack(packed: Path, file: Path) -> None:
    partial = file.with_suffix(".partial")
    with gzip.open(packed) as compressed, partial.open("wb") as plain:
        shutil.copyfileobj(compressed, plain)
    partial.replace(file)
    packed.unlink()


def _h5py() -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise ConfigurationError(
            "data sets 'ssc' and 'shd': expected h5py to be installed, got none. Install "
            "aihwkit-lora[snn], or choose data 'voices' or 'fsdd'."
        ) from error
