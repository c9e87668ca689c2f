"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import shutil

import pytest
import torch

from aihwkit_lora import chips
from aihwkit_lora._environment import Check
from aihwkit_lora.errors import StageError
from aihwkit_lora.recipes import RECIPES, cli
from aihwkit_lora.recipes.face_recognition import Job

RUN = ["run", "face_recognition"]
SHORT = [
    "--learn-epochs", "1", "--forget-epochs", "1", "--continue-epochs", "1",
    "--no-baseline", "--photos-per-person", "5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    """A terminal that wraps nothing, and a folder of its own."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_recipes_are_listed(capsys):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: {RECIPES.get(name).summary}" for name in RECIPES.names()]
    assert any(line.startswith("face_recognition: ") for line in lines)


def test_chips_are_listed(capsys):
    assert cli.main(["chips"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: {chips.get(name).title}" for name in chips.names()]
    assert any(line.startswith("rm-180nm: ") for line in lines)


def test_a_chip_shows_every_number_with_its_source(capsys):
    assert cli.main(["chips", "rm-180nm"]) == 0
    out, chip = capsys.readouterr().out, chips.get("rm-180nm")
    names = [*chip.facts]
    names += [f"energy of {event}" for event in chip.prices.energy]
    names += [f"time of {event}" for event in chip.prices.latency]
    for name in names:
        assert name in out
    quantities = (*chip.facts.values(), *chip.prices.energy.values())
    statuses = {str(quantity.status) for quantity in quantities}
    assert all(status in out for status in statuses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chips", "rm-180"], "unknown chip 'rm-180'. Did you mean 'rm-180nm'"),
        (["run", "face_recogniton"], "unknown recipe 'face_recogniton'. Did you mean 'face_rec"),
        (["run"], "expected a recipe. Known: face_recognition"),
        ([*RUN, "--forgoten", "2"], "unknown option '--forgoten'. Did you mean '--forgotten'"),
        ([*RUN, "--chip", "rm-180"], "unknown chip 'rm-180'. Did you mean 'rm-180nm'"),
        ([*RUN, "--data", "digit"], "unknown data set 'digit'. Did you mean 'digits'"),
        ([*RUN, "--forgotten", "9"], "expected forgotten to be one of the learnt people"),
        ([*RUN, "--learn-epochs", "many"], "argument --learn-epochs: invalid int value: 'many'"),
        ([*RUN, "--resume"], "expected a run to resume, got none"),
        ([*RUN, "--config", "gone.yaml"], "expected a configuration in 'gone.yaml'"),
        (["recipes", "--fast"], "unknown argument '--fast'"),
        (["recpies"], "unknown command 'recpies'. Did you mean 'recipes'"),
        (["report", "nowhere"], "nowhere/report.json: expected a report"),
    ],
)
def test_wrong_use_ends_with_2_and_says_what_was_expected(capsys, arguments, message):
    assert cli.main(arguments) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ")
    assert message in found.err
    assert found.out == ""


def test_help_of_run_lists_recipes(capsys):
    assert cli.main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: aihwkit-lora run RECIPE" in out
    assert "face_recognition: " in out


def test_help_of_a_recipe_lists_its_options(capsys):
    assert cli.main([*RUN, "--help"]) == 0
    out = capsys.readouterr().out
    options = ("--out", "--config", "--resume", "--forget-rank", "--no-baseline", "--learnt")
    assert all(option in out for option in options)


def test_no_command_shows_help(capsys):
    assert cli.main([]) == 0
    assert "usage: aihwkit-lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ok", "required", "code", "shown"),
    [(True, True, 0, "yes"), (False, False, 0, "no (optional)"), (False, True, 1, "NO")],
)
def test_doctor_ends_with_1_if_something_needed_is_broken(
    capsys, monkeypatch, ok, required, code, shown
):
    found = Check(name="tiles", ok=ok, detail="how it went", required=required)
    fine = Check(name="Python", ok=True, detail="3.12", required=True)
    monkeypatch.setattr(cli, "doctor", lambda: [fine, found])
    assert cli.main(["doctor"]) == code
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "tiles" in line)
    assert shown in line
    assert "how it went" in line


def test_a_run_prints_its_summary_and_where_the_files_are(capsys, tmp_path):
    assert cli.main([*RUN, *SHORT, "--out", "short"]) == 0
    ran = capsys.readouterr().out
    assert "learn: done in" in ran
    assert ran.endswith("report:  short/report.json\npicture: short/report.png\n")
    summary = ran[ran.index("\n", ran.index("hybrid-continue: done")) : ran.index("\nreport:")]
    for path in ("short", "short/report.json"):
        assert cli.main(["report", path]) == 0
        assert capsys.readouterr().out.strip() == summary.strip()
    shutil.rmtree(tmp_path / "short" / "stages")
    assert cli.main(["report", "short"]) == 0


def test_file_gives_options_and_the_command_line_overrules_it(monkeypatch, tmp_path):
    seen = []

    def stop(self):
        seen.append(self.config)
        raise StageError("far enough")

    monkeypatch.setattr(Job, "learn", stop)
    (tmp_path / "options.yaml").write_text("seed: 3\nmargin: 2\nlearnt: [0, 1, 2]\n")
    assert cli.main([*RUN, "--config", "options.yaml", "--seed", "4"]) == 2
    (config,) = seen
    assert (config.seed, config.margin, config.learnt) == (4, 2.0, (0, 1, 2))
    assert (tmp_path / "runs" / "face_recognition" / "run.json").exists()


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(KeyboardInterrupt(), 130, "interrupted"), (StageError("no power"), 2, "error: no power")],
)
def test_interrupted_run_keeps_stages_and_says_how_to_resume(
    capsys, monkeypatch, tmp_path, error, code, told
):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Job, "forget", fail)
        assert cli.main([*RUN, *SHORT, "--out", "cut"]) == code
    found = capsys.readouterr().err
    assert told in found
    assert {file.name for file in (tmp_path / "cut" / "stages").iterdir()} == {
        "learn.pt", "program.pt",
    }  # fmt: skip
    (line,) = (line for line in found.splitlines() if line.startswith("Resume with: "))
    command = line.removeprefix("Resume with: aihwkit-lora ").split()
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "learn: taken from" in out
    assert "program: taken from" in out
    assert "hybrid-forget: done" in out


def test_interruption_before_the_first_stage_promises_nothing(capsys, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "learn", fail)
    assert cli.main([*RUN, *SHORT]) == 130
    assert "Resume" not in capsys.readouterr().err
