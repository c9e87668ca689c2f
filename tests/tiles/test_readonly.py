"""The view of a frozen weight: every read works, no write gets through."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aihwkit_lora import FrozenConductanceError
from aihwkit_lora.tiles.readonly import ReadOnlyTensor, read_only


def values() -> Tensor:
    return torch.linspace(-1.0, 1.0, 12).view(3, 4)


def data_iadd(weight: Tensor) -> None:
    weight.data += 1


def data_assignment(weight: Tensor) -> None:
    weight.data = torch.zeros(3, 4)


def slice_assignment(weight: Tensor) -> None:
    weight[1:, 0] = 5.0


def slice_iadd(weight: Tensor) -> None:
    weight[0] += 1.0


def isub(weight: Tensor) -> None:
    weight -= 1


def imul(weight: Tensor) -> None:
    weight *= 2


def itruediv(weight: Tensor) -> None:
    weight /= 2


def ifloordiv(weight: Tensor) -> None:
    weight //= 2


def imod(weight: Tensor) -> None:
    weight %= 2


def ipow(weight: Tensor) -> None:
    weight **= 2


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data +=": data_iadd,
    "data =": data_assignment,
    "[] =": slice_assignment,
    "[] +=": slice_iadd,
    "-=": isub,
    "*=": imul,
    "/=": itruediv,
    "//=": ifloordiv,
    "%=": imod,
    "**=": ipow,
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(3, 4)),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(3, 4)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(2.0),
    "normal_": lambda w: w.normal_(),
    "clamp_": lambda w: w.clamp_(-0.1, 0.1),
    "relu_": torch.relu_,
    "index_fill_": lambda w: w.index_fill_(0, torch.tensor([0]), 9.0),
    "masked_fill_": lambda w: w.masked_fill_(w > 0, 0.0),
    "resize_": lambda w: w.resize_(2, 2),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "T.mul_": lambda w: w.T.mul_(2),
    "view.mul_": lambda w: w.view(-1).mul_(2),
    "row of unbind": lambda w: w.unbind()[0].mul_(2),
    "part of split": lambda w: w.split(2)[0].mul_(2),
    "part of chunk": lambda w: torch.chunk(w, 2)[1].zero_(),
    "iteration": lambda w: next(iter(w)).zero_(),
    "out=": lambda w: torch.add(torch.ones(3, 4), 1, out=w),
    "out= of a pair": lambda w: torch.max(
        torch.ones(2, 3, 4), dim=0, out=(w, torch.zeros(3, 4, dtype=torch.long))
    ),
    "nn.init.xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "nn.init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "nn.init.normal_": lambda w: nn.init.normal_(w),
    "nn.init.constant_": lambda w: nn.init.constant_(w, 1.0),
    "functional inplace": lambda w: nn.functional.relu(w, inplace=True),
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad =": lambda w: setattr(w, "requires_grad", True),
    "_foreach_add_": lambda w: torch._foreach_add_([w], 1.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_no_write_gets_through(write: Callable[[Tensor], object]) -> None:
    stored = values()
    with pytest.raises(FrozenConductanceError, match=r"layer 'encoder\.0': expected the frozen"):
        write(read_only(stored, "encoder.0"))
    assert torch.equal(stored, values())


def test_numpy_arrays_are_read_only() -> None:
    weight = read_only(values(), "fc")
    for array in (weight.numpy(), weight.T.numpy(), weight.detach().numpy(), np.asarray(weight)):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1.0
    assert np.array_equal(weight.numpy(), values().numpy())


def test_reads_give_ordinary_tensors_that_can_be_written() -> None:
    stored = values()
    weight = read_only(stored, "fc")
    for result in (weight + 1, weight.clone(), weight @ torch.ones(4, 2), weight.double()):
        assert type(result) is Tensor
        result += 1
    assert torch.equal(weight.clone(), values())
    assert torch.equal(nn.functional.linear(torch.eye(4), weight), values().T)
    assert torch.equal(torch.as_tensor(weight).T, values().T)
    assert torch.equal(stored, values())


def test_views_stay_read_only() -> None:
    weight = read_only(values(), "fc")
    for view in (weight.T, weight[1:], weight.data, weight.detach(), weight.view(-1)):
        assert type(view) is ReadOnlyTensor
        assert view._layer == "fc"


def test_asking_for_no_gradient_is_allowed() -> None:
    weight = read_only(values(), "fc")
    weight.requires_grad_(False)
    weight.requires_grad = False
    assert not weight.requires_grad


def test_gradients_flow_past_the_weight() -> None:
    x = torch.ones(2, 4, requires_grad=True)
    nn.functional.linear(x, read_only(values(), "fc")).sum().backward()
    assert torch.equal(x.grad, values().sum(0).expand(2, 4))


def test_pickles_keep_the_values() -> None:
    restored = pickle.loads(pickle.dumps(read_only(values(), "fc")))
    assert torch.equal(torch.as_tensor(restored), values())
