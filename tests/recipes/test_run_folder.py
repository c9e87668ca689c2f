"""Finished stages outlive a run."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.metering import Counts
from aihwkit_lora.recipes.run_folder import Finished, RunFolder
from aihwkit_lora.reporting import StageRecord

CONFIG = {"seed": 0, "people": (0, 1), "rate": 0.5}


def finished(name: str = "learn") -> Finished:
    counts = Counts({"set_pulses": 3})
    record = StageRecord(
        name=name,
        metrics={"learnt_accuracy": 0.5},
        counts=counts,
        energy=al.price(counts, al.chips.get("rm-180nm")),
        trainable_parameters=6,
        fingerprint="",
        wall_s=1.0,
    )
    return Finished(nn.Linear(2, 2), record)


def refuse() -> Finished:
    raise AssertionError("ran a stage that is on disk")


def folder(path, *, resume=False, said=None, recipe="faces", **changes):
    say = (lambda _: None) if said is None else said.append
    return RunFolder(path, recipe=recipe, config=CONFIG | changes, resume=resume, say=say)


def test_a_finished_stage_is_taken_from_disk(tmp_path):
    first, said = finished(), []
    assert folder(tmp_path).stage("learn", lambda: first) is first
    again = folder(tmp_path, resume=True, said=said).stage("learn", refuse)
    assert again.record == first.record
    assert torch.equal(again.model.weight, first.model.weight)
    assert len(said) == 1
    assert said[0].startswith("learn: taken from ")


def test_without_resume_earlier_stages_are_gone(tmp_path):
    folder(tmp_path).stage("learn", finished)
    anew = folder(tmp_path)
    assert anew.finished() == []
    with pytest.raises(AssertionError, match="ran a stage"):
        anew.stage("learn", refuse)


def test_without_resume_the_report_of_an_earlier_run_is_gone_and_nothing_else(tmp_path):
    folder(tmp_path).stage("learn", finished)
    for name in ("report.json", "report.png", "requests.jsonl"):
        (tmp_path / name).write_text("old")
    folder(tmp_path, resume=True)
    assert (tmp_path / "report.json").read_text() == "old"
    folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"stages", "run.json", "requests.jsonl"}


def test_nothing_to_resume_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"expected a run to resume, got none. Leave out --resume"):
        folder(tmp_path / "new", resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed = 0 then and 1 now. Use"),
        ({"people": (0, 2)}, r"people = \[0, 1\] then and \[0, 2\] now. Use"),
        ({"rate": 1.0, "seed": 3}, "rate = 0.5 then and 1.0 now, seed = 0 then and 3 now"),
        ({"extra": 1}, "extra = None then and 1 now"),
        ({"recipe": "other"}, "recipe = faces then and other now"),
    ],
)
def test_another_configuration_is_refused_and_the_difference_named(tmp_path, changes, named):
    folder(tmp_path).stage("learn", finished)
    with pytest.raises(ConfigurationError, match=named):
        folder(tmp_path, resume=True, **changes)
    assert folder(tmp_path, resume=True).finished() == ["learn"]


def test_an_unfinished_file_is_not_taken(tmp_path):
    folder(tmp_path)
    (tmp_path / "stages" / "learn.partial").write_bytes(b"half a stage")
    resumed = folder(tmp_path, resume=True)
    assert resumed.finished() == []
    ran = []
    resumed.stage("learn", lambda: ran.append(1) or finished())
    assert ran == [1]
    assert resumed.finished() == ["learn"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    run = folder(tmp_path)
    with pytest.raises(AssertionError, match="ran a stage"):
        run.stage("learn", refuse)
    assert run.finished() == []


def test_stages_are_listed_oldest_first(tmp_path):
    run = folder(tmp_path)
    for age, name in enumerate(("write", "adapt", "learn")):
        run.stage(name, lambda name=name: finished(name))
        os.utime(tmp_path / "stages" / f"{name}.pt", ns=(10**18 + age, 10**18 + age))
    assert run.finished() == ["write", "adapt", "learn"]
