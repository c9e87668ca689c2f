"""The recipe end to end: once short, once in full on the real photos."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, UnknownNameError
from aihwkit_lora.recipes import RECIPES, run_recipe
from aihwkit_lora.recipes.face_data import data_folder
from aihwkit_lora.recipes.face_recognition import NEGATION_STRENGTHS, FaceRecognition
from aihwkit_lora.reporting import RunReport
from aihwkit_lora.unlearning.objectives import apply_negation_
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seals, verify_seals
from aihwkit_lora.unlearning.verification import ForgettingReport

EVERY_ARM = "reprogram, deploy_once, digital, in_situ"
SHORT = FaceRecognition(
    baselines=EVERY_ARM,
    learn_epochs=2,
    forget_epochs=1,
    continue_epochs=1,
    noise_microsiemens=(1, 5),
    noise_chips=3,
    restore_epochs=1,
    reprogram_forget_epochs=1,
    reprogram_continue_epochs=1,
    in_situ_forget_epochs=1,
    in_situ_continue_epochs=1,
    photos_per_person=12,
)
BASELINE = ["learn", "program", "forget", "continue"]
STAGES = {
    "hybrid": [*BASELINE, "noise", "drift", "restore"],
    "reprogram": BASELINE,
    "deploy_once": BASELINE,
    "digital": ["learn", "forget", "continue"],
    "in_situ": BASELINE,
}
GROUPS = ("forget", "retain", "new")
CONTINUED = {"forget_accuracy", "retain_accuracy", "new_accuracy"}
EVALUATED = {
    "learn": {"learnt_accuracy"},
    "program": {"learnt_accuracy"},
    "forget": {"forget_accuracy", "retain_accuracy"},
    "continue": CONTINUED,
    "noise": {
        f"{model}/{group}_accuracy_at_{sigma}_us{worst}"
        for model in ("base", "hybrid")
        for group in GROUPS
        for sigma in (1, 5)
        for worst in ("", "_worst")
    },
    "drift": set(),  # nobody has measured how cells of rm-180nm drift
    "restore": CONTINUED | {f"noisy_{name}" for name in CONTINUED},
}
ADAPTED = {"forget", "continue", "restore"}
TRAINABLE = {
    "hybrid": {
        "learn": 5148, "program": 0, "forget": 1404, "continue": 1872,
        "noise": 0, "drift": 0, "restore": 1872,
    },
    "reprogram": {"learn": 5148, "program": 0, "forget": 5148, "continue": 5148},
    "deploy_once": {"learn": 5148, "program": 0, "forget": 5148, "continue": 5148},
    "digital": {"learn": 5148, "forget": 1404, "continue": 1872},
    "in_situ": {"learn": 5148, "program": 0, "forget": 5048, "continue": 5048},
}  # fmt: skip
RATIOS = [
    "deployment energy, all weights ÷ adapter",
    "trainable parameters",
    "update count, reprogram ÷ hybrid",
    "update energy, reprogram per step ÷ hybrid per step",
    "training energy, reprogram per image ÷ hybrid per image",
    "training energy, reprogram ÷ hybrid",
    "update energy, deploy_once ÷ hybrid",
    "training energy, deploy_once ÷ hybrid",
    "training energy, digital ÷ hybrid",
    "update energy, in_situ ÷ hybrid",
]
PULSES = ("set_pulses", "reset_pulses", "verify_reads")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("face") / "run"
    run_recipe(RECIPES.get("face_recognition"), SHORT, folder)
    return folder


@pytest.fixture(scope="module")
def stored(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def stages(stored, arm):
    return {stage["name"]: stage for stage in stored["arms"][arm]["stages"]}


def test_report_names_the_run(stored):
    head = {key: stored[key] for key in ("schema", "recipe", "chip", "seed")}
    assert head == {
        "schema": 1, "recipe": "face_recognition", "chip": "rm-180nm", "seed": 0,
    }  # fmt: skip
    assert stored["config"]["learnt"] == [0, 1, 2, 3, 4]
    assert stored["config"]["photos_per_person"] == 12
    assert set(stored["config"]) == set(FaceRecognition.__dataclass_fields__)
    assert {"python", "torch", "aihwkit", "peft", "platform"} <= set(stored["environment"])
    assert list(stored["arms"]) == ["hybrid", "reprogram", "deploy_once", "digital", "in_situ"]


def interval_in_order(found):
    assert set(found) == {"value", "low", "high"}
    assert 0.0 <= found["low"] <= found["value"] <= found["high"] < math.inf


@pytest.mark.parametrize("arm", STAGES)
def test_stages_have_all_fields(stored, arm):
    assert [stage["name"] for stage in stored["arms"][arm]["stages"]] == STAGES[arm]
    for name, stage in stages(stored, arm).items():
        off = {"adapter_off_forget_accuracy"} if arm == "hybrid" and name in ADAPTED else set()
        assert set(stage["metrics"]) == EVALUATED[name] | off
        assert all(0.0 <= value <= 1.0 for value in stage["metrics"].values())
        assert all(type(count) is int and count > 0 for count in stage["counts"].values())
        assert stage["trainable_parameters"] == TRAINABLE[arm][name]
        on_arrays = name == "program" or (arm not in ("digital", "in_situ") and name != "learn")
        assert len(stage["fingerprint"]) == (64 if on_arrays else 0)
        assert stage["wall_s"] > 0.0
        interval_in_order(stage["energy_j"])
        interval_in_order(stage["latency_s"])
        assert bool(stage["steps"]) == (name in ADAPTED)
    assert stages(stored, arm)["learn"]["counts"] == {}
    assert stages(stored, arm)["learn"]["energy_j"] == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize("arm", ["hybrid", "reprogram", "digital", "in_situ"])
def test_steps_add_up_to_their_stage(stored, arm):
    chip = al.chips.get("rm-180nm")
    report = RunReport.from_dict(stored)
    for stage in report.arms[arm]:
        if stage.name not in ADAPTED:
            continue
        assert [step.step for step in stage.steps] == list(range(1, len(stage.steps) + 1))
        assert sum(step.pulses for step in stage.steps) == stage.pulses
        energy = al.price(stage.counts, chip).energy_j
        assert stage.energy.energy_j == energy
        assert math.fsum(s.energy_j for s in stage.steps) == pytest.approx(energy.value, rel=1e-9)
        metrics = {name for name in EVALUATED[stage.name] if not name.startswith("noisy_")}
        assert set(stage.steps[-1].metrics) == metrics


def test_frozen_arm_writes_nothing_after_programming(stored):
    found = stages(stored, "hybrid")
    for name in ADAPTED:
        assert not set(PULSES) & set(found[name]["counts"])
        assert found[name]["level"] == "exact"
        assert all(step["pulses"] == 0 for step in found[name]["steps"])
    assert len({found[name]["fingerprint"] for name in STAGES["hybrid"][1:]}) == 1


def test_once_is_once_and_follows_the_training(stored):
    found = stages(stored, "deploy_once")
    for name in ("forget", "continue"):
        stage = found[name]
        assert all(step["pulses"] == 0 for step in stage["steps"])
        # The one write looks at each cell once, and once more after each pulse.
        pulses = stage["counts"].get("set_pulses", 0) + stage["counts"].get("reset_pulses", 0)
        assert stage["counts"]["verify_reads"] == 5_048 + pulses
        assert "cell_reads" not in stage["counts"]
        assert stage["counts"]["forward_macs"] >= 135 * 87_160
    assert len({found[name]["fingerprint"] for name in BASELINE[1:]}) > 1


def test_all_digital_writes_and_reads_no_array(stored):
    hybrid, found = stages(stored, "hybrid"), stages(stored, "digital")
    for name in ("forget", "continue"):
        assert not {*PULSES, "cell_reads"} & set(found[name]["counts"])
        own, beside = (stage[name]["counts"]["forward_macs"] for stage in (found, hybrid))
        assert own == beside + 135 * 87_160


def test_training_in_place_counts_pulses_and_nothing_else(stored):
    found = stages(stored, "in_situ")
    for name in ("forget", "continue"):
        assert set(found[name]["counts"]) == {"set_pulses", "reset_pulses"}
        assert found[name]["level"] == "simulated"
        assert found[name]["steps"][0]["pulses"] > 0


def test_noise_and_drift_are_written_out(out, stored):
    noise = json.loads((out / "noise.json").read_text(encoding="utf-8"))
    assert (noise["points"], noise["draws"]) == ([1.0, 5.0], 3)
    assert noise["groups"] == {"forget": [2], "retain": [0, 1, 3, 4], "new": [5]}
    assert (out / "noise.png").read_bytes().startswith(b"\x89PNG")
    drift = json.loads((out / "drift.json").read_text(encoding="utf-8"))
    assert "no source says how the cells of 'rm-180nm' drift" in drift["skipped"]


def test_programming_is_shared_and_counted(stored):
    hybrid, full = stages(stored, "hybrid"), stages(stored, "reprogram")
    assert hybrid["program"] == full["program"]
    assert hybrid["learn"] == full["learn"]
    counts = hybrid["program"]["counts"]
    assert counts["programmed_cells"] == 5048
    assert counts["verify_reads"] >= 5048
    assert counts["set_pulses"] > 0
    assert hybrid["program"]["level"] == "simulated"


def test_baseline_verifies_every_cell_in_every_step(stored):
    found = stages(stored, "reprogram")
    for name in ("forget", "continue"):
        pulses = sum(step["pulses"] for step in found[name]["steps"])
        assert found[name]["counts"]["verify_reads"] == 5_048 * 1 + pulses
    # The one step of forgetting may move no weight by more than the tolerance.
    assert found["continue"]["steps"][0]["pulses"] > 5_048
    assert found["continue"]["fingerprint"] != found["program"]["fingerprint"]


def test_counts_of_adaptation_follow_from_the_images(stored):
    # 12 photos: 2 test, 1 validation, 9 training, each with 2 copies; 5 people: 135 images.
    for name in ("forget", "continue"):
        hybrid, full = (stages(stored, arm)[name] for arm in ("hybrid", "reprogram"))
        assert (len(hybrid["steps"]), len(full["steps"])) == (2, 1)
        assert hybrid["counts"]["cell_reads"] == full["counts"]["cell_reads"] == 135 * 87_160
    assert stages(stored, "hybrid")["forget"]["counts"]["forward_macs"] == 135 * 20_124
    assert stages(stored, "hybrid")["continue"]["counts"]["forward_macs"] == 135 * 46_956
    assert stages(stored, "hybrid")["forget"]["counts"]["optimizer_updates"] == 2 * 1404
    assert stages(stored, "reprogram")["forget"]["counts"]["optimizer_updates"] == 5148
    assert stages(stored, "reprogram")["forget"]["counts"]["weight_gradient_macs"] == 135 * 87_160


def test_ratios_are_named_and_explained(stored):
    assert [ratio["name"] for ratio in stored["ratios"]] == RATIOS
    for ratio in stored["ratios"]:
        interval_in_order({key: ratio[key] for key in ("value", "low", "high")})
        assert all(ratio[text] for text in ("numerator", "denominator", "includes"))
    assert stored["ratios"][1]["value"] == 5148 / 1404


def test_folder_holds_picture_logs_and_stages(out, stored):
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for arm in ("hybrid", "reprogram", "in_situ"):
        for name in ("forget", "continue"):
            (file,) = (out / "logs" / f"{arm}-{name}").rglob("metrics.csv")
            with file.open(encoding="utf-8") as lines:
                rows = [row for row in csv.DictReader(lines) if row["pulses"]]
            counts = stages(stored, arm)[name]["counts"]
            for event in PULSES:
                assert sum(float(row[event]) for row in rows) == counts.get(event, 0)


def without_environment(report):
    plain = json.loads(json.dumps(report))
    plain.pop("environment")
    for arm in plain["arms"].values():
        for stage in arm["stages"]:
            stage.pop("wall_s")
    return plain


def test_resumed_run_takes_stages_from_disk_and_reports_the_same(out, stored):
    (out / "stages" / "reprogram-continue.pt").unlink()
    said = []
    recipe = RECIPES.get("face_recognition")
    report = run_recipe(recipe, SHORT, out, resume=True, say=said.append)
    taken = [sentence.split(":")[0] for sentence in said if "taken from" in sentence]
    hybrid = [f"hybrid-{name}" for name in STAGES["hybrid"][2:]]
    rest = [f"{arm}-{name}" for arm in list(STAGES)[2:] for name in ("forget", "continue")]
    assert taken == ["learn", "program", *hybrid, "reprogram-forget", *rest]
    assert without_environment(report.to_dict()) == without_environment(stored)
    again = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert without_environment(again) == without_environment(stored)


def test_chip_and_numbers_are_checked_before_anything_runs():
    with pytest.raises(UnknownNameError, match=r"unknown chip 'rm-180'. Did you mean 'rm-180nm'"):
        FaceRecognition(chip="rm-180")
    for name in ("learn_epochs", "continue_rank", "batch_size", "noise_chips", "drift_repeats"):
        with pytest.raises(ConfigurationError, match=f"expected {name} of at least 1, found 0"):
            FaceRecognition(**{name: 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learn_rate": 0.0}, "expected learn_rate above 0, found 0.0"),
        ({"restore_microsiemens": -1.0}, "expected restore_microsiemens of 0 or more, found -1.0"),
        ({"noise_microsiemens": ()}, r"noise_microsiemens with some σ of 0 µS or more.*found \(\)"),
        ({"noise_microsiemens": (1, 1)}, r"each once, found \(1, 1\)"),
        ({"verify": -1}, "expected verify of 0 or more, found -1"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        FaceRecognition(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "mixxer"}, "unknown model 'mixxer'. Did you mean 'mixer'"),
        ({"baselines": "digital, deploy"}, "unknown baseline 'deploy'. Did you mean 'deploy_once'"),
        ({"in_situ_device": "TikiTakaEcRamPreset"}, "one pulsed device per weight 'TikiTakaEcRam"),
    ],
)
def test_unknown_models_arms_and_devices_come_with_the_nearest(fields, message):
    with pytest.raises(UnknownNameError, match=message):
        FaceRecognition(**fields)


def test_arms_are_those_that_are_named_unless_there_shall_be_none():
    assert FaceRecognition().arms == ("reprogram", "deploy_once", "digital")
    assert FaceRecognition(baselines=" in_situ,digital, in_situ").arms == ("in_situ", "digital")
    assert FaceRecognition(baselines="").arms == FaceRecognition(baseline=False).arms == ()


def test_a_quick_run_takes_less_of_everything_and_reports_what_was_asked(tmp_path):
    config = FaceRecognition(
        quick=True, baseline=False, learn_epochs=1, continue_epochs=1, people=9, forgotten=7
    )
    assert config.resolved.learn_epochs == 1
    assert config.resolved.photos_per_person == 20
    assert config.resolved.noise_microsiemens == (1, 2)
    report = run_recipe(RECIPES.get("face_recognition"), config, tmp_path)
    assert report.config["quick"] is True
    assert report.config["learnt"] == list(range(9))
    # Ten outputs instead of six.
    assert report.stage("hybrid", "learn").trainable_parameters == 5148 + 4 * 20
    model = torch.load(tmp_path / "stages" / "hybrid-restore.pt", weights_only=False).model
    assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    (seal,) = seals(model)
    assert seal.request == "person 7"


def test_unknown_and_unsuitable_objectives_are_refused_before_anything_runs():
    with pytest.raises(UnknownNameError, match="unknown objective 'kl'"):
        FaceRecognition(objective="kl")
    with pytest.raises(ConfigurationError, match="objective 'esd': expected one for classifiers"):
        FaceRecognition(objective="esd")


@pytest.mark.parametrize("stage", ["hybrid-forget", "hybrid-continue", "hybrid-restore"])
def test_what_forgets_is_sealed_and_stays_sealed_on_disk(out, stage):
    model = torch.load(out / "stages" / f"{stage}.pt", weights_only=False).model
    verify_seals(model)
    (seal,) = seals(model)
    assert (seal.adapter, seal.request, seal.level) == ("forget", "person 2", "suppressed")


def test_looking_without_the_adapters_is_on_record(out):
    log = RequestLog(out / "requests.jsonl")
    assert log.verify() == 7
    # At the end of each stage of the arm that trains.
    assert [entry.kind for entry in log.entries()] == ["seal"] + ["audit-start", "audit-end"] * 3


def test_an_objective_with_a_reference_runs_through_and_the_baseline_does_without(tmp_path):
    config = replace(SHORT, objective="npo", baselines="reprogram")
    report = run_recipe(RECIPES.get("face_recognition"), config, tmp_path)
    assert report.config["objective"] == "npo"
    for arm in ("hybrid", "reprogram"):
        expected = TRAINABLE[arm]
        found = {stage.name: stage.trainable_parameters for stage in report.arms[arm]}
        assert found == expected
    # 135 images, 27 of them of the forgotten person, whom the reference reads again.
    forgot = {arm: report.arms[arm][2].counts["cell_reads"] for arm in ("hybrid", "reprogram")}
    assert forgot == {"hybrid": (135 + 27) * 87_160, "reprogram": 135 * 87_160}


def test_negation_is_turned_round_before_it_is_sealed(tmp_path, monkeypatch):
    turned = []

    def turn(model, adapter, strength):
        turned.append((len(seals(model)), adapter, strength))
        apply_negation_(model, adapter, strength)

    monkeypatch.setattr("aihwkit_lora.recipes.face_recognition.apply_negation_", turn)
    config = replace(SHORT, objective="negation", baseline=False)
    report = run_recipe(RECIPES.get("face_recognition"), config, tmp_path)
    # Every strength on a copy, then the best one on the model itself.
    *tried, chosen = [strength for _, _, strength in turned]
    assert tuple(tried) == NEGATION_STRENGTHS
    assert chosen in NEGATION_STRENGTHS
    assert {(seals, adapter) for seals, adapter, _ in turned} == {(0, "forget")}
    found = {stage.name: stage.trainable_parameters for stage in report.arms["hybrid"]}
    assert found == TRAINABLE["hybrid"]


def test_forgetting_is_verified_against_retrained_models(tmp_path):
    config = replace(SHORT, baseline=False, verify=2)
    said = []
    run_recipe(RECIPES.get("face_recognition"), config, tmp_path, say=said.append)
    report = ForgettingReport.read(tmp_path / "forgetting.json")
    assert report.level == "suppressed"
    assert report.references == 2
    assert report.retraining.pulses > 0  # both were programmed
    adapter_off = report.finding("adapter_off_accuracy")
    assert (tmp_path / "forgetting.md").read_text().count(adapter_off.title) == 2
    assert any(line.startswith("verification: ") and "not judged" in line for line in said)
    # The audit is on the record.
    kinds = [entry.kind for entry in RequestLog(tmp_path / "requests.jsonl").entries()]
    assert any("audit" in kind for kind in kinds)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not list((data_folder() / "scikit_learn_data").glob("olivetti*")),
    reason="no Olivetti faces in the folder that AIHWKIT_LORA_DATA names",
)
def test_real_faces_reach_the_figures_of_the_paper(tmp_path):
    config = FaceRecognition(data="olivetti", split="reference", download=False)
    report = run_recipe(RECIPES.get("face_recognition"), config, tmp_path)
    found = {stage.name: stage for stage in report.arms["hybrid"]}
    assert found["program"].metrics["learnt_accuracy"] >= 0.97
    assert found["forget"].metrics["forget_accuracy"] == 0.0
    assert found["forget"].metrics["retain_accuracy"] >= 0.95
    after = found["continue"].metrics
    assert after["forget_accuracy"] == 0.0
    assert min(after["retain_accuracy"], after["new_accuracy"]) >= 0.95
    assert found["forget"].pulses == found["continue"].pulses == 0
