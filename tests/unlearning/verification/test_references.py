"""Retrained models: trained once, kept as weights, programmed and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.unlearning.verification import RetrainedReferences

CHIP = al.chips.get("rm-180nm")


class Trainings:
    """Makes networks that depend on the seed, and remembers for which it was asked."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, seed: int) -> nn.Module:
        self.seeds.append(seed)
        torch.manual_seed(seed)
        return build()


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


@pytest.fixture
def trainings() -> Trainings:
    return Trainings()


@pytest.fixture
def references(trainings: Trainings, tmp_path: Path) -> RetrainedReferences:
    return RetrainedReferences(
        folder=tmp_path / "kept", key={"epochs": 3}, build=build, retrain=trainings, seeds=(0, 1, 5)
    )


def test_each_seed_is_trained_once(references: Any, trainings: Trainings) -> None:
    first, again = references.load(), references.load()
    assert trainings.seeds == [0, 1, 5]
    assert first.counts is None
    for one, other in zip(first.models, again.models, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))  # noqa: B905
    assert not torch.equal(first.models[0][0].weight, first.models[1][0].weight)
    torch.manual_seed(5)
    assert torch.equal(first.models[2][0].weight, build()[0].weight)


def test_another_configuration_or_seed_is_another_file(
    references: Any, trainings: Trainings
) -> None:
    references.load()
    replace(references, key={"epochs": 4}).load()
    replace(references, seeds=(1, 6)).load()
    assert trainings.seeds == [0, 1, 5, 0, 1, 5, 6]
    assert len(list(Path(references.folder).iterdir())) == 7


def test_the_order_of_the_key_does_not_matter(references: Any) -> None:
    keys = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    one, other = (replace(references, key=key).digest for key in keys)
    assert one == other != references.digest


def test_on_a_chip_they_are_programmed_frozen_and_counted(references: Any) -> None:
    ledger, on_chip = al.Ledger(), replace(references, chip=CHIP)
    first, again = on_chip.load(ledger), on_chip.load()
    expected = al.Ledger()
    for seed, plain in zip((0, 1, 5), references.load().models, strict=True):
        al.program_(al.convert(plain, CHIP), CHIP, ledger=expected, seed=seed)
    assert first.counts == expected.total() == ledger.total(phase="retrain") == again.counts
    assert [al.fingerprint(model) for model in first.models] == [
        al.fingerprint(model) for model in again.models
    ]


def test_what_training_took_is_added_for_each_model(references: Any) -> None:
    training = al.Counts({"forward_macs": 100})
    found = replace(references, training=training).load()
    assert found.counts["forward_macs"] == 300


def test_a_broken_file_is_refused(references: Any) -> None:
    references.load()
    path = sorted(Path(references.folder).iterdir())[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(al.DataError, match=r"retrained-.*torch cannot read.*Delete it"):
        references.load()


def test_files_cannot_run_code(references: Any, tmp_path: Path) -> None:
    references.load()
    for path in Path(references.folder).iterdir():
        torch.save(build(), path)  # a whole module, which only unpickling could load
    with pytest.raises(al.DataError, match="torch cannot read"):
        references.load()


def test_weights_of_another_network_are_refused(references: Any) -> None:
    references.load()
    match = r"weights of the network that build\(\) makes"
    with pytest.raises(al.DataError, match=match):
        replace(references, build=lambda: nn.Sequential(nn.Linear(9, 6))).load()
    with pytest.raises(al.DataError, match=match):
        replace(references, key={}, retrain=lambda seed: nn.Linear(2, 2)).load()
    assert len(list(Path(references.folder).iterdir())) == 3


def test_impossible_references_are_refused(references: Any) -> None:
    for seeds in ((), (1, 1)):
        with pytest.raises(al.ConfigurationError, match="expected different seeds, got"):
            replace(references, seeds=seeds)
    with pytest.raises(al.ConfigurationError, match="expected a key that JSON can hold, got"):
        replace(references, key={"net": build})
