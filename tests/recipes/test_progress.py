"""Progress bars: on terminals only."""

from __future__ import annotations

import os
import pty
import sys

import pytest

from aihwkit_lora.errors import StageError
from aihwkit_lora.recipes import RECIPES, cli, progress, run_recipe, stage_training
from aihwkit_lora.recipes.face_recognition import Job
from aihwkit_lora.recipes.run_folder import RunFolder


def test_nothing_is_shown_unless_somebody_asks_and_only_as_long():
    assert not progress.shown()
    with progress.showing(True):
        assert progress.shown()
        with progress.showing(False):
            assert not progress.shown()
        assert progress.shown()
    assert not progress.shown()


def test_an_error_ends_it_as_well():
    with pytest.raises(StageError, match="no power"), progress.showing(True):
        raise StageError("no power")
    assert not progress.shown()


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("err", [True, False])
def test_left_open_it_takes_two_terminals(monkeypatch, out, err):
    monkeypatch.setattr(sys, "stdout", _Stream(out))
    monkeypatch.setattr(sys, "stderr", _Stream(err))
    with progress.showing():
        assert progress.shown() == (out and err)


class _Stream:
    """All that is asked of an output."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_real_terminal_counts_as_one(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0), os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.showing():
            assert progress.shown()


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize(
    "name", ["face_recognition", "speaker_authentication", "image_generation", "lm_unlearning"]
)
def test_trainers_are_told(monkeypatch, tmp_path, name, on):
    asked = []

    def trainer(**options):
        asked.append(options["enable_progress_bar"])
        raise StageError("told enough")

    monkeypatch.setattr(stage_training.pl, "Trainer", trainer)
    recipe = RECIPES.get(name)
    # The judge of images has a trainer of its own; none is needed to see what Lightning is told.
    if name == "image_generation":
        monkeypatch.setattr(
            "aihwkit_lora.recipes.image_generation.Job.examiner", property(lambda _: None)
        )
    with progress.showing(on), pytest.raises(StageError, match="told enough"):
        run_recipe(recipe, recipe.config(quick=True), tmp_path)
    assert asked == [on]


def test_a_log_has_no_bar_and_a_terminal_has_one(monkeypatch, tmp_path, capsys):
    """The whole way: the command line asks, Lightning draws."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Job, "program", lambda *_: (_ for _ in ()).throw(StageError("far enough")))
    command = ["run", "face_recognition", "--quick", "--learn-epochs", "2"]
    assert cli.main(command) == 2
    assert "Epoch" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(command) == 2
    assert "Epoch 1/1" in capsys.readouterr().out


def test_stages_announce_themselves(tmp_path):
    said = []
    folder = RunFolder(tmp_path, recipe="faces", config={}, say=said.append)

    def run():
        assert said == ["learn: running"]
        raise StageError("no power")

    with pytest.raises(StageError, match="no power"):
        folder.stage("learn", run)
    assert said == ["learn: running"]
