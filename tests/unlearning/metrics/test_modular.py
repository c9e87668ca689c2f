"""Each metric class does what its function does, over any split of batches and processes."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from aihwkit_lora.continual.metrics import AccuracyMatrix
from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.unlearning import metrics as m

Call = tuple[tuple[Any, ...], dict[str, Any]]
NOT_UPDATED = "ignore:The ``compute`` method of metric"


def rows(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(seed: int, size: int = 30, classes: int = 4) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(seed))


P, Q, TARGET = rows(0, 30, 4).softmax(dim=1), rows(1, 30, 4).softmax(dim=1), labels(2)


def thirds(*values: Tensor, dim: int = 0, **options: Any) -> list[Call]:
    """Calls with unequal parts of some tensors."""
    parts = [value.split([17, 2, 11], dim=dim) for value in values]
    return [(batch, options) for batch in zip(*parts, strict=True)]


def in_groups(groups: dict[str, tuple[Tensor, ...]]) -> list[Call]:
    """Parts of all groups, one after the other."""
    calls = [thirds(*values, group=group) for group, values in groups.items()]
    return [call for batches in zip(*calls, strict=True) for call in batches]


def right(predicted: Tensor, target: Tensor) -> float:
    pairs = list(zip(predicted.tolist(), target.tolist(), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def tug_of_war(groups: dict[str, tuple[Tensor, ...]]) -> float:
    gaps = [
        abs(right(ours, target) - right(other, target)) for ours, other, target in groups.values()
    ]
    return math.prod(1 - gap for gap in gaps)


def membership(name: str, found: m.Membership) -> dict[str, float]:
    names = (name, f"{name}_attacker_accuracy", f"{name}_auc")
    return dict(zip(names, (found.value, found.attacker_accuracy, found.auc), strict=True))


def lira(found: m.Lira) -> dict[str, float]:
    rates = {f"u_lira_tpr_at_{rate}": value for rate, value in found.tpr_at_fpr.items()}
    return {"u_lira_accuracy": found.accuracy, "u_lira_auc": found.auc, **rates}


GROUPS = {
    g: (labels(i), labels(i + 10), labels(i + 20))
    for i, g in enumerate(("forget", "retain", "test"))
}
VALUES = {g: (rows(i, 30),) for i, g in enumerate(("forget", "retain", "test"))}
LOSSES = {g: (rows(i, 30),) for i, g in enumerate(("forget", "unseen"))}
PHI = rows(5, 4, 30) + 1.0, rows(6, 4, 30)
FEATURES = {g: (rows(i, 30, 6), labels(i)) for i, g in enumerate(("train", "test"))}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A class, all calls that it gets, and what has to come out."""

    make: Callable[..., Metric]
    calls: list[Call]
    value: Any
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "ForgetRetainAccuracy": Case(
        make=m.ForgetRetainAccuracy,
        options={"forgotten": [2]},
        calls=thirds(P, TARGET),
        value=m.forget_retain_accuracy(P, TARGET, forgotten=[2]),
    ),
    "ForgetRetainAccuracy, mask": Case(
        make=m.ForgetRetainAccuracy,
        calls=thirds(P, TARGET, labels(3) > 1),
        value=m.forget_retain_accuracy(P, TARGET, forget=labels(3) > 1),
    ),
    "TugOfWar": Case(make=m.TugOfWar, calls=in_groups(GROUPS), value=tug_of_war(GROUPS)),
    "JsToRetrained": Case(make=m.JsToRetrained, calls=thirds(P, Q), value=m.js_divergence(P, Q)),
    "KlToRetrained": Case(make=m.KlToRetrained, calls=thirds(P, Q), value=m.kl_divergence(P, Q)),
    "ActivationDistance": Case(
        make=m.ActivationDistance, calls=thirds(P, Q), value=m.activation_distance(P, Q)
    ),
    "ZeroRetrainForgetting": Case(
        make=m.ZeroRetrainForgetting, calls=thirds(P, Q), value=m.zrf(P, Q)
    ),
    "Completeness": Case(make=m.Completeness, calls=thirds(P, Q), value=m.completeness(P, Q)),
    "SvcMembership": Case(
        make=m.SvcMembership,
        options={"seed": 3},
        calls=in_groups(VALUES),
        value=membership(
            "svc_membership", m.svc_membership(*(v for (v,) in VALUES.values()), seed=3)
        ),
    ),
    "LossMembership": Case(
        make=m.LossMembership,
        calls=in_groups(LOSSES),
        value=membership("loss_membership", m.loss_membership(*(v for (v,) in LOSSES.values()))),
    ),
    "ULira": Case(
        make=m.ULira,
        options={"models": 4, "false_positive_rates": (0.1, 0.5)},
        calls=thirds(*PHI, dim=1),
        value=lira(m.u_lira(*PHI, false_positive_rates=(0.1, 0.5))),
    ),
    "LinearProbe": Case(
        make=m.LinearProbe,
        calls=in_groups(FEATURES),
        value=m.linear_probe(*FEATURES["train"], *FEATURES["test"]),
    ),
    "AccuracyMatrix": Case(
        make=AccuracyMatrix,
        options={"tasks": 2},
        calls=[
            *thirds(P, TARGET, phase=0, task=0),
            *thirds(Q, TARGET, phase=1, task=0),
            *thirds(P, labels(4), phase=1, task=1),
        ],
        value=torch.tensor(
            [
                [right(P.argmax(1), TARGET), math.nan],
                [right(Q.argmax(1), TARGET), right(P.argmax(1), labels(4))],
            ]
        ),
    ),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def check(found: Any, expected: Any) -> None:
    """Compare numbers, also by name; sums of doubles may differ in their last digits."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for name, value in expected.items():
            check(found[name], value)
        return
    assert isinstance(found, Tensor)
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    assert torch.allclose(
        found.double(), wanted, rtol=1e-6 if wanted.ndim else 1e-12, equal_nan=True
    )


def updated(case: Case, calls: Sequence[Call], **options: Any) -> Metric:
    metric = case.make(**case.options, **options)
    for args, named in calls:
        metric.update(*args, **named)
    return metric


@ALL
def test_batches_give_what_the_function_gives(case):
    check(updated(case, case.calls).compute(), case.value)


@ALL
def test_forward_gives_the_value_of_the_batch_and_adds_it(case):
    metric = case.make(**case.options)
    for args, named in case.calls:
        check(metric(*args, **named), updated(case, [(args, named)]).compute())
    check(metric.compute(), case.value)


@ALL
def test_reset_starts_anew(case):
    metric = updated(case, case.calls[:1])
    metric.reset()
    for args, named in case.calls:
        metric.update(*args, **named)
    check(metric.compute(), case.value)


@ALL
def test_pickled_half_way_it_goes_on(case):
    metric = pickle.loads(pickle.dumps(updated(case, case.calls[:1])))
    for args, named in case.calls[1:]:
        metric.update(*args, **named)
    check(metric.compute(), case.value)


@ALL
def test_a_state_dict_goes_on_as_well(case):
    first = updated(case, case.calls[:1])
    first.persistent(True)
    metric = case.make(**case.options)
    metric.load_state_dict(first.state_dict())
    for args, named in case.calls[1:]:
        metric.update(*args, **named)
    check(metric.compute(), case.value)


@ALL
def test_three_ranks_merge(case):
    ranks = [updated(case, case.calls[rank::3]) for rank in range(3)]
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    check(ranks[0].compute(), case.value)


class Gather:
    """``all_gather`` between threads, as strict about types as a real one."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.rank = threading.Barrier(ranks, timeout=60), threading.local()
        self.slots: list[Tensor] = [torch.zeros(0)] * ranks

    def __call__(self, value: Tensor, group: Any = None) -> list[Tensor]:
        self.slots[self.rank.number] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        assert len({(v.dtype, v.ndim) for v in values}) == 1
        return values


@ALL
@pytest.mark.filterwarnings(NOT_UPDATED)
@pytest.mark.parametrize("idle", [False, True], ids=["all busy", "one idle"])
def test_three_ranks_synchronise(case, idle):
    gather = Gather(3)
    sync = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
    shares = (
        [[], case.calls[0::2], case.calls[1::2]] if idle else [case.calls[r::3] for r in range(3)]
    )

    def run(rank: int) -> Any:
        gather.rank.number = rank
        return updated(case, shares[rank], **sync).compute()

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(run, range(3)):
            check(found, case.value)


@ALL
def test_counts_are_integers_and_sums_double(case):
    metric = updated(case, case.calls)
    kept = [getattr(metric, name) for name in metric._defaults]
    values = [
        tensor for value in kept for tensor in (value if isinstance(value, list) else [value])
    ]
    assert {value.dtype for value in values} <= {torch.int64, torch.float64}


@pytest.mark.filterwarnings(NOT_UPDATED)
@pytest.mark.parametrize(
    "name", ["TugOfWar", "SvcMembership", "LossMembership", "ULira", "LinearProbe"]
)
def test_nothing_is_known_before_every_group_has_samples(name):
    case = CASES[name]
    calls = [call for call in case.calls if call[1].get("group") in ("forget", "test")]
    for found in (updated(case, []).compute(), updated(case, calls).compute()):
        values = found.values() if isinstance(found, dict) else [found]
        assert all(math.isnan(value) for value in values)


@pytest.mark.parametrize("name", ["TugOfWar", "SvcMembership", "LossMembership", "LinearProbe"])
def test_unknown_groups_are_refused(name):
    args, _ = CASES[name].calls[0]
    with pytest.raises(ConfigurationError, match=r"group: expected one of .*, got 'other'"):
        CASES[name].make().update(*args, group="other")


def test_u_lira_wants_as_many_models_as_it_was_told():
    with pytest.raises(DataError, match=r"unlearned: expected 5 models, shape \(5, N\)"):
        m.ULira(models=5).update(*PHI)


@pytest.mark.parametrize(
    "name", ["JsToRetrained", "Completeness", "ForgetRetainAccuracy", "TugOfWar"]
)
def test_empty_batches_are_refused(name):
    case, (args, named) = CASES[name], CASES[name].calls[0]
    with pytest.raises(DataError, match="one sample or more"):
        case.make(**case.options).update(*(arg[:0] for arg in args), **named)


@pytest.mark.slow
def test_functions_need_neither_torchmetrics_nor_scikit_learn():
    code = (
        "import sys; from aihwkit_lora.unlearning import metrics as m; m.js_divergence; m.u_lira; "
        "m.svc_membership; m.linear_probe; m.relearn_curve; m.layer_distance; "
        "print({'torchmetrics', 'sklearn', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_all_names_are_there_and_no_others():
    assert all(hasattr(m, name) for name in m.__all__)
    assert set(m._HOME) == set(m.__all__)
    with pytest.raises(AttributeError, match="no attribute 'accuracy_of'"):
        m.accuracy_of  # noqa: B018
