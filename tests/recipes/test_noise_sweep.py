"""Accuracy under write noise: against closed forms, and as it is written down."""

from __future__ import annotations

import json

import pytest
import torch
from aihwkit.nn.conversion import convert_to_analog
from scipy import stats
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, DataError, StageError
from aihwkit_lora.recipes.accuracy_sweep import Hits, Spread
from aihwkit_lora.recipes.noise_sweep import NoiseSweep, noise_sweep
from aihwkit_lora.tiles.write_noise import noisy_outputs

CHIP = al.chips.get("rm-180nm")
GROUPS = {"forget": (1,), "retain": (0, 2)}
ALPHA = 1e-6
"""How often a right program fails a test here that draws: once in a million seeds."""


def frozen(net: nn.Module) -> nn.Module:
    config = CHIP.rpu_config()
    config.forward.is_perfect = True  # converters would add rounding of their own
    model: nn.Module = al.freeze_(convert_to_analog(net, config), programmed_by="test")
    return model


def classifier(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return frozen(nn.Sequential(nn.Linear(6, outputs)))


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    labels = torch.arange(3).repeat(20)
    return torch.randn(60, 6), labels


def test_two_classes_follow_the_normal_distribution() -> None:
    # Logits ±w·x with w far from the ends of the window: the error of their difference is normal,
    # its deviation √2·|x|·σ / 30 µS·max|w|, so P(right) = Φ(margin / deviation).
    weight = torch.tensor([[0.3, 0.2, 0.1], [-0.3, -0.2, -0.1], [0.0, 0.0, 1.0]])
    net = nn.Sequential(nn.Linear(3, 3, bias=False))
    net[0].weight.data = weight
    x, chips = torch.tensor([[1.0, -1.0, 0.0]]), 4000
    model = nn.Sequential(frozen(net), FirstTwo())
    found = noise_sweep(
        {"base": model},
        x,
        torch.tensor([0]),
        groups={"all": (0,)},
        sigmas_microsiemens=(1, 3, 6),
        chips=chips,
        seed=3,
        mapping=CHIP.mapping,
        at_once=500,
    )
    margin, length = 0.2, 2.0**0.5
    for sigma, spread in zip((1, 3, 6), found.spreads("base", "all"), strict=True):
        expected = stats.norm.cdf(margin / (2.0**0.5 * length * sigma / 30.0))
        deviation = (expected * (1.0 - expected) / chips) ** 0.5
        assert abs(spread.mean - expected) < stats.norm.isf(ALPHA / 2) * deviation + 1e-9
        # One sample is right or wrong: a Bernoulli variable, whose deviation is known as well.
        count = chips / (chips - 1)
        assert spread.std == pytest.approx((spread.mean * (1 - spread.mean) * count) ** 0.5)
        assert spread.worst == 0.0


class FirstTwo(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2]


def test_hardly_any_noise_costs_nothing(data) -> None:
    model = classifier()
    found = noise_sweep(
        {"base": model},
        *data,
        groups=GROUPS,
        sigmas_microsiemens=(1e-9,),
        chips=5,
        mapping=CHIP.mapping,
    )
    right = model(data[0]).argmax(dim=1) == data[1]
    for group, classes in GROUPS.items():
        own = torch.isin(data[1], torch.tensor(classes))
        expected = float(right[own].double().mean())
        assert found.clean("base", classes) == expected
        assert found.metrics()[f"base/{group}_accuracy_at_1e-09_us"] == expected
        assert found.metrics()[f"base/{group}_accuracy_at_1e-09_us_worst"] == expected


def test_accuracies_are_those_of_the_noisy_outputs(data) -> None:
    models = {"base": classifier(), "wide": classifier(outputs=4)}
    inputs, labels = data
    found = noise_sweep(
        models,
        inputs,
        labels,
        groups=GROUPS,
        sigmas_microsiemens=(2, 5, 10),
        chips=7,
        seed=4,
        mapping=CHIP.mapping,
    )
    for name, model in models.items():
        for index, sigma in enumerate((2e-6, 5e-6, 10e-6)):
            logits = noisy_outputs(
                model, inputs, chips=7, sigma_siemens=sigma, seed=4, mapping=CHIP.mapping
            )
            for group, classes in GROUPS.items():
                own = torch.isin(labels, torch.tensor(classes))
                each = [
                    float((chip[own].argmax(dim=1) == labels[own]).double().mean())
                    for chip in logits
                ]
                spread = found.spreads(name, group)[index]
                assert spread.mean == pytest.approx(sum(each) / 7, rel=1e-12)
                assert spread.worst == (max(each) if group == "forget" else min(each))


def test_models_and_random_states_are_left_as_they_were(data) -> None:
    model = classifier().train()
    before, state = al.fingerprint(model), torch.get_rng_state()
    options = {"groups": GROUPS, "sigmas_microsiemens": (3,), "chips": 2, "mapping": CHIP.mapping}
    first, second = (noise_sweep({"base": model}, *data, **options) for _ in range(2))
    assert model.training
    assert al.fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert first.to_dict() == second.to_dict()


def test_a_class_without_output_is_absent(data) -> None:
    inputs, labels = data
    found = noise_sweep(
        {"base": classifier(outputs=2), "hybrid": classifier()},
        inputs,
        labels,
        groups={"forget": (1,), "retain": (0,), "new": (2,)},
        sigmas_microsiemens=(1, 2, 3),
        chips=3,
        mapping=CHIP.mapping,
    )
    assert found.groups_of("base") == ("forget", "retain")
    named = [key for key in found.metrics() if "new" in key]
    assert named
    assert all(key.startswith("hybrid/new_accuracy_at_") for key in named)
    assert set(found.to_dict()["models"]["base"]["clean"]["classes"]) == {"0", "1"}


def test_groups_that_nobody_can_name_are_not_drawn(data, tmp_path) -> None:
    inputs, labels = data
    found = noise_sweep(
        {"base": classifier(outputs=2)},
        inputs,
        labels,
        groups={"new": (2,)},
        sigmas_microsiemens=(1,),
        chips=1,
        mapping=CHIP.mapping,
    )
    found.write(tmp_path)
    assert found.metrics() == {}
    assert [file.name for file in tmp_path.iterdir()] == ["noise.json"]


def test_files_hold_every_model_sigma_and_class(data, tmp_path) -> None:
    found = noise_sweep(
        {"base": classifier(), "hybrid": classifier()},
        *data,
        groups=GROUPS,
        sigmas_microsiemens=(1, 5, 10),
        chips=3,
        mapping=CHIP.mapping,
    )
    found.write(tmp_path / "sweep")
    stored = json.loads((tmp_path / "sweep" / "noise.json").read_text(encoding="utf-8"))
    assert stored == found.to_dict()
    assert (stored["points"], stored["draws"], stored["unit"]) == ([1.0, 5.0, 10.0], 3, "uS")
    for model in ("base", "hybrid"):
        points = stored["models"][model]["points"]
        assert [point["at"] for point in points] == stored["points"]
        for point in points:
            assert set(point["classes"]) == {"0", "1", "2"}
            assert all(set(each) == {"mean", "std", "worst"} for each in point["classes"].values())
            # The groups' accuracies are those of their classes, of which all have 20 samples.
            kept = [point["classes"][c]["mean"] for c in ("0", "2")]
            assert point["groups"]["retain"]["mean"] == pytest.approx(sum(kept) / 2)
    assert (tmp_path / "sweep" / "noise.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_draw_has_no_spread() -> None:
    assert Spread.of(torch.tensor([0.5]), high_is_bad=True) == Spread(mean=0.5, std=0, worst=0.5)


def test_hits_are_counted_by_class() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]], [[0.0, 1.0]] * 3])
    counts = Hits.per_class(logits, torch.tensor([0, 1, 1]))
    assert counts.tolist() == [[1, 1], [0, 2]]


def test_what_cannot_be_swept_is_refused(data) -> None:
    model, mapping = classifier(), CHIP.mapping
    with pytest.raises(ConfigurationError, match="expected at least one model, got none"):
        noise_sweep({}, *data, groups=GROUPS)
    with pytest.raises(ConfigurationError, match="expected at least one group of classes"):
        noise_sweep({"base": model}, *data, groups={})
    for sigmas in ((), (1, 1), (-1,)):
        with pytest.raises(ConfigurationError, match="expected different points of 0 or more"):
            noise_sweep({"base": model}, *data, groups=GROUPS, sigmas_microsiemens=sigmas)
    for classes in ((), (0, 3)):
        with pytest.raises(DataError, match=r"group 'new': .* samples of \(0, 1, 2\)"):
            noise_sweep({"base": model}, *data, groups={"new": classes})
    with pytest.raises(ConfigurationError, match="expected 1 draw or more at each point, got 0"):
        noise_sweep({"base": model}, *data, groups=GROUPS, chips=0, mapping=mapping)
    with pytest.raises(StageError, match="frozen"):
        noise_sweep({"base": nn.Linear(6, 3)}, *data, groups=GROUPS, mapping=mapping)


def test_points_are_named_as_people_write_them() -> None:
    assert [NoiseSweep.key(point) for point in (1.0, 10.0, 0.5)] == [
        "at_1_us",
        "at_10_us",
        "at_0.5_us",
    ]
