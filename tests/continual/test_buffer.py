"""What is removed from a buffer is gone; what is kept is a fair share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from aihwkit_lora.continual.buffer import ReplayBuffer
from aihwkit_lora.errors import ConfigurationError, DataError


def samples(*counts, start=0):
    """Inputs that are all different, and classes 0, 1, … as often as told."""
    targets = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    return torch.arange(start, start + len(targets)).float()[:, None], targets


def filled(*counts, **options):
    buffer = ReplayBuffer(**({"ratio": 1.0} | options))
    buffer.add(*samples(*counts))
    return buffer


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.3, [3, 1, 6]), (1.0, [10, 2, 20]), (0.01, [1, 1, 1])]
)
def test_a_share_of_each_class_is_kept(ratio, kept):
    buffer = filled(10, 2, 20, ratio=ratio)
    assert buffer.targets.bincount().tolist() == kept
    assert len(buffer.inputs.unique()) == len(buffer) == sum(kept)


def test_inputs_stay_with_their_targets_and_are_copies():
    inputs, targets = samples(4, 5, 6)
    buffer = ReplayBuffer(ratio=0.5)
    buffer.add(inputs, targets)
    owner = dict(zip(inputs.flatten().tolist(), targets.tolist(), strict=True))
    inputs.zero_()
    pairs = zip(buffer.inputs.flatten().tolist(), buffer.targets.tolist(), strict=True)
    assert all(owner[x] == y for x, y in pairs)


def test_the_seed_decides():
    same = [filled(9, 9, ratio=0.4, seed=seed).inputs.tolist() for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_balanced_repeats_evenly(counts, seed):
    inputs, targets = filled(*counts, seed=seed).balanced()
    assert targets.bincount().tolist() == [max(counts)] * len(counts)
    for label, count in enumerate(counts):
        times = inputs[targets == label].flatten().unique(return_counts=True)[1]
        assert len(times) == count
        assert int(times.max() - times.min()) <= 1


def test_draws_are_balanced_over_classes():
    buffer = filled(1, 99, 300)
    share = buffer.draw(3000)[1].bincount() / 3000
    # Each share is off by more than five standard errors once in 1.7 million seeds.
    assert bool(((share - 1 / 3).abs() < 5 * (2 / 9 / 3000) ** 0.5).all())


def test_a_reservoir_keeps_every_sample_with_the_same_chance():
    kept = torch.zeros(30)
    for seed in range(300):
        buffer = ReplayBuffer(ratio=1.0, capacity=10, seed=seed)
        for part in range(3):
            buffer.add(*samples(10, start=10 * part))
        assert len(buffer) == 10
        kept[buffer.inputs.flatten().long()] += 1
    # 30 binomials (300, 1/3): one of them off by five standard deviations in 58,000 runs.
    assert bool(((kept - 100).abs() < 5 * (300 * 2 / 9) ** 0.5).all())


UNITS = ("0", "1", "2", "3")
steps = st.lists(
    st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from(UNITS), st.integers(1, 6)),
    max_size=15,
)


@given(steps, st.sampled_from([None, 5]), st.integers(0, 9))
def test_removed_units_are_never_seen_again(steps, capacity, seed):
    buffer, removed = ReplayBuffer(ratio=0.7, capacity=capacity, seed=seed), set()
    for step, unit, count in steps:
        inputs, targets = torch.full((count, 1), float(unit)), torch.full((count,), int(unit))
        if step == "remove":
            before, held = len(buffer), list(buffer.targets.tolist()).count(int(unit))
            assert buffer.remove(unit) == held
            assert len(buffer) == before - held
            removed.add(unit)
        elif unit in removed:
            with pytest.raises(DataError, match=f"samples of removed units, got {unit}"):
                buffer.add(inputs, targets)
        else:
            buffer.add(inputs, targets)
        assert not removed & set(buffer.units)
        assert not removed & {str(label) for label in buffer.targets.tolist()}
        if len(buffer):
            drawn, _ = buffer.draw(20)
            every, _ = buffer.balanced()
            seen = {str(int(x)) for x in torch.cat([drawn, every]).flatten()}
            assert seen <= set(buffer.units)
    assert buffer.removed == tuple(sorted(removed))


def test_removing_overwrites_what_was_there():
    buffer = filled(2, 3)
    inputs, targets = buffer.inputs, buffer.targets
    buffer.record(nn.Linear(1, 2))
    logits = buffer.logits
    assert buffer.remove("1") == 3
    assert not any(bool(old.any()) for old in (inputs, targets, logits))
    assert len(buffer.logits) == 2


def test_units_may_be_others_than_classes():
    buffer = ReplayBuffer(ratio=1.0)
    inputs, targets = samples(2, 2)
    buffer.add(inputs, targets, units=["anna", "ben", "anna", "ben"])
    buffer.add(inputs + 10, targets, units="carl")
    assert buffer.remove("anna") == 2
    assert buffer.units == ("ben", "carl")
    assert buffer.inputs.flatten().tolist() == [1.0, 3.0, 10.0, 11.0, 12.0, 13.0]


def test_logits_are_those_of_the_model_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5)).train()
    buffer = filled(4, 5)
    buffer.record(model, batch_size=2)
    assert model.training
    assert torch.equal(buffer.logits, torch.cat([model[0](x) for x in buffer.inputs.split(2)]))
    assert not buffer.logits.requires_grad
    inputs, targets, logits = buffer.balanced()
    assert len(inputs) == len(targets) == len(logits)
    assert torch.allclose(logits, model[0](inputs))
    buffer.add(*samples(1))
    assert buffer.logits is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio above 0 and up to 1, got 0.0"),
        ({"ratio": 1.1}, "ratio above 0 and up to 1, got 1.1"),
        ({"capacity": 0}, "capacity of at least 1 sample, got 0"),
    ],
)
def test_impossible_buffers_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        ReplayBuffer(**options)


def test_samples_that_do_not_fit_are_refused():
    buffer, (inputs, targets) = filled(2), samples(2)
    with pytest.raises(DataError, match="as many inputs as targets and units, got 1, 2 and 2"):
        buffer.add(inputs[:1], targets)
    with pytest.raises(DataError, match=r"inputs of shape \(1,\), got \(2,\)"):
        buffer.add(inputs.repeat(1, 2), targets)


@pytest.mark.parametrize("call", ["draw", "balanced", "record"])
def test_an_empty_buffer_says_so(call):
    arguments = {"draw": (1,), "balanced": (), "record": (nn.Linear(1, 1),)}
    with pytest.raises(DataError, match=rf"{call}: expected samples, got an empty buffer"):
        getattr(ReplayBuffer(), call)(*arguments[call])


def test_a_model_has_to_give_logits():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(DataError, match=r"returns logits or an object with \.logits, got tuple"):
        filled(2).record(Pair())
