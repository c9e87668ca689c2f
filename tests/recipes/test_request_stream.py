"""Ten requests in any order: one adapter each, nothing comes back, no pulse."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.recipes import RECIPES, RunFolder
from aihwkit_lora.recipes.request_stream import RequestStream, serving
from aihwkit_lora.unlearning import RequestLog, seals

QUICK = RequestStream(
    first=(0, 1, 2),
    requests="learn 5, forget 1, learn 6, forget 5",
    learn_epochs=30,
    adapter_epochs=6,
)


def run(path, config: RequestStream = QUICK, *, resume: bool = False):
    said: list[str] = []
    options = {"recipe": "request_stream", "config": asdict(config), "say": said.append}
    folder = RunFolder(path, resume=resume, **options)
    return RECIPES.get("request_stream").run(config, folder), said


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream")
    return path, *run(path)


def phases(report, arm: str):
    return [stage for stage in report.arms[arm] if stage.name[:2].isdigit()]


def test_every_request_has_a_phase_in_every_arm(finished):
    _, report, _ = finished
    names = ["01-learn-5", "02-forget-1", "03-learn-6", "04-forget-5"]
    for arm in ("hybrid", "newest", "retrained"):
        assert [stage.name for stage in phases(report, arm)] == names


def test_requests_take_no_pulse_and_leave_the_arrays_alone(finished):
    _, report, _ = finished
    programmed = next(stage for stage in report.arms["hybrid"] if stage.name == "program")
    assert programmed.pulses > 0
    for stage in phases(report, "hybrid"):
        assert stage.pulses == 0
        assert stage.fingerprint == programmed.fingerprint


def test_whoever_is_forgotten_stays_forgotten(finished):
    _, report, _ = finished
    for stage in phases(report, "hybrid")[1:]:
        assert stage.metrics["forget_accuracy"] <= 0.05
        assert stage.metrics.get("relapse", 0.0) <= 0.01


def test_relapse_is_the_largest_rise_since_the_forgetting(finished):
    _, report, _ = finished
    _, forgot_1, learnt_6, forgot_5 = phases(report, "newest")
    assert "relapse" not in forgot_1.metrics
    for stage in (learnt_6, forgot_5):
        rise = stage.metrics["forgotten_1"] - forgot_1.metrics["forgotten_1"]
        assert stage.metrics["relapse"] >= rise


def test_adapters_that_forget_are_sealed_and_logged(finished):
    path, _, _ = finished
    last = torch.load(path / "stages" / "sum-04-forget-5.pt", weights_only=False).model
    assert [seal.adapter for seal in seals(last)] == ["forget-1", "forget-5"]
    log = RequestLog(path / "requests.jsonl")
    assert log.verify() == len(log.entries()) >= 2
    assert al.fingerprint(last)


def test_the_table_has_a_line_for_each_request(finished):
    path, _, _ = finished
    lines = (path / "table.md").read_text().splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "learn 5",
        "forget 1",
        "learn 6",
        "forget 5",
    ]


def test_a_resumed_stream_goes_on_from_the_last_phase(finished, tmp_path):
    path, report, _ = finished
    (path / "stages" / "sum-04-forget-5.pt").unlink()
    again, said = run(path, resume=True)
    assert [line.split(":")[0] for line in said if "done" in line] == ["sum-04-forget-5"]
    ours, before = (phases(each, "hybrid")[-1] for each in (again, report))
    assert ours.metrics == before.metrics
    assert ours.counts == before.counts


def test_the_default_stream_has_ten_requests():
    stream = RequestStream()
    assert len(stream.phases) == 10
    assert stream.people == tuple(range(10))
    assert sum(phase.learns for phase in stream.phases) == 5


def test_streams_that_make_no_sense_are_refused():
    with pytest.raises(ConfigurationError, match="forgotten already"):
        RequestStream(requests="learn 5, forget 2, forget 2")
    with pytest.raises(ConfigurationError, match="expected a stream that learns somebody"):
        RequestStream(requests="forget 2")
    with pytest.raises(ConfigurationError, match="rank of at least 1, found 0"):
        RequestStream(rank=0)


def test_the_loss_is_cross_entropy_and_a_hinge_for_each_forgotten_output():
    """Fixed logits of four outputs; 2 is to be forgotten, 3 was forgotten before."""
    logits = torch.tensor([[4.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 0.0]])
    loss = serving(kept=[0, 1], forgotten=[2], gone=[3], margin=2.0)
    found = loss(lambda _: logits, torch.rand(2, 1, 16, 16), torch.tensor([0, 2]))
    log_p = logits.log_softmax(dim=1)
    cross_entropy = -(log_p[0, 0] + 0.5 * (log_p[1, 0] + log_p[1, 1])) / 2
    # Output 2 is below by 4, then above the others by 3; output 3 below by 3 both times.
    expected = cross_entropy + (0.0 + 5.0) / 2 + (0.0 + 0.0) / 2
    torch.testing.assert_close(found, expected)
