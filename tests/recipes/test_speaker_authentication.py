"""The recipe end to end: once short, once quick, once in full on the spoken digits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, SealError, UnknownNameError
from aihwkit_lora.recipes import speaker_authentication
from aihwkit_lora.recipes.face_data import data_folder
from aihwkit_lora.recipes.options import build, read_yaml
from aihwkit_lora.recipes.recipe import RECIPES, run_recipe
from aihwkit_lora.recipes.run_folder import RunFolder
from aihwkit_lora.recipes.speaker_authentication import Job, SpeakerAuthentication
from aihwkit_lora.recipes.speaker_data import FSDD_FOLDER, load_speakers
from aihwkit_lora.unlearning.seal import seals, verify_seals

RECIPE = RECIPES.get("speaker_authentication")
SHORT = SpeakerAuthentication(
    hidden=40,
    clips_per_speaker=20,
    learn_epochs=2,
    forget_epochs=1,
    continue_epochs=1,
    restore_epochs=1,
    noise_microsiemens=(1, 5),
    noise_chips=3,
    noise_clips=3,
    restore_microsiemens=2.0,
    batch_size=32,
    reprogram_forget_steps=2,
    reprogram_continue_steps=2,
    reprogram_batch_size=35,
)
ADAPTED = ["forget", "continue"]
STAGES = {
    "hybrid": ["learn", "program", *ADAPTED, "noise", "drift", "restore"],
    "reprogram": ["learn", "program", *ADAPTED],
    "deploy_once": ["learn", "program", *ADAPTED],
    "digital": ["learn", *ADAPTED],
}
FORGOT = {"forget_accuracy", "retain_accuracy"}
CONTINUED = FORGOT | {"new_accuracy", "known_accuracy"}
INSIDE = {"probe_forget_accuracy", "adapter_off_forget_accuracy"}
SERIES = {"known_accuracy_mean", "known_accuracy_worst", "forget_accuracy_worst"}
SWEEP = {
    f"{model}/{group}_accuracy_at_{sigma}_us{worst}"
    for model, groups in (("base", ("forget", "retain")), ("hybrid", ("forget", "retain", "new")))
    for group in groups
    for sigma in (1, 2, 5)
    for worst in ("", "_worst")
}
METRICS = {
    "hybrid": {
        "learn": {"learnt_accuracy"},
        "program": {"learnt_accuracy"},
        "forget": FORGOT | INSIDE,
        "continue": CONTINUED | INSIDE,
        "noise": CONTINUED | SERIES | SWEEP,
        "drift": set(),
        "restore": CONTINUED | INSIDE,
    },
    "reprogram": {"forget": FORGOT, "continue": CONTINUED},
    "deploy_once": {"forget": FORGOT, "continue": CONTINUED},
    "digital": {"forget": FORGOT | INSIDE, "continue": CONTINUED | INSIDE},
}
WEIGHTS = 140 * 40 + 40 * 40 + 40 * 5
BRANCH = 8 * (140 + 40) + 8 * (40 + 40)
EVERYTHING = {"forget": WEIGHTS + 85, "continue": WEIGHTS + 85 + 41}
TRAINABLE = {
    "hybrid": {
        "learn": WEIGHTS + 85,
        "program": 0,
        "forget": BRANCH,
        "continue": BRANCH + 41,
        "noise": 0,
        "drift": 0,
        "restore": BRANCH,
    },
    "reprogram": EVERYTHING,
    "deploy_once": EVERYTHING,
    "digital": {"forget": BRANCH, "continue": BRANCH + 41},
}
TRAINED = {"hybrid": (*ADAPTED, "restore"), **{arm: tuple(ADAPTED) for arm in list(STAGES)[1:]}}
PULSES = ("set_pulses", "reset_pulses", "verify_reads")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaker") / "run"
    run_recipe(RECIPE, SHORT, folder)
    return folder


@pytest.fixture(scope="module")
def stored(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def stages(stored, arm):
    return {stage["name"]: stage for stage in stored["arms"][arm]["stages"]}


def model_after(out, stage):
    return torch.load(out / "stages" / f"{stage}.pt", weights_only=False).model


@pytest.mark.parametrize("arm", list(STAGES))
def test_stages_have_all_fields(stored, arm):
    assert [stage["name"] for stage in stored["arms"][arm]["stages"]] == STAGES[arm]
    for name, metrics in METRICS[arm].items():
        stage = stages(stored, arm)[name]
        assert set(stage["metrics"]) == metrics
        assert all(0.0 <= value <= 1.0 for value in stage["metrics"].values())
        assert stage["trainable_parameters"] == TRAINABLE[arm][name]
        on_arrays = name != "learn" and arm != "digital"
        assert len(stage["fingerprint"]) == (64 if on_arrays else 0)
        assert bool(stage["steps"]) == (name in TRAINED[arm])
        assert (stage["energy_j"]["value"] > 0.0) == (name not in ("learn", "noise", "drift"))


def test_report_names_the_run(stored):
    head = {key: stored[key] for key in ("recipe", "chip", "seed")}
    assert head == {"recipe": "speaker_authentication", "chip": "rm-180nm", "seed": 0}
    assert set(stored["config"]) == set(SpeakerAuthentication.__dataclass_fields__)
    names = [ratio["name"] for ratio in stored["ratios"]]
    assert "training energy, reprogram per clip ÷ hybrid per clip" in names
    assert {"training energy, digital ÷ hybrid", "update energy, deploy_once ÷ hybrid"} <= {*names}
    assert not any("per image" in json.dumps(ratio) for ratio in stored["ratios"])


def test_frozen_arm_writes_nothing_after_programming(stored):
    found = stages(stored, "hybrid")
    assert found["program"]["counts"]["programmed_cells"] == WEIGHTS
    assert found["program"]["counts"]["set_pulses"] > 0
    for name in ("forget", "continue", "noise", "drift", "restore"):
        assert not set(PULSES) & set(found[name]["counts"])
    prints = {found[name]["fingerprint"] for name in STAGES["hybrid"][1:]}
    assert len(prints) == 1


def test_counts_follow_from_the_clips(stored):
    # 20 clips each: 4 test, 2 validation, 14 training; 5 people learnt: 70 clips, all to forget.
    # Then 14 new ones, and 4 of each of four kept speakers, repeated to 14: 70 clips again.
    hybrid, full = stages(stored, "hybrid"), stages(stored, "reprogram")
    for name in ("forget", "continue"):
        assert [len(arm[name]["steps"]) for arm in (hybrid, full)] == [3, 2]
    dense = 10 * (140 * 40 + 40 * 40) + 40 * 5
    for arm, name in ((hybrid, "forget"), (hybrid, "restore"), (full, "forget")):
        assert arm[name]["counts"]["cell_reads"] == 70 * dense
    assert hybrid["forget"]["counts"]["forward_macs"] == 70 * 10 * BRANCH
    assert hybrid["continue"]["counts"]["forward_macs"] == 70 * (20 * BRANCH + 40)
    assert hybrid["restore"]["counts"]["forward_macs"] == 70 * (30 * BRANCH + 40)
    assert hybrid["forget"]["counts"]["optimizer_updates"] == 3 * BRANCH
    for name in ("forget", "continue", "restore"):
        counts = hybrid[name]["counts"]
        assert 0 < counts["active_row_drives"] < counts["row_drives"]


def test_full_update_is_written_once_and_the_rest_is_digital(stored):
    found = stages(stored, "deploy_once")
    dense = 10 * (140 * 40 + 40 * 40) + 40 * 5
    for name, new_row in (("forget", 0), ("continue", 40)):
        counts = found[name]["counts"]
        assert counts["programmed_cells"] == WEIGHTS
        assert counts["set_pulses"] > 0
        assert "cell_reads" not in counts
        assert counts["forward_macs"] == 70 * (dense + new_row)
        assert counts["optimizer_updates"] == 3 * EVERYTHING[name]
    prints = [found[name]["fingerprint"] for name in STAGES["deploy_once"][1:]]
    assert len(set(prints)) == 3


def test_digital_arm_does_the_work_of_the_arrays_in_multiplications(stored):
    hybrid, digital = stages(stored, "hybrid"), stages(stored, "digital")
    for name in ADAPTED:
        counts = digital[name]["counts"]
        assert not {*PULSES, "cell_reads"} & set(counts)
        dense = hybrid[name]["counts"]["cell_reads"]
        assert counts["forward_macs"] == dense + hybrid[name]["counts"]["forward_macs"]
        assert counts["optimizer_updates"] == hybrid[name]["counts"]["optimizer_updates"]


def test_noise_is_swept_on_the_first_clips_and_drawn(out, stored):
    sweep = json.loads((out / "noise.json").read_text(encoding="utf-8"))
    assert (sweep["points"], sweep["draws"]) == ([1.0, 2.0, 5.0], 3)
    assert sweep["samples"] == [3] * 6
    assert (out / "noise.png").stat().st_size > 1000
    # Mean and worst at the noise of the restored chip are those of the sweep.
    metrics = stages(stored, "hybrid")["noise"]["metrics"]
    kept, new = (metrics[f"hybrid/{group}_accuracy_at_2_us"] for group in ("retain", "new"))
    assert metrics["known_accuracy_mean"] == pytest.approx((4 * kept + new) / 5)
    assert metrics["forget_accuracy_worst"] == metrics["hybrid/forget_accuracy_at_2_us_worst"]


def test_drift_without_a_source_is_skipped_with_the_reason(out):
    found = json.loads((out / "drift.json").read_text(encoding="utf-8"))
    assert found["skipped"].startswith("no source says how the cells of 'rm-180nm' drift")
    assert not (out / "drift.png").exists()


def test_drift_is_followed_where_the_chip_has_a_model(out, tmp_path):
    config = replace(SHORT, chip="hermes-14nm", drift_repeats=2)
    folder = RunFolder(tmp_path, recipe=RECIPE.name, config={})
    job = Job(config, load_speakers(config), al.chips.get(config.chip), folder)
    base = job.program(model_after(out, "learn")).model
    record = job.drift(base, base).record
    assert {key for key in record.metrics if key.endswith("31536000s")} == {
        f"{model}/{group}_accuracy_at_31536000s"
        for model in ("base", "hybrid")
        for group in ("forget", "retain")
    }
    assert (tmp_path / "drift.png").exists()


def test_steps_add_up_to_their_stage(stored):
    for arm in ("hybrid", "reprogram", "digital"):
        for name in TRAINED[arm]:
            stage = stages(stored, arm)[name]
            energy = math.fsum(step["energy_j"] for step in stage["steps"])
            assert energy == pytest.approx(stage["energy_j"]["value"], rel=1e-9)


def test_forgetting_is_sealed_and_stays_active(out):
    assert not seals(model_after(out, "program"))
    model = model_after(out, "hybrid-restore")
    assert [(seal.adapter, seal.request) for seal in seals(model)] == [("forget", "speaker 1")]
    assert list(model.active_adapters) == ["forget", "continue", "restore"]
    verify_seals(model)
    with (
        pytest.raises(SealError, match="sealed adapter 'forget'"),
        model.disable_adapter(),
    ):
        pass
    # Every look at the model without it is on the record: after continuing and after restoring.
    (seal,) = seals(model)
    kinds = [entry.kind for entry in seal.log.entries()]
    assert kinds == ["seal", *["audit-start", "audit-end"] * 2]


def test_only_the_newest_branch_moves(out):
    before, after = (model_after(out, f"hybrid-{name}") for name in ("continue", "restore"))
    now = {name: parameter.detach() for name, parameter in after.named_parameters()}
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, now[name]), name
    moved = [name for name in now if name not in dict(before.named_parameters())]
    assert all(".restore." in name for name in moved)
    assert any(bool(now[name].any()) for name in moved if "lora_B" in name)


def test_adapters_are_left_for_deployment(out):
    for name in ("forget", "continue", "restore"):
        assert (out / "adapters" / name / "adapter_model.safetensors").stat().st_size > 4 * BRANCH


def without_times(report):
    plain = json.loads(json.dumps(report))
    plain.pop("environment")
    for arm in plain["arms"].values():
        for stage in arm["stages"]:
            stage.pop("wall_s")
    return plain


def test_resumed_run_takes_stages_from_disk_and_reports_the_same(out, stored):
    again = ("hybrid-noise", "hybrid-restore", "reprogram-continue", "deploy_once-continue")
    for stage in again:
        (out / "stages" / f"{stage}.pt").unlink()
    said = []
    report = run_recipe(RECIPE, SHORT, out, resume=True, say=said.append)
    taken = [sentence.split(":")[0] for sentence in said if "taken from" in sentence]
    assert taken == [
        "learn",
        "program",
        "hybrid-forget",
        "hybrid-continue",
        "hybrid-drift",
        "reprogram-forget",
        "deploy_once-forget",
        "digital-forget",
        "digital-continue",
    ]
    assert without_times(report.to_dict()) == without_times(stored)


def test_options_are_checked_before_anything_runs():
    with pytest.raises(UnknownNameError, match=r"unknown chip 'rm-180'. Did you mean 'rm-180nm'"):
        SpeakerAuthentication(chip="rm-180")
    with pytest.raises(UnknownNameError, match="unknown neuron 'lif'"):
        SpeakerAuthentication(neuron="lif")
    with pytest.raises(UnknownNameError, match="unknown baseline 'digitial'"):
        SpeakerAuthentication(baselines="reprogram, digitial")
    for name in ("learn_epochs", "rank", "noise_chips", "noise_clips", "batch_size", "hidden"):
        with pytest.raises(ConfigurationError, match=f"expected {name} of at least 1, found 0"):
            SpeakerAuthentication(**{name: 0})
    for sigmas in ((), (1, 1), (-1, 2)):
        with pytest.raises(ConfigurationError, match="expected noise_microsiemens with some σ"):
            SpeakerAuthentication(noise_microsiemens=sigmas)
    for name in ("weight_noise", "restore_microsiemens"):
        with pytest.raises(ConfigurationError, match=f"expected {name} of 0 or more, found -1"):
            SpeakerAuthentication(**{name: -1.0})
    with pytest.raises(ConfigurationError, match="expected replay above 0, up to 1, found 0"):
        SpeakerAuthentication(replay=0.0)


def test_quick_run_is_smaller_in_everything_that_takes_time():
    plain = SpeakerAuthentication()
    assert plain.resolved is plain
    quick = SpeakerAuthentication(quick=True, restore_epochs=1).resolved
    assert quick.clips_per_speaker == 30
    assert (quick.restore_epochs, quick.noise_chips, quick.noise_microsiemens) == (1, 2, (1, 2))
    assert all(
        getattr(quick, name) <= getattr(plain, name) / 2
        for name in SpeakerAuthentication.__dataclass_fields__
        if name.endswith(("_epochs", "_steps"))
    )


def test_shipped_yaml_is_a_configuration():
    file = Path(speaker_authentication.__file__).parent / "configs" / "speaker_fsdd.yaml"
    assert build(SpeakerAuthentication, read_yaml(file)) == SpeakerAuthentication(data="fsdd")


@pytest.mark.slow
def test_quick_run_of_the_whole_network(tmp_path):
    report = run_recipe(RECIPE, SpeakerAuthentication(quick=True), tmp_path)
    assert [stage.name for stage in report.arms["hybrid"]] == STAGES["hybrid"]
    assert report.stage("hybrid", "forget").trainable_parameters == 13_408
    assert report.stage("hybrid", "learn").metrics["learnt_accuracy"] > 0.5


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not (data_folder() / FSDD_FOLDER).exists(),
    reason="no spoken digits in the folder that AIHWKIT_LORA_DATA names",
)
def test_spoken_digits_reach_the_figures_of_the_docs(tmp_path):
    config = SpeakerAuthentication(data="fsdd", baseline=False, download=False)
    report = run_recipe(RECIPE, config, tmp_path)
    found = {stage.name: stage.metrics for stage in report.arms["hybrid"]}
    assert found["program"]["learnt_accuracy"] >= 0.98
    assert found["forget"]["forget_accuracy"] <= 0.01
    assert found["forget"]["retain_accuracy"] >= 0.98
    assert found["continue"]["new_accuracy"] >= 0.95
    assert found["continue"]["retain_accuracy"] >= 0.97
    assert max(found[name]["forget_accuracy"] for name in ("continue", "restore")) <= 0.02
    assert found["restore"]["known_accuracy"] >= found["continue"]["known_accuracy"] - 0.01
    assert al.chips.get(config.chip).name == report.chip


def test_snntorch_computes_the_same_run(tmp_path):
    pytest.importorskip("snntorch", reason="snntorch is not installed (extra 'snn')")
    one_arm = replace(SHORT, baseline=False)
    reports = [
        run_recipe(RECIPE, replace(one_arm, neuron=neuron), tmp_path / neuron).to_dict()
        for neuron in ("torch", "snntorch")
    ]
    found = [[stage["metrics"] for stage in each["arms"]["hybrid"]["stages"]] for each in reports]
    assert found[0] == found[1]
