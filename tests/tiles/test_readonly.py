"""The view of a frozen weight: every read works, no write gets through."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aihwkit_lora import FrozenConductanceError
from aihwkit_lora.tiles.readonly import ReadOnlyTensor, count_weight_reads, read_only


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
    "_foreach_mul_ by name": lambda w: torch._foreach_mul_(self=[w], scalar=2.0),
    "aten.add_": lambda w: torch.ops.aten.add_.Tensor(w, torch.ones(3, 4)),
    "aten.copy_": lambda w: torch.ops.aten.copy_.default(w, torch.zeros(3, 4)),
    "aten.add out=": lambda w: torch.ops.aten.add.out(w, w, out=w),
    "set_": lambda w: w.set_(torch.zeros(3, 4)),
    "reshape.scatter_add_": lambda w: w.data.reshape(-1).scatter_add_(
        0, torch.tensor([3]), torch.ones(1)
    ),
    "nn.Parameter": nn.Parameter,
    "nn.Parameter without gradient": lambda w: nn.Parameter(w, requires_grad=False).data.add_(1),
    "nn.Buffer": lambda w: nn.Buffer(w).zero_(),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(12), [w]),
    "as_subclass": lambda w: w.as_subclass(Tensor).zero_(),
    "dlpack": lambda w: torch.from_dlpack(w).zero_(),
    "dlpack to numpy": lambda w: np.from_dlpack(w).fill(0.0),
    "as_tensor": lambda w: torch.as_tensor(w).zero_(),
    "asarray": lambda w: torch.asarray(w).zero_(),
    "diagonal": lambda w: w.diagonal().zero_(),
    "unfold": lambda w: w.unfold(0, 2, 1).zero_(),
    "mT": lambda w: w.mT.zero_(),
    "bits": lambda w: w.view(torch.int32).zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_no_write_gets_through(write: Callable[[Tensor], object]) -> None:
    stored = values()
    with pytest.raises(FrozenConductanceError, match=r"layer 'encoder\.0': expected the frozen"):
        write(read_only(stored, "encoder.0"))
    assert torch.equal(stored, values())


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_no_write_gets_lost_in_a_copy_of_a_transposed_weight(
    write: Callable[[Tensor], object],
) -> None:
    """The logical weight of several tiles is not contiguous, and reshape would copy it."""
    stored = values().T.contiguous().T
    assert not stored.is_contiguous()
    with pytest.raises(FrozenConductanceError, match=r"layer 'encoder\.0': expected the frozen"):
        write(read_only(stored, "encoder.0"))
    assert torch.equal(stored, values())


def test_a_view_of_a_view_names_the_layer_that_asked_last() -> None:
    weight = read_only(read_only(values(), "encoder.0"), "head")
    with pytest.raises(FrozenConductanceError, match="layer 'head'"):
        weight.zero_()


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


COMPUTATIONS: dict[str, tuple[int, Callable[[Tensor], object]]] = {
    "shape and type": (0, lambda w: (w.shape, w.dtype, w.device, w.dim(), w.numel(), w.size(0))),
    "views": (0, lambda w: (w.T, w.data, w.detach(), w[0], w.view(-1), w.split(2), w.to(w))),
    "something of its shape": (0, lambda w: (torch.zeros_like(w), w.new_empty(2))),
    "flags": (0, lambda w: (w.requires_grad, w.is_contiguous(), w.data_ptr())),
    "product": (1, lambda w: w @ torch.ones(4)),
    "linear": (1, lambda w: nn.functional.linear(torch.ones(2, 4), w)),
    "by name": (1, lambda w: nn.functional.linear(torch.ones(2, 4), weight=w)),
    "norm of a view": (1, lambda w: w.T.norm()),
    "several results": (1, lambda w: torch.linalg.svd(w)),
    "in a list": (1, lambda w: torch.cat([w, torch.ones(1, 4)])),
    "twice": (2, lambda w: w @ w.T),
    "copy": (1, lambda w: w.clone()),
    "number": (1, lambda w: w[0, 0].item()),
    "numbers": (1, lambda w: w.tolist()),
    "array": (1, lambda w: w.numpy()),
}


@pytest.mark.parametrize(("reads", "compute"), COMPUTATIONS.values(), ids=COMPUTATIONS.keys())
def test_computations_with_weights_as_numbers_are_counted(
    reads: int, compute: Callable[[Tensor], object]
) -> None:
    weight = read_only(values(), "encoder.0")
    with count_weight_reads() as counted:
        compute(weight)
    assert dict(counted) == ({"encoder.0": reads} if reads else {})
    compute(weight)
    assert counted.total() == reads


def test_counts_are_by_layer_and_may_overlap() -> None:
    first, second = read_only(values(), "first"), read_only(values(), "second")
    with count_weight_reads() as outer:
        _ = first + second
        with count_weight_reads() as inner:
            _ = second.sum(), second.mean()
        _ = first.sum()
    assert dict(inner) == {"second": 2}
    assert dict(outer) == {"first": 2, "second": 3}
