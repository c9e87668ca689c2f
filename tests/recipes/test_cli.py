"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from aihwkit_lora import chips
from aihwkit_lora._environment import Check
from aihwkit_lora.errors import ConfigurationError, StageError
from aihwkit_lora.recipes import RECIPES, cli, run_command
from aihwkit_lora.recipes.face_recognition import Job
from aihwkit_lora.reporting import RunReport

RUN = ["run", "face_recognition"]
SHORT = [
    "--quick", "--learn-epochs", "1", "--forget-epochs", "1", "--continue-epochs", "1",
    "--no-baseline", "--photos-per-person", "5", "--noise-chips", "1", "--noise-microsiemens", "1",
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


def test_a_recipe_runs_with_the_threads_it_asks_for(monkeypatch):
    seen = []

    def run(recipe, *_, **__):
        seen.append((recipe.name, torch.get_num_threads()))
        raise ConfigurationError("enough")

    monkeypatch.setattr(run_command, "run_recipe", run)
    for name in ("image_generation", "face_recognition"):
        assert cli.main(["run", name]) == 2
    assert seen == [("image_generation", 2), ("face_recognition", 1)]


def test_chips_are_listed_side_by_side(capsys):
    assert cli.main(["chips"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{name}: {chips.get(name).title}" for name in chips.names()[:3]]
    assert any(line.split() == list(chips.names()) for line in lines)
    figures = {line[:28].strip(): line[28:].split("  ") for line in lines if line.startswith("  ")}
    read = [cell.strip() for cell in figures["read a full tile"] if cell.strip()]
    assert read == ["13.4 nJ", "7.16 nJ", "11.3 nJ *"]
    # HERMES: its pulse widths are a library's, but how many pulses a cell takes is assumed.
    written = [cell.strip() for cell in figures["time of that, one by one"] if cell.strip()]
    assert written == ["12.7 µs *", "18.0 µs *", "18.0 µs *"]
    time = [cell.strip() for cell in figures["time of that read"] if cell.strip()]
    assert time == ["133 ns", "7.53 µs", "1.00 µs *"]
    assert any(line.startswith("* assumed: ") for line in lines)


def test_the_table_of_the_docs_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = (Path(__file__).parents[2] / "docs" / "chips.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(.*?)^```", page, re.S | re.M)
    assert cli.main(["chips"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = block.splitlines()
    assert printed[: len(shown)] == shown


def test_without_a_name_every_number_of_every_chip_follows(capsys):
    assert cli.main(["chips"]) == 0
    whole = capsys.readouterr().out
    for name in chips.names():
        assert cli.main(["chips", name]) == 0
        assert capsys.readouterr().out.split(chips.get(name).title)[1] in whole


@pytest.mark.parametrize("name", chips.names())
def test_a_chip_shows_every_number_with_range_status_and_source(capsys, name):
    assert cli.main(["chips", name]) == 0
    out, chip = capsys.readouterr().out, chips.get(name)
    assert chip.title in out
    numbers = {**chip.facts, "endurance": chip.endurance_pulses}
    numbers |= {f"energy of {event}": price for event, price in chip.prices.energy.items()}
    numbers |= {f"time of {event}": price for event, price in chip.prices.latency.items()}
    shown = {line[2:].split("  ")[0]: line for line in out.splitlines() if line.startswith("  ")}
    for what, quantity in numbers.items():
        line = shown[what]
        assert f"  {quantity.status}" in line
        assert (f"{quantity.status} *" in line) == (quantity.status == "assumed")
        assert quantity.source[:60] in line
        assert ("[" in line.split(f"  {quantity.status}")[0]) == (quantity.low != quantity.high)
    assert "energy unpriced: activation_functions, verify_comparisons" in out
    assert "time unpriced: activation_functions, additions, forward_macs" in out
    assert out.count("\n* assumed: ") == 1


def test_a_chip_of_ones_own_is_checked_and_shown(capsys):
    assert cli.main(["chips", "rm-180nm", "--yaml"]) == 0
    text = capsys.readouterr().out
    Path("mine.yaml").write_text(text.replace("name: rm-180nm", "name: mine"))
    for command in (["chips", "--check", "mine.yaml"], ["chips", "mine.yaml"]):
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        assert any(line.split() == ["mine"] for line in out.splitlines())
        assert "energy of set_pulses" in out
        assert "energy unpriced: activation_functions, verify_comparisons" in out
    assert cli.main(["chips", "mine.yaml", "--yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {**yaml.safe_load(text), "name": "mine"}


def test_a_chip_without_some_prices_shows_dashes(capsys):
    assert cli.main(["chips", "rm-180nm", "--yaml"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    values["prices"] |= {"energy": {}, "latency": {}}
    del values["endurance_pulses"], values["facts"]
    Path("bare.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["chips", "--check", "bare.yaml"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for what in ("write a cell", "read a full tile", "off-chip bit", "endurance, pulses"):
        assert (
            re.sub(" +", " ", next(line for line in lines if line.startswith(what))) == f"{what} –"
        )
    # No fact says where its tolerance comes from.
    assert any(line.startswith("accepted error") and line.endswith("1.00 µS *") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chips", "rm-180"], "unknown chip 'rm-180'. Did you mean 'rm-180nm'"),
        (["chips", "--check", "gone.yaml"], "expected a chip in 'gone.yaml', got: No such file"),
        (["chips", "gone.yml"], "expected a chip in 'gone.yml', got: No such file"),
        (["chips", "--yaml"], "expected a chip to write. Known: hermes-14nm"),
        (["chips", "rm-180nm", "--check", "x.yaml"], "argument --check: not allowed with argument"),
        (["run", "face_recogniton"], "unknown recipe 'face_recogniton'. Did you mean 'face_rec"),
        (["run"], "expected a recipe. Known: face_recognition"),
        (["run", "--seed", "4", "face_recognition"], "expected a recipe. Known: face_recognition"),
        (["run", "--config", "face_oliveti"], "Did you mean 'face_olivetti'"),
        (
            [*RUN, "--config", "image_letters"],
            "expected options of 'face_recognition', found those",
        ),
        ([*RUN, "--seed", "1", "--seeds", "1", "2"], "expected --seed or --seeds, found both"),
        ([*RUN, "--seeds", "1", "2", "1"], "expected seeds, all different, found [1, 2, 1]"),
        ([*RUN, "--seeds"], "argument --seeds: expected at least one argument"),
        (["page", "nowhere"], "nowhere/report.json: expected a report"),
        (["compare", "nowhere"], "nowhere/report.json: expected a report"),
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


def test_a_file_that_describes_no_chip_ends_with_2_and_names_the_key(capsys):
    assert cli.main(["chips", "rm-180nm", "--yaml"]) == 0
    text = capsys.readouterr().out
    Path("wrong.yaml").write_text(text.replace("  tolerance:", "  tolerence:"))
    assert cli.main(["chips", "--check", "wrong.yaml"]) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: 'wrong.yaml': write_policy: unknown key 'tolerence'. Did")
    assert found.out == ""


def test_help_of_run_lists_recipes(capsys):
    assert cli.main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: aihwkit-lora run RECIPE" in out
    assert "face_recognition: " in out


def test_a_configuration_that_names_its_recipe_is_enough(monkeypatch):
    seen = []

    def stop(self):
        seen.append(self.config)
        raise StageError("far enough")

    monkeypatch.setattr(Job, "learn", stop)
    Path("mine.yaml").write_text("recipe: face_recognition\nmargin: 2\nseed: 5\n")
    for first in (["run"], RUN):
        assert cli.main([*first, "--config", "mine.yaml", "--seed", "4", "--out", "x"]) == 2
    assert cli.main(["run", "--config", "face_digits", "--forgotten", "3"]) == 2
    one, two, three = seen
    assert one == two
    assert (one.seed, one.margin) == (4, 2.0)
    assert (three.data, three.forgotten) == ("digits", 3)


def test_each_seed_has_a_folder_and_finished_ones_are_skipped(capsys, monkeypatch, tmp_path):
    command = [*RUN, *SHORT, "--seeds", "3", "5", "--out", "seeds"]
    with monkeypatch.context() as patch:
        whole = Job.continue_

        def fail(self, forgotten):
            if self.config.seed == 5:
                raise KeyboardInterrupt
            return whole(self, forgotten)

        patch.setattr(Job, "continue_", fail)
        assert cli.main(command) == 130
    found = capsys.readouterr()
    assert "seed 3 (1 of 2)" in found.out
    assert "seed-3/program, seed-5/hybrid-forget" in found.err
    (line,) = (line for line in found.err.splitlines() if line.startswith("Resume with: "))
    first = (tmp_path / "seeds" / "seed-3" / "report.json").stat().st_mtime_ns
    assert cli.main(line.removeprefix("Resume with: aihwkit-lora ").split()) == 0
    out = capsys.readouterr().out
    assert "finished already: seeds/seed-3/report.json" in out
    assert "hybrid-forget: taken from seeds/seed-5" in out
    assert "A: rm-180nm, seeds 3, 5" in out
    assert (tmp_path / "seeds" / "seed-3" / "report.json").stat().st_mtime_ns == first
    assert out.endswith("page:    aihwkit-lora page seeds\n")
    # A seed that is new starts; one of another configuration is refused.
    longer = [*command, "--resume", "--forget-epochs", "2"]
    assert cli.main(longer) == 2
    assert "forget_epochs = 1 then and 2 now" in capsys.readouterr().err
    # All of them make one page, whatever the nesting, each once.
    assert cli.main(["page", "seeds", "seeds/seed-3", "--out", "page.md"]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "### face_recognition on rm-180nm, seeds 3, 5" in text
    assert (tmp_path / "page.png").exists()
    assert cli.main(["page", "seeds"]) == 0
    assert capsys.readouterr().out == text.replace(
        "![Energy of adapting, by arm, workload and chip](page.png)\n\n", ""
    )
    assert cli.main(["compare", "seeds"]) == 0
    assert "A: rm-180nm, seeds 3, 5" in capsys.readouterr().out


def test_seeds_of_a_recipe_that_counts_them_itself_stay_its_own(monkeypatch):
    seen = []

    def stop(config, _):
        seen.append(config)
        raise StageError("far enough")

    recipe = RECIPES.get("unlearning_objectives")
    monkeypatch.setitem(RECIPES._entries, recipe.name, replace(recipe, run=stop))
    assert cli.main(["run", recipe.name, "--seeds", "2", "--seed", "7"]) == 2
    (config,) = seen
    assert (config.seeds, config.seed) == (2, 7)


def test_a_run_without_steps_has_no_picture(capsys, monkeypatch, tmp_path):
    recipe = RECIPES.get("face_recognition")
    empty = {"chip": "rm-180nm", "config": {}, "environment": {}, "arms": {}, "ratios": ()}
    made = RunReport(recipe=recipe.name, seed=0, **empty)
    monkeypatch.setitem(RECIPES._entries, recipe.name, replace(recipe, run=lambda *_: made))
    assert cli.main([*RUN, "--out", "empty"]) == 0
    assert capsys.readouterr().out.endswith("report:  empty/report.json\n")
    assert not (tmp_path / "empty" / "report.png").exists()


def test_help_of_a_recipe_lists_its_options(capsys):
    assert cli.main([*RUN, "--help"]) == 0
    out = capsys.readouterr().out
    options = (
        "--out",
        "--config",
        "--resume",
        "--seeds",
        "--forget-rank",
        "--no-baseline",
        "--learnt",
    )
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
    summary = ran[ran.index("\n", ran.rindex(": done in")) : ran.index("\nreport:")]
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


def test_runs_of_one_recipe_are_put_side_by_side(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    empty = {"recipe": "face_recognition", "chip": "rm-180nm", "config": {}, "environment": {}}
    for seed in (0, 1):
        report = RunReport(**empty, seed=seed, arms={"hybrid": ()}, ratios=())
        report.write(tmp_path / str(seed) / "report.json")
    assert cli.main(["compare", str(tmp_path / "0"), str(tmp_path / "1" / "report.json")]) == 0
    assert "seed" in capsys.readouterr().out


def test_named_ratios_of_published_workloads(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["ratios", "rm-180nm", "--utilisation", "0.5"]) == 0
    assert "rm-180nm" in capsys.readouterr().out


def test_the_utilisation_of_a_gpu_has_to_be_stated(capsys):
    assert cli.main(["ratios"]) == 2
    assert "--utilisation" in capsys.readouterr().err
