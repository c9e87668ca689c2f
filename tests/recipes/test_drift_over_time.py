"""Accuracy over a year after programming: against a closed form, and where nobody has numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from aihwkit.inference import PCMLikeNoiseModel
from aihwkit.inference.noise.base import BaseNoiseModel
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, DataError, StageError
from aihwkit_lora.recipes.drift_over_time import (
    SECONDS,
    DriftOverTime,
    NoDrift,
    drift_on,
    drift_over_time,
    drift_times,
)

HERMES = al.chips.get("hermes-14nm")
GROUPS = {"forget": (1,), "retain": (0, 2)}


class Fading(BaseNoiseModel):
    """Conductances that halve within an hour and turn their sign after a day, without noise."""

    def apply_programming_noise_to_conductance(self, g_target: torch.Tensor) -> torch.Tensor:
        return g_target

    def generate_drift_coefficients(self, g_target: torch.Tensor) -> torch.Tensor:
        return g_target

    def apply_drift_noise_to_conductance(
        self, g_prog: torch.Tensor, drift_noise_param: torch.Tensor, t_inference: float
    ) -> torch.Tensor:
        return g_prog * (0.5 if t_inference <= 3600.0 else 0.0)


def frozen(outputs: int = 3, chip: al.chips.Chip = HERMES) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, outputs))
    net[0].bias.data = torch.tensor([0.0, 0.0, 0.1, 0.2])[:outputs]
    model: nn.Module = al.freeze_(al.convert(net, chip), programmed_by="test")
    return model


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(60, 6), torch.arange(3).repeat(20)


def test_cells_that_fade_leave_the_digital_bias(data) -> None:
    # With all conductances gone the bias alone decides: class 2, always.
    found = drift_over_time(
        {"base": frozen(chip=replace(HERMES, drift_compensation=None))},
        *data,
        groups={"first": (0,), "second": (1,), "third": (2,)},
        seconds=(60.0, 86400.0, 864000.0),
        repeats=3,
        noise_model=Fading(),
    )
    for point in ("at_86400s", "at_864000s"):
        values = [
            found.metrics()[f"base/{group}_accuracy_{point}"]
            for group in ("first", "second", "third")
        ]
        assert values == [0.0, 0.0, 1.0]


def test_accuracies_are_those_of_drifted_models(data) -> None:
    inputs, labels = data
    model = frozen()
    found = drift_over_time(
        {"hybrid": model}, inputs, labels, groups=GROUPS, seconds=SECONDS, repeats=4, seed=5
    )
    each: dict[str, list[float]] = {group: [] for group in GROUPS}
    for draw in range(4):
        again = frozen()
        torch.manual_seed(5 + draw)
        with torch.no_grad():
            for time in SECONDS:
                logits = al.drift_(again, time)(inputs)
        for group, classes in GROUPS.items():
            own = torch.isin(labels, torch.tensor(classes))
            each[group].append(float((logits[own].argmax(1) == labels[own]).double().mean()))
    metrics = found.metrics()
    for group, values in each.items():
        key = f"hybrid/{group}_accuracy_at_31536000s"
        assert metrics[key] == pytest.approx(sum(values) / 4, rel=1e-12)
        assert metrics[f"{key}_worst"] == (max(values) if group == "forget" else min(values))


def test_as_programmed_is_where_it_starts(data) -> None:
    model = frozen()
    found = drift_over_time({"base": model}, *data, groups=GROUPS, seconds=(0.0, 1.0), repeats=2)
    right = model(data[0]).argmax(dim=1) == data[1]
    for group, classes in GROUPS.items():
        expected = float(right[torch.isin(data[1], torch.tensor(classes))].double().mean())
        assert found.clean("base", classes) == expected
        assert found.metrics()[f"base/{group}_accuracy_at_0s"] == expected


def test_models_keep_their_time_fate_and_mode(data) -> None:
    model = al.drift_(frozen().train(), 3600.0)
    array = model[0].analog_module
    seen, fate, before = array.tensors, array.fate, al.fingerprint(model)
    state = torch.get_rng_state()
    first, second = (
        drift_over_time({"base": model}, *data, groups=GROUPS, repeats=2) for _ in range(2)
    )
    assert first.to_dict() == second.to_dict()
    assert (array.tensors, array.fate, array.seconds) == (seen, fate, 3600.0)
    assert model.training
    assert al.fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_files_hold_every_time(data, tmp_path) -> None:
    found = drift_on(HERMES, {"base": frozen(2), "hybrid": frozen()}, *data, groups=GROUPS)
    found.write(tmp_path)
    stored = json.loads((tmp_path / "drift.json").read_text(encoding="utf-8"))
    assert isinstance(found, DriftOverTime)
    assert stored == found.to_dict()
    assert (stored["unit"], stored["draws"], stored["points"]) == ("s", 10, list(SECONDS))
    assert list(stored["models"]["base"]["points"][0]["groups"]) == ["forget"]
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_source_nothing_is_computed(data, tmp_path) -> None:
    chip = al.chips.get("rm-180nm")
    found = drift_on(chip, {"base": frozen(chip=chip)}, *data, groups=GROUPS)
    assert found == NoDrift(chip="rm-180nm")
    assert found.metrics() == {}
    found.write(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "drift.json").read_text(encoding="utf-8"))
    assert stored["skipped"].startswith("no source says how the cells of 'rm-180nm' drift")
    assert not (tmp_path / "new" / "drift.png").exists()


def test_a_source_with_single_times_is_asked_for_those(data) -> None:
    chip = al.chips.get("neurram-130nm")
    assert drift_times(chip) == (1.0, 86400.0, 172800.0)
    found = drift_on(chip, {"base": frozen(chip=chip)}, *data, groups=GROUPS, repeats=2)
    assert isinstance(found, DriftOverTime)
    assert found.points == drift_times(chip)
    with pytest.raises(ConfigurationError, match="expected a time that ReRamWan2022NoiseModel has"):
        drift_over_time({"base": frozen(chip=chip)}, *data, groups=GROUPS)


def test_what_cannot_be_followed_is_refused(data) -> None:
    model = frozen()
    with pytest.raises(ConfigurationError, match="expected 1 draw or more at each point, got 0"):
        drift_over_time({"base": model}, *data, groups=GROUPS, repeats=0)
    with pytest.raises(ConfigurationError, match="expected different points of 0 or more"):
        drift_over_time({"base": model}, *data, groups=GROUPS, seconds=(1.0, 1.0))
    with pytest.raises(DataError, match="group 'new'"):
        drift_over_time({"base": model}, *data, groups={"new": (5,)})
    with pytest.raises(StageError, match="frozen"):
        drift_over_time({"base": nn.Linear(6, 3)}, *data, groups=GROUPS)
    unknown = frozen(chip=al.chips.get("rm-180nm"))
    with pytest.raises(ConfigurationError, match="expected a noise model that says how its cells"):
        drift_over_time({"base": unknown}, *data, groups=GROUPS)
    found = drift_over_time(
        {"base": unknown}, *data, groups=GROUPS, repeats=1, noise_model=PCMLikeNoiseModel()
    )
    assert found.draws == 1
