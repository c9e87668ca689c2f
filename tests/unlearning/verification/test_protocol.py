"""The protocol on a model that forgot, one that did not, and one that never knew."""

from __future__ import annotations

import copy
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.tiles.write_noise import evaluate_noisy
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_
from aihwkit_lora.unlearning.verification import (
    Criteria,
    ForgettingReport,
    RelearnAttack,
    Retrained,
    RetrainedReferences,
    Verdict,
    verify_forgetting,
)

CHIP = al.chips.get("rm-180nm")
QUICK: dict[str, Any] = {"relearn": None, "bits": (), "chips": 0}


def accuracy(model: nn.Module, pair: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(pair[0]).argmax(dim=1) == pair[1]).double().mean())


@pytest.fixture(scope="module")
def report(_case: Any) -> ForgettingReport:
    return verify_forgetting(
        copy.deepcopy(_case.model), **_case.sets, retrained=_case.retrained, chips=20, seed=3
    )


def test_a_suppressed_class_passes_as_used_and_is_back_without_the_adapter(
    report: ForgettingReport, case: Any
) -> None:
    assert report.level == "suppressed"
    assert report.reference == "3 retrained models"
    for name in ("forget", "forget_test", "retain", "test"):
        finding = report.finding(f"{name}_accuracy")
        assert finding.value == accuracy(case.model.eval(), case.sets[name])
        assert finding.retrained == tuple(accuracy(r, case.sets[name]) for r in case.retrained)
        assert finding.low <= finding.value <= finding.high
        assert finding.verdict == Verdict.PASS
    off = report.finding("adapter_off_accuracy")
    with torch.no_grad(), case.model.disable_adapter():
        assert off.value == accuracy(case.model, case.sets["forget"])
    assert off.value > 0.9
    assert off.verdict == Verdict.FAIL
    assert "The arrays still hold what was forgotten" in report.does_not_show[0]


def test_divergence_and_tug_of_war_follow_their_formulas(
    report: ForgettingReport, case: Any
) -> None:
    names = ("forget", "retain", "test")
    models = [case.model.eval(), *case.retrained]
    accuracies = [[accuracy(model, case.sets[name]) for name in names] for model in models]

    def product(one: list[float], other: list[float]) -> float:
        return math.prod(1.0 - abs(a - b) for a, b in zip(one, other, strict=True))

    def js(one: nn.Module, other: nn.Module) -> float:
        p, q = (m(case.sets["forget"][0]).double().softmax(dim=1) for m in (one, other))
        middle = (p + q) / 2
        parts = [(each * (each / middle).log()).nan_to_num(0.0).sum(dim=1) for each in (p, q)]
        return float(((parts[0] + parts[1]) / 2).mean())

    war = report.finding("tug_of_war")
    assert war.value == pytest.approx(sum(product(accuracies[0], r) for r in accuracies[1:]) / 3)
    pairs = [product(a, b) for a, b in combinations(accuracies[1:], 2)]
    assert war.retrained == pytest.approx(pairs)
    with torch.no_grad():
        divergence = report.finding("js_forget")
        expected = sum(js(models[0], other) for other in models[1:]) / 3
        floors = [js(a, b) for a, b in combinations(models[1:], 2)]
    assert divergence.value == pytest.approx(expected)
    assert divergence.retrained == pytest.approx(floors)
    assert (divergence.verdict == Verdict.PASS) == (expected <= 1.5 * max(floors))
    assert divergence.low < divergence.value < divergence.high


def test_noisy_chips_are_the_ones_that_anybody_can_draw(
    report: ForgettingReport, case: Any
) -> None:
    model = case.model.eval()
    for name in ("forget", "retain"):
        loop = evaluate_noisy(model, lambda m: accuracy(m, case.sets[name]), chips=20, seed=3)  # noqa: B023
        assert list(report.series[f"noisy_{name}_accuracy"]) == loop
    forgotten = report.series["noisy_forget_accuracy"]
    assert report.finding("noisy_worst_accuracy").value == max(forgotten)
    assert report.finding("noisy_mean_accuracy").value == pytest.approx(sum(forgotten) / 20)


def test_adapters_in_few_bits_are_those_of_the_digital_unit(
    report: ForgettingReport, case: Any
) -> None:
    assert report.series["bits"] == (8, 7, 6, 5, 4, 3, 2)
    seen = []
    for bits in (8, 7, 6, 5, 4, 3, 2):
        twin = al.digitize_(copy.deepcopy(case.model), al.DigitalUnit(bits=bits))
        seen.append(accuracy(twin.eval(), case.sets["forget"]))
    assert list(report.series["quantised_forget_accuracy"]) == seen
    assert report.finding("quantised_accuracy").value == max(seen)


def test_relearning_and_probe_are_compared_with_retrained_models(
    report: ForgettingReport,
) -> None:
    steps = report.finding("relearn_steps")
    for name, reached in zip(
        ("relearning", *(f"relearning_retrained_{i}" for i in range(3))),
        (steps.value, *steps.retrained),
        strict=True,
    ):
        curve = report.series[name]
        assert len(curve) == 31
        assert reached == next((i for i, a in enumerate(curve) if a >= 0.8), None)
    probe = report.finding("linear_probe")
    assert probe.value > 0.8
    assert min(probe.retrained) > 0.5
    assert "layer '2'" in probe.note


def test_a_model_that_still_knows_fails(case: Any) -> None:
    model = al.convert(case.learnt, CHIP)
    al.program_(model, CHIP, seed=0)
    report = verify_forgetting(
        al.freeze_(model), **case.three, retrained=case.retrained, chips=3, relearn=None
    )
    failed = {each.name for each in report.findings if each.verdict == Verdict.FAIL}
    assert {"forget_accuracy", "tug_of_war", "js_forget", "noisy_worst_accuracy"} <= failed
    assert "Not tried: relearning, quantised adapters, adapters off." in report.does_not_show


def test_a_network_that_never_knew_passes_without_any_array(case: Any) -> None:
    report = verify_forgetting(
        case.retrain(7), **case.sets, retrained=case.retrained, level="reprogrammed"
    )
    assert report.count("fail") == 0
    assert {"forget_accuracy", "tug_of_war", "js_forget", "relearn_steps", "linear_probe"} <= {
        each.name for each in report.findings if each.verdict == Verdict.PASS
    }
    expected = "Not tried: quantised adapters, noisy programmings, adapters off."
    assert expected in report.does_not_show


def test_without_retrained_models_nothing_is_judged(case: Any) -> None:
    report = verify_forgetting(case.model, **case.three, bits=(4, 2), chips=2)
    assert report.reference == "no reference"
    assert report.count("not judged") == len(report.findings)
    assert "no reference" in {each.criterion for each in report.findings}
    names = {each.name for each in report.findings}
    assert not names & {"tug_of_war", "js_forget", "js_retain"}
    assert any(sentence.startswith("No reference:") for sentence in report.does_not_show)


def test_one_retrained_model_has_no_floor(case: Any) -> None:
    report = verify_forgetting(case.model, **case.three, retrained=case.retrained[:1], **QUICK)
    for name in ("tug_of_war", "js_forget"):
        assert report.finding(name).verdict == Verdict.NOT_JUDGED
        assert report.finding(name).criterion == "needs two retrained models"
    assert any("has no spread" in sentence for sentence in report.does_not_show)


def test_the_model_is_left_as_it_was(case: Any) -> None:
    model = case.model.train()
    al.digitize_(model, al.DigitalUnit())
    flags = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    fingerprint, random = al.fingerprint(model), torch.get_rng_state()
    verify_forgetting(model, **case.three, retrained=case.retrained[:1], chips=2, bits=(3,))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert al.fingerprint(model) == fingerprint
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert model.active_adapters == ["default"]
    assert not any(module._forward_hooks for module in model.modules())


def test_equal_seeds_give_equal_reports(case: Any) -> None:
    options = {**case.three, "retrained": case.retrained[:2], "chips": 2, "bits": (4,)}
    one, other = (verify_forgetting(case.model, **options, seed=5) for _ in range(2))
    assert one == other


def test_a_sealed_model_is_verified_on_the_record(case: Any) -> None:
    seal = seal_(case.model, "default", request="person 3", log=RequestLog(None))
    match = r"expected a reason for the log, since the model has adapter 'default'.*audit_reason"
    with pytest.raises(al.SealError, match=match):
        verify_forgetting(case.model, **case.three, **QUICK)
    assert [entry.kind for entry in seal.log.entries()] == ["seal"]
    report = verify_forgetting(
        case.model, **case.three, audit_reason="yearly check", chips=3, bits=(8, 2)
    )
    assert [entry.kind for entry in seal.log.entries()] == ["seal", "audit-start", "audit-end"]
    assert {"relearn_steps", "quantised_accuracy", "noisy_worst_accuracy"} <= {
        each.name for each in report.attacks
    }
    with pytest.raises(al.SealError, match="default"):
        case.model.disable_adapter()


def test_reads_are_counted_exactly(case: Any) -> None:
    ledger = al.Ledger()
    ledger.add(al.Counts({"tile_reads": 5}), phase="verify", layer="")
    report = verify_forgetting(case.model, **case.sets, ledger=ledger, **QUICK)
    samples = {name: len(labels) for name, (_, labels) in case.sets.items()}
    everything = sum(samples.values())
    # All sets; adapters off; finding the last layer; features of all sets but the unseen kept.
    vectors = everything + 2 * samples["forget"] + everything - samples["test"]
    assert report.reads["tile_reads"] == 2 * vectors
    assert ledger.total(phase="verify")["tile_reads"] == 2 * vectors + 5
    more = verify_forgetting(
        case.model, **case.sets, ledger=al.Ledger(), relearn=None, bits=(8, 4), chips=3
    )
    known = samples["forget"] + samples["retain"]
    assert more.reads["tile_reads"] == 2 * (vectors + (2 + 3) * known)
    assert more.reads["forward_macs_int8"] > 0


def test_retraining_is_counted_and_reported(case: Any, tmp_path: Any) -> None:
    ledger = al.Ledger()
    references = RetrainedReferences(
        folder=tmp_path,
        key={"case": 1},
        build=lambda: copy.deepcopy(case.learnt),
        retrain=case.retrain,
        seeds=(0, 1),
        chip=CHIP,
    )
    report = verify_forgetting(
        case.model, **case.three, retrained=references, ledger=ledger, **QUICK
    )
    assert report.references == 2
    assert report.retraining == ledger.total(phase="retrain")
    assert report.retraining.pulses > 0
    passed_on = Retrained(case.retrained, al.Counts({"set_pulses": 7}))
    report = verify_forgetting(case.model, **case.three, retrained=passed_on, **QUICK)
    assert report.retraining["set_pulses"] == 7


class Tagged(nn.Module):
    """Takes a dict of arguments and gives an object with logits, as models of transformers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *, scale: Tensor) -> Any:
        return type("Output", (), {"logits": self.inner(x) * scale[:, None]})()


def test_batches_may_be_dicts_and_loaders(case: Any) -> None:
    def batches(pair: tuple[Tensor, Tensor]) -> list[Any]:
        return [({"x": x, "scale": torch.ones(len(x))}, y) for x, y in zip(
            pair[0].split(7), pair[1].split(7), strict=True)]  # fmt: skip

    whole = verify_forgetting(case.model, **case.three, chips=3, bits=(4,))
    sets = {name: batches(pair) for name, pair in case.three.items()}
    cut = verify_forgetting(Tagged(case.model), **sets, chips=3, bits=(4,), features="inner.2")
    assert [each.name for each in cut.findings] == [each.name for each in whole.findings]
    for name in ("forget_accuracy", "adapter_off_accuracy", "noisy_worst_accuracy"):
        assert cut.finding(name).value == whole.finding(name).value
    assert cut.series["noisy_retain_accuracy"] == whole.series["noisy_retain_accuracy"]


def test_an_adapter_that_no_unit_runs_is_not_rounded(case: Any) -> None:
    from peft import IA3Config

    model = al.convert(case.learnt, CHIP)
    al.program_(model, CHIP, seed=0)
    ia3 = IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])
    peft = get_peft_model(al.freeze_(model), ia3)
    report = verify_forgetting(peft, **case.three, relearn=None, bits=(8,), chips=1)
    names = {each.name for each in report.findings}
    assert "adapter_off_accuracy" in names
    assert not names & {"quantised_accuracy", "layer_distance"}


def test_too_few_forgotten_samples_cannot_be_relearnt(case: Any) -> None:
    x, y = case.sets["forget"]
    report = verify_forgetting(
        case.model,
        **{**case.three, "forget": (x[:6], y[:6])},
        relearn=RelearnAttack(samples=6),
        bits=(),
        chips=0,
    )
    expected = "Not tried: relearning, quantised adapters, noisy programmings."
    assert expected in report.does_not_show


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"forget": []}, al.DataError, r"forget: expected one sample or more, got none"),
        ({"test": [torch.ones(2)]}, al.DataError, r"test: expected inputs and labels.*got Tensor"),
        ({"chips": -1}, al.ConfigurationError, r"expected chips of 0 or more, got -1"),
        ({"features": "3"}, al.ConfigurationError, r"every model to have layer '3', got a Peft"),
        ({"bits": (1,)}, al.ConfigurationError, r"bits"),
    ],
)
def test_impossible_questions_are_refused(
    case: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        verify_forgetting(case.model, **{**case.three, **QUICK, **options})


def test_a_model_without_a_layer_to_probe_is_refused(case: Any) -> None:
    with pytest.raises(al.ConfigurationError, match=r"linear probe: expected a Identity with a"):
        verify_forgetting(nn.Identity(), **case.three, **QUICK)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"samples": 0}, r"relearning: expected samples of 1 or more, got 0"),
        ({"learning_rate": 0.0}, r"relearning: expected learning_rate of above 0, got 0.0"),
        ({"accuracy": 1.5}, r"relearning: expected accuracy of 1 or less, got 1.5"),
    ],
)
def test_impossible_attacks_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(al.ConfigurationError, match=match):
        RelearnAttack(**options)


def test_stricter_criteria_change_verdicts(case: Any) -> None:
    loose, strict = (
        verify_forgetting(
            case.model,
            **case.three,
            retrained=case.retrained,
            criteria=Criteria(divergence=limit),
            **QUICK,
        ).finding("js_retain")
        for limit in (1e6, 1.0)
    )
    assert loose.verdict == Verdict.PASS
    assert (strict.verdict == Verdict.PASS) == (strict.value <= max(strict.retrained))
