"""The whole recipe, with a tiny model and few steps: every stage, every count, no quality."""

import dataclasses
import json

import pytest
import torch

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, SealError, UnknownNameError
from aihwkit_lora.recipes.lm_data import load_texts
from aihwkit_lora.recipes.lm_unlearning import Job, LmUnlearning
from aihwkit_lora.recipes.recipe import RECIPES, run_recipe
from aihwkit_lora.recipes.run_folder import RunFolder
from aihwkit_lora.unlearning.request_log import RequestLog

ARMS = {
    "hybrid": ["learn", "program", "forget", "continue", "noise", "restore"],
    "digital": ["learn", "forget", "continue"],
    "deploy_once": ["learn", "program", "forget", "continue"],
}
# Width 16, one block, rank 8: four layers 16 -> 16, fc1 16 -> 64, fc2 64 -> 16.
ADAPTER = 8 * (4 * (16 + 16) + 2 * (16 + 64))
PULSES = {"set_pulses", "reset_pulses", "verify_reads"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authors") / "run"
    run_recipe(RECIPES.get("lm_unlearning"), LmUnlearning(quick=True), folder)
    return folder


@pytest.fixture(scope="module")
def stored(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def stages(stored, arm):
    return {stage["name"]: stage for stage in stored["arms"][arm]["stages"]}


def test_report_has_all_arms_and_stages(stored):
    found = {arm: [s["name"] for s in each["stages"]] for arm, each in stored["arms"].items()}
    assert found == ARMS
    assert stored["recipe"] == "lm_unlearning"
    assert set(stored["config"]) == {f.name for f in dataclasses.fields(LmUnlearning)}
    # The report says what was asked for; quick runs say that they were.
    assert stored["config"]["quick"]
    assert stored["config"]["learn_steps"] > 100


def test_metrics_are_there_when_they_exist(stored):
    kept = {"retain_accuracy", "forget_accuracy", "forget_truth_ratio", "model_utility"}
    for arm in ("hybrid", "digital", "deploy_once"):
        found = stages(stored, arm)
        assert {"learnt_accuracy", *kept} <= found["learn"]["metrics"].keys()
        assert {*kept, "forget_quality", "retrained_forget_accuracy"} <= found["forget"][
            "metrics"
        ].keys()
        assert {*kept, "new_accuracy"} <= found["continue"]["metrics"].keys()
        assert "new_accuracy" not in found["forget"]["metrics"]
    # How well the test tells the two models apart before anything is forgotten.
    assert "forget_quality" in stages(stored, "hybrid")["program"]["metrics"]
    for arm in ("hybrid", "digital"):
        assert "adapter_off_forget_accuracy" in stages(stored, arm)["forget"]["metrics"]
    restored = stages(stored, "hybrid")["restore"]["metrics"]
    assert {"retain_accuracy", "noisy_retain_accuracy"} <= restored.keys()


def test_noise_is_swept_for_the_base_and_the_hybrid_model(out, stored):
    metrics = stages(stored, "hybrid")["noise"]["metrics"]
    for model in ("base", "hybrid"):
        for name in ("forget", "retain", "new"):
            for sigma in (1, 2, 5):
                assert f"{model}/{name}_accuracy_at_{sigma}_us_worst" in metrics
    assert (out / "noise.json").exists()
    # Nobody has measured how the cells of this chip drift.
    assert "skipped" in json.loads((out / "drift.json").read_text(encoding="utf-8"))


def test_arrays_stay_as_they_were_programmed(stored):
    found = stages(stored, "hybrid")
    assert len({found[name]["fingerprint"] for name in ARMS["hybrid"][1:]}) == 1
    for name in ("forget", "continue", "restore"):
        assert not PULSES & found[name]["counts"].keys()
        assert found[name]["counts"]["tile_reads"] > 0
        assert [step["step"] for step in found[name]["steps"]] == [1, 2]


def test_adapters_are_trained_and_nothing_else(stored):
    for arm in ("hybrid", "digital"):
        for name in ("forget", "continue"):
            assert stages(stored, arm)[name]["trainable_parameters"] == ADAPTER
            assert stages(stored, arm)[name]["counts"]["optimizer_updates"] == 2 * ADAPTER
    assert stages(stored, "hybrid")["restore"]["trainable_parameters"] == ADAPTER
    assert stages(stored, "hybrid")["noise"]["trainable_parameters"] == 0


def test_asking_for_the_stand_ins_is_counted(stored):
    found = stages(stored, "hybrid")
    for name in ("continue", "restore"):
        steps = sum(step["energy_j"] for step in found[name]["steps"])
        assert found[name]["energy_j"]["value"] > steps > 0
    steps = sum(step["energy_j"] for step in found["forget"]["steps"])
    assert found["forget"]["energy_j"]["value"] == pytest.approx(steps)


def test_whatever_the_model_says_fits_as_an_answer(tmp_path):
    config = LmUnlearning(quick=True).shortened()
    folder = RunFolder(tmp_path, recipe="lm_unlearning", config={})
    job = Job(config, load_texts(config), al.chips.get("rm-180nm"), folder)
    asked = job.data.forget[0].text
    # A word of the texts is one token; what is none is spelt out, and may be many.
    for words in (["the"], ["<start>"] * job.longest, []):
        answer = job._answered(asked, words).answer.split()
        taken = len(job.tokenizer.encode(asked)) + len(job.tokenizer.encode(" ".join(answer))) + 3
        assert taken <= job.longest
        assert answer == words[: len(answer)]
        assert bool(answer) == bool(words)


def test_the_full_update_writes_once_for_each_stage(stored):
    found = stages(stored, "deploy_once")
    weights = found["program"]["counts"]["programmed_cells"]
    for name in ("forget", "continue"):
        assert found[name]["counts"]["verify_reads"] >= weights
        assert all(step["pulses"] == 0 for step in found[name]["steps"])
        assert found[name]["trainable_parameters"] > weights
    prints = [found[name]["fingerprint"] for name in ("program", "forget", "continue")]
    assert len(set(prints)) == 3


def test_the_forgetting_branch_is_sealed_and_logged(out):
    stage = torch.load(out / "stages" / "hybrid-continue.pt", weights_only=False)
    with pytest.raises(SealError, match="8 questions about authors"), stage.model.disable_adapter():
        pass
    al.verify(stage.model)
    entries = RequestLog(out / "requests.jsonl").entries()
    assert [entry.request for entry in entries] == ["8 questions about authors"]


def test_the_head_is_digital(out):
    stage = torch.load(out / "stages" / "program.pt", weights_only=False)
    names = [name for name, _ in al.frozen_layers(stage.model)]
    assert len(names) == 6
    assert "head" not in names


def test_ratios_are_named(stored):
    assert [ratio["name"] for ratio in stored["ratios"]] == [
        "deployment energy, all weights ÷ adapter",
        "trainable parameters",
        "update energy, deploy_once ÷ hybrid",
        "training energy, deploy_once ÷ hybrid",
        "training energy, digital ÷ hybrid",
    ]


def test_a_resumed_run_takes_stages_from_disk(out, stored):
    file = out / "stages" / "hybrid-restore.pt"
    trained = torch.load(file, weights_only=False).model.state_dict()
    file.unlink()
    said = []
    recipe, config = RECIPES.get("lm_unlearning"), LmUnlearning(quick=True)
    report = run_recipe(recipe, config, out, resume=True, say=said.append)
    assert {s.split(":")[0] for s in said if "done in" in s} == {"hybrid-restore"}
    # A fresh branch starts from the seed, not from what ran before in the process.
    again = torch.load(file, weights_only=False).model.state_dict()
    assert any("lora_A.restore" in name for name in trained)
    assert all(torch.equal(again[name], value) for name, value in trained.items())
    for arm in ARMS:
        for before, now in zip(stored["arms"][arm]["stages"], report.arms[arm], strict=True):
            assert dict(now.metrics) == before["metrics"], (arm, now.name)
            assert dict(now.counts) == before["counts"]


def test_another_objective_an_array_for_the_head_and_tofu_run_too(tmp_path):
    files = {"forget01": 20, "retain99": 60}
    for name, count in files.items():
        rows = [{"question": f"{name} {i}?", "answer": f"It is {i}."} for i in range(count)]
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    config = LmUnlearning(
        quick=True, baseline=False, data="tofu", folder=str(tmp_path), vocabulary=20,
        objective="token_ga", head="array", noise_microsiemens=(2,), stand_ins=False,
    )  # fmt: skip
    report = run_recipe(RECIPES.get("lm_unlearning"), config, tmp_path / "run")
    assert list(report.arms) == ["hybrid"]
    assert report.stage("hybrid", "forget").counts["tile_reads"] > 0
    assert "forget_quality" not in report.stage("hybrid", "forget").metrics


def test_options_are_checked_before_anything_runs():
    with pytest.raises(UnknownNameError, match="unknown chip 'rm-180'"):
        LmUnlearning(chip="rm-180")
    for name in ("learn_steps", "rank", "batch_size", "vocabulary", "judged", "noise_chips"):
        with pytest.raises(ConfigurationError, match=f"expected {name} of at least 1, found 0"):
            LmUnlearning(**{name: 0})
    with pytest.raises(ConfigurationError, match="'token_npo' or 'token_simnpo', found 'npo'"):
        LmUnlearning(objective="npo")
    with pytest.raises(ConfigurationError, match="head 'digital' or 'array', found 'tied'"):
        LmUnlearning(head="tied")
    for name in ("weight_clip", "beta"):
        with pytest.raises(ConfigurationError, match=rf"expected {name} above 0, found 0\.0"):
            LmUnlearning(**{name: 0.0})
    with pytest.raises(ConfigurationError, match=r"errors of at least 1 µS, found \(\)"):
        LmUnlearning(noise_microsiemens=())
    with pytest.raises(ConfigurationError, match="heads=4 and width=30"):
        LmUnlearning(width=30)
