"""What an observation must not do: count twice, count late, follow copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import aihwkit_lora as al
from aihwkit_lora.errors import StageError


def test_one_ledger_does_not_count_a_digital_model_twice() -> None:
    model, ledger = nn.Sequential(nn.Linear(3, 2)), al.Ledger()
    second = al.observe(model, ledger, phase="new")
    with (
        al.observe(model, ledger, phase="infer"),
        pytest.raises(StageError, match="does not observe this model yet"),
    ):
        second.start()


def test_gradients_that_arrive_after_the_block_are_not_counted() -> None:
    model, ledger = nn.Sequential(nn.Linear(3, 2)), al.Ledger()
    with al.observe(model, ledger, phase="train"):
        loss = model(torch.ones(1, 3)).sum()
    before = ledger.total()
    loss.backward()
    assert ledger.total() == before


def test_a_copy_of_digital_layers_made_while_they_are_observed_is_not_observed() -> None:
    model, ledger = nn.Sequential(nn.Linear(3, 2)), al.Ledger()
    with al.observe(model, ledger, phase="train"):
        twin = copy.deepcopy(model)
        twin(torch.ones(1, 3))
    twin(torch.ones(1, 3))
    assert ledger.total() == al.Counts()


def test_an_observed_model_pickles() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with al.observe(model, al.Ledger(), phase="train"):
        assert pickle.loads(pickle.dumps(model))[0].in_features == 3


def test_inputs_passed_by_name_want_gradients_too() -> None:
    model, ledger = nn.Linear(3, 2), al.Ledger()
    with al.observe(model, ledger, phase="train"):
        model(input=torch.ones(1, 3, requires_grad=True)).sum().backward()
    assert ledger.total()["input_gradient_macs"] == 6
