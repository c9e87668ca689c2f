"""The whole recipe, with a tiny model and few steps: every stage, every count, no quality."""

import dataclasses
import json

import pytest
import torch

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, SealError, UnknownNameError
from aihwkit_lora.recipes.image_generation import ImageGeneration
from aihwkit_lora.recipes.options import build
from aihwkit_lora.recipes.recipe import RECIPES, run_recipe
from aihwkit_lora.unlearning.request_log import RequestLog

ARMS = {
    "hybrid": ["learn", "program", "forget", "continue", "noise", "drift", "restore"],
    "digital": ["learn", "forget", "continue"],
    "deploy_once": ["learn", "program", "forget", "continue"],
}
# Width 16, one block: fc1 16 -> 64 and fc2 64 -> 16, rank 4 for forgetting and 8 for more.
FORGETTING, LEARNING = (2 * rank * (16 + 64) for rank in (4, 8))
PULSES = {"set_pulses", "reset_pulses", "verify_reads"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "run"
    run_recipe(RECIPES.get("image_generation"), ImageGeneration(quick=True), folder)
    return folder


@pytest.fixture(scope="module")
def stored(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def stages(stored, arm):
    return {stage["name"]: stage for stage in stored["arms"][arm]["stages"]}


def test_report_has_all_arms_and_stages(stored):
    found = {arm: [s["name"] for s in each["stages"]] for arm, each in stored["arms"].items()}
    assert found == ARMS
    assert stored["recipe"] == "image_generation"
    assert set(stored["config"]) == {f.name for f in dataclasses.fields(ImageGeneration)}
    # The report says what was asked for; quick runs say that they were.
    assert stored["config"]["quick"]
    assert stored["config"]["learn_steps"] > 100


def test_metrics_are_there_when_they_exist(stored):
    kept = {"retain_accuracy", "retain_object_accuracy", "forget_accuracy", "unseen_accuracy"}
    for arm in ARMS:
        found = stages(stored, arm)
        assert {"learnt_accuracy", "judge_noise_rejected"} <= found["learn"]["metrics"].keys()
        assert kept <= found["forget"]["metrics"].keys()
        assert kept | {"new_accuracy", "frechet_ratio"} <= found["continue"]["metrics"].keys()
        assert "new_accuracy" not in found["forget"]["metrics"]
    noise = stages(stored, "hybrid")["noise"]["metrics"]
    for model in ("base", "hybrid"):
        assert {f"{model}/retain_accuracy_at_{sigma}_us_worst" for sigma in (1, 10)} <= noise.keys()
    assert stages(stored, "hybrid")["drift"]["metrics"] == {}  # nobody knows how its cells drift
    restored = stages(stored, "hybrid")["restore"]["metrics"]
    assert {"retain_accuracy", "noisy_retain_accuracy"} <= restored.keys()


def test_arrays_stay_as_they_were_programmed(stored):
    found = stages(stored, "hybrid")
    assert len({found[name]["fingerprint"] for name in ARMS["hybrid"][1:]}) == 1
    for name in ("forget", "continue", "restore"):
        assert not PULSES & found[name]["counts"].keys()
        assert found[name]["counts"]["tile_reads"] > 0
        assert [step["step"] for step in found[name]["steps"]] == [1, 2]
        assert sum(s["energy_j"] for s in found[name]["steps"]) == pytest.approx(
            found[name]["energy_j"]["value"]
        )


def test_adapters_and_one_row_are_trained(stored):
    for arm in ("hybrid", "digital"):
        found = stages(stored, arm)
        assert found["forget"]["trainable_parameters"] == FORGETTING
        assert found["continue"]["trainable_parameters"] == LEARNING + 16
    assert stages(stored, "hybrid")["restore"]["trainable_parameters"] == LEARNING
    assert stages(stored, "hybrid")["noise"]["trainable_parameters"] == 0
    assert stages(stored, "hybrid")["continue"]["counts"]["optimizer_updates"] == 2 * (
        LEARNING + 16
    )


def test_without_arrays_every_product_is_digital(stored):
    counts = stages(stored, "digital")["forget"]["counts"]
    assert counts["forward_macs"] > stages(stored, "hybrid")["forget"]["counts"]["forward_macs"]
    assert "tile_reads" not in counts


def test_the_full_update_writes_once_for_each_stage(stored):
    found = stages(stored, "deploy_once")
    weights = found["program"]["counts"]["programmed_cells"]
    for name in ("forget", "continue"):
        counts = found[name]["counts"]
        assert counts["verify_reads"] >= weights
        assert all(step["pulses"] == 0 for step in found[name]["steps"])
        assert found[name]["trainable_parameters"] > weights
    prints = [found[name]["fingerprint"] for name in ("program", "forget", "continue")]
    assert len(set(prints)) == 3


def test_the_forgetting_branch_is_sealed_and_logged(out):
    stage = torch.load(out / "stages" / "hybrid-continue.pt", weights_only=False)
    with pytest.raises(SealError, match="style fraktur"), stage.model.disable_adapter():
        pass
    al.verify(stage.model)
    entries = RequestLog(out / "requests.jsonl").entries()
    assert [entry.request for entry in entries] == ["style fraktur"]


def test_pictures_are_drawn_of_every_stage(out):
    names = {file.stem for file in (out / "pictures").glob("*.png")}
    assert {"learn", "program", "hybrid-forget", "hybrid-continue", "hybrid-restore"} <= names
    assert (out / "report.png").exists()
    assert (out / "noise.png").exists()


def test_ratios_are_named(stored):
    assert [ratio["name"] for ratio in stored["ratios"]] == [
        "deployment energy, all weights ÷ adapter",
        "trainable parameters",
        "update energy, deploy_once ÷ hybrid",
        "training energy, deploy_once ÷ hybrid",
        "training energy, digital ÷ hybrid",
    ]


def test_a_resumed_run_takes_stages_from_disk(out, stored):
    (out / "stages" / "hybrid-restore.pt").unlink()
    said = []
    recipe, config = RECIPES.get("image_generation"), ImageGeneration(quick=True)
    report = run_recipe(recipe, config, out, resume=True, say=said.append)
    again = {s.split(":")[0] for s in said if "done in" in s}
    assert again == {"hybrid-restore"}
    for arm in ARMS:
        for before, now in zip(stored["arms"][arm]["stages"], report.arms[arm], strict=True):
            assert dict(now.metrics) == before["metrics"], (arm, now.name)
            assert dict(now.counts) == before["counts"]
            assert now.fingerprint == before["fingerprint"]


def test_convnext_another_way_to_forget_and_a_chip_that_drifts_run_too(tmp_path):
    config = ImageGeneration(
        quick=True, baseline=False, block="convnext", objective="gaussian_target",
        noise_microsiemens=(2,), chip="hermes-14nm",
    )  # fmt: skip
    report = run_recipe(RECIPES.get("image_generation"), config, tmp_path)
    assert list(report.arms) == ["hybrid"]
    assert report.stage("hybrid", "forget").counts["tile_reads"] > 0
    drift = report.stage("hybrid", "drift").metrics
    assert {key for key in drift if key.endswith("31536000s")} == {
        f"{model}/{group}_accuracy_at_31536000s"
        for model in ("base", "hybrid")
        for group in ("forget", "retain", "new")
    }
    assert (tmp_path / "drift.png").exists()


def test_options_are_checked_before_anything_runs():
    with pytest.raises(UnknownNameError, match="unknown chip 'rm-180'"):
        ImageGeneration(chip="rm-180")
    for name in ("learn_steps", "continue_rank", "batch_size", "per_cell", "noise_chips"):
        with pytest.raises(ConfigurationError, match=f"expected {name} of at least 1, found 0"):
            ImageGeneration(**{name: 0})
    with pytest.raises(ConfigurationError, match="'gaussian_target' or 'pseudo_class', found 'npo"):
        ImageGeneration(objective="npo")
    with pytest.raises(ConfigurationError, match=r"weight_clip above 0, found 0\.0"):
        ImageGeneration(weight_clip=0.0)
    with pytest.raises(ConfigurationError, match=r"weight_decay of 0 or more, found -0\.1"):
        ImageGeneration(weight_decay=-0.1)
    with pytest.raises(ConfigurationError, match="block 'attention' or 'convnext', found 'mlp'"):
        ImageGeneration(block="mlp")
    with pytest.raises(ConfigurationError, match=r"at least one error, .* of at least 1 µS, found"):
        ImageGeneration(noise_microsiemens=())
    with pytest.raises(ConfigurationError, match="restore_microsiemens of 0 or more, found -1"):
        ImageGeneration(restore_microsiemens=-1)


def test_options_come_from_yaml():
    assert build(ImageGeneration, {"noise_microsiemens": [1, 3], "lora_scale": 4}).lora_scale == 4.0
    with pytest.raises(ConfigurationError, match=r"option 'forgoten'\. Did you mean 'forgot"):
        build(ImageGeneration, {"forgoten": "script"})
