"""Exact forgetting: an adapter is destroyed, and the model is as if it had never been there."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import ConfigurationError, SealError, StageError, UnknownNameError
from aihwkit_lora.unlearning.exact import ALWAYS_OUT_OF_REACH, Replay, destroy_
from aihwkit_lora.unlearning.request_log import RequestLog
from aihwkit_lora.unlearning.seal import seal_, verify_seals

Frozen = Callable[..., nn.Module]
Branch = Callable[..., LoraConfig]
UNIT = al.DigitalUnit(bits=8)
PEOPLE = ("p1", "p2", "p3")


class Buffer:
    def __init__(self) -> None:
        self.items = [("person p1", 1), ("person p2", 2), ("person p1", 3)]

    def remove(self, unit: str, /) -> int:
        before = len(self.items)
        self.items = [item for item in self.items if item[0] != unit]
        return before - len(self.items)


@pytest.fixture
def log() -> RequestLog:
    log = RequestLog(None)
    for name in PEOPLE:
        log.append("learn", f"enrol {name}", unit=f"person {name}", adapter=name)
    return log


@pytest.fixture
def people(frozen_model: Frozen, branch: Branch) -> Callable[..., PeftModel]:
    """Makes a model with an adapter for each person, all active; each has layers of its own."""
    targets = {"p1": ["0", "3"], "p2": ["0", "2"], "p3": ["2", "3"]}

    def make(*names: str, active: tuple[str, ...] | None = None, **options: Any) -> PeftModel:
        model: Any = frozen_model()
        for name in names:
            torch.manual_seed(int(name[1]))
            config = branch(targets[name], **options)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
        peft: PeftModel = model
        peft.base_model.set_adapter(list(names if active is None else active))
        return peft.eval()

    return make


def destroy(model: nn.Module, adapter: str, log: RequestLog, **options: Any) -> Any:
    told = {"request": f"forget {adapter}", "lived_only_here": True} | options
    return destroy_(model, adapter, unit=f"person {adapter}", log=log, **told)


@pytest.mark.parametrize("unit", [None, UNIT], ids=["floats", "unit"])
@pytest.mark.parametrize("gone", PEOPLE)
def test_the_model_is_as_if_it_had_never_been_there(
    people: Any, log: RequestLog, inputs: Tensor, gone: str, unit: Any
) -> None:
    rest = [name for name in PEOPLE if name != gone]
    model, never = people(*PEOPLE), people(*rest)
    if unit:
        model, never = al.digitize_(model, unit), al.digitize_(never, unit)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(inputs).sum().backward()
    optimizer.step()
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    done = destroy(model, gone, log, optimizer=optimizer)
    assert torch.equal(model(inputs), never(inputs))
    assert model.active_adapters == never.active_adapters == rest
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), never.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other)
    assert all(each.requires_grad == before[name] for name, each in model.named_parameters())
    assert (done.layers, done.optimizer_states) == (2, 4)
    if unit:
        sram = model.base_model.model[0].sram
        assert gone not in {slot.adapter for slot in sram._slots}


def test_nothing_in_memory_holds_the_factors(people: Any, log: RequestLog, inputs: Tensor) -> None:
    model = al.digitize_(people(*PEOPLE), UNIT)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(inputs).sum().backward()
    optimizer.step()
    layer = model.base_model.model[0]
    held = layer.lora_A["p1"].weight
    # As lists, which are no tensors.
    secrets = [held.tolist(), held.grad.tolist(), optimizer.state[held]["exp_avg"].tolist()]
    caught, gradient, view = held.data, held.grad, held.detach()[0]
    destroy(model, "p1", log, optimizer=optimizer)
    assert not any(bool(each.any()) for each in (held, caught, gradient, view))
    gc.collect()
    alive = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    assert len(alive) > 10
    same = [each for each in alive if each.shape == held.shape and each.tolist() in secrets]
    assert same == []
    assert not any(each is held for group in optimizer.param_groups for each in group["params"])
    optimizer.step()


def test_groups_of_the_optimiser_keep_their_places(people: Any, log: RequestLog) -> None:
    model = people("p1", "p2")
    groups = [
        {"params": [p for n, p in model.named_parameters() if f".{name}." in n], "lr": lr}
        for name, lr in (("p1", 0.1), ("p2", 0.2))
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    done = destroy(model, "p1", log, optimizer=optimizer)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [
        (0, 0.1), (4, 0.2)
    ]  # fmt: skip
    assert done.optimizer_states == 0  # no step has made any


def test_replay_and_checkpoints_go_along(people: Any, log: RequestLog, tmp_path: Path) -> None:
    model, buffer = people("p1", "p2"), Buffer()
    assert isinstance(buffer, Replay)
    single, folder, twin = tmp_path / "a.ckpt", tmp_path / "run", tmp_path / "twin"
    (folder / "deep").mkdir(parents=True)
    for path in (single, folder / "b.ckpt", folder / "deep" / "c.ckpt"):
        path.write_bytes(b"secret" * 100)
    twin.hardlink_to(single)
    (tmp_path / "link").symlink_to(folder / "b.ckpt")
    missing, link = tmp_path / "none.ckpt", tmp_path / "link"
    done = destroy(
        model, "p1", log, replay=buffer, checkpoints=[single, str(folder), missing, link]
    )
    assert (done.replay_items, buffer.items) == (2, [("person p2", 2)])
    assert {Path(file).name for file in done.files} == {"a.ckpt", "b.ckpt", "c.ckpt"}
    assert not single.exists()
    assert twin.read_bytes() == bytes(600)
    assert done.unreached[:2] == (
        f"{missing}: not found",
        f"{link}: a link; name what it points to",
    )


def test_files_that_cannot_be_opened_are_listed(
    people: Any, log: RequestLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.ckpt"
    path.write_bytes(b"secret")
    monkeypatch.setattr(Path, "open", refuse)
    done = destroy(people("p1", "p2"), "p1", log, checkpoints=[path])
    assert (done.files, done.unreached[0]) == ((), f"{path}: Permission denied")


def test_the_log_tells_what_was_destroyed(people: Any, log: RequestLog) -> None:
    model = people(*PEOPLE)
    done = destroy(model, "p1", log)
    start, end = log.entries()[-2:]
    assert (start.kind, end.kind, end.request) == ("destroy-start", "destroy", "forget p1")
    assert dict(end.fields) == {
        "unit": "person p1", "adapter": "p1", "level": "exact-adapter",
        "parameters": done.parameters, "optimizer_states": 0, "replay_items": 0, "files": 0,
        "unreached": len(done.unreached),
    }  # fmt: skip
    assert done.level == "exact-adapter"
    assert log.verify() == 5


def test_later_adapters_are_listed_as_possible_traces(people: Any, log: RequestLog) -> None:
    model = people(*PEOPLE)
    done = destroy(model, "p2", log)
    assert done.unreached == (
        "adapter 'p3', learnt later and perhaps on top of this one",
        *ALWAYS_OUT_OF_REACH,
    )
    assert destroy(model, "p3", log).unreached == ALWAYS_OUT_OF_REACH
    assert destroy(model, "p1", log).unreached == ALWAYS_OUT_OF_REACH


def test_an_inactive_adapter_leaves_the_active_ones_alone(
    people: Any, log: RequestLog, inputs: Tensor
) -> None:
    model = people(*PEOPLE, active=("p3",))
    before = model(inputs)
    destroy(model, "p1", log)
    assert model.active_adapters == ["p3"]
    assert torch.equal(model(inputs), before)


def test_no_other_adapter_starts_to_act(
    people: Any, log: RequestLog, frozen_model: Frozen, inputs: Tensor
) -> None:
    model = people("p1", "p2", active=("p1",))
    destroy(model, "p1", log)
    assert torch.equal(model(inputs), frozen_model()(inputs))
    assert not any(each.requires_grad for each in model.parameters())
    destroy(model, "p2", log)
    assert torch.equal(model.unload()(inputs), frozen_model()(inputs))


def test_dora_and_modules_to_save_go_too(
    frozen_model: Frozen, branch: Branch, log: RequestLog, inputs: Tensor
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(array=frozen_model(), head=nn.Linear(3, 2))).eval()
    expected = net(inputs)
    config = branch(["array.0"], use_dora=True, modules_to_save=["head"])
    model = get_peft_model(net, config, adapter_name="p1").eval()
    head = model.base_model.model.head.modules_to_save["p1"]
    head.weight.data.add_(1.0)
    done = destroy(model, "p1", log)
    assert done.parameters == 2 * (10 + 12) + 12 + 8
    assert not head.weight.any()
    assert torch.equal(model.unload()(inputs), expected)


def test_beside_a_seal(people: Any, log: RequestLog, inputs: Tensor) -> None:
    model, never = people("p1", "p2"), people("p2")
    seal_(model, "p2", request="person 9")
    with pytest.raises(SealError, match="expected an adapter that holds data, got one that keeps"):
        destroy(model, "p2", log)
    destroy(model, "p1", log)
    assert torch.equal(model(inputs), never(inputs))
    verify_seals(model)


@pytest.mark.parametrize(
    ("adapter", "options", "error", "message"),
    [
        ("p9", {}, UnknownNameError, "unknown adapter 'p9'"),
        ("p1", {"lived_only_here": False}, StageError, "expected the caller's word"),
        ("p1", {"lived_only_here": 1}, StageError, "expected the caller's word"),
        (
            "p1",
            {"log": RequestLog(None)},
            StageError,
            "expected an entry of kind 'learn' with unit",
        ),
        ("p1", {"request": ""}, ConfigurationError, "'request': expected a text"),
    ],
)
def test_what_is_not_destroyed(
    people: Any,
    log: RequestLog,
    inputs: Tensor,
    adapter: str,
    options: Any,
    error: Any,
    message: str,
) -> None:
    model = people("p1", "p2")
    before = model(inputs)
    with pytest.raises(error, match=message):
        destroy(model, adapter, **{"log": log, **options})
    assert torch.equal(model(inputs), before)
    assert log.verify() == 3


@pytest.mark.parametrize(("place", "named"), [({"adapter": "p2"}, "p2"), ({}, "the base")])
def test_data_that_went_elsewhere_is_not_forgotten_exactly(
    people: Any, log: RequestLog, place: Any, named: str
) -> None:
    model = people("p1", "p2")
    log.append("learn", "enrol again", unit="person p1", **place)
    with pytest.raises(StageError, match=f"a log that says it also went into {named}"):
        destroy(model, "p1", log)
    if place:
        destroy(model, "p2", log)
        destroy(model, "p1", log)


def test_branches_that_reach_into_the_base_are_refused(
    people: Any, frozen_model: Frozen, branch: Branch, log: RequestLog
) -> None:
    model = people("p1", "p2")
    model.base_model.model[0].merged_adapters.append("p1")
    with pytest.raises(StageError, match=r"layer '0', adapter 'p1': .* merged into it"):
        destroy(model, "p1", log)
    biased = get_peft_model(frozen_model(), branch(["0"], bias="lora_only"), adapter_name="p1")
    with pytest.raises(StageError, match="got bias='lora_only', which has trained the base"):
        destroy(biased, "p1", log)
    other = get_peft_model(frozen_model(), LoHaConfig(target_modules=["0"]), adapter_name="p1")
    with pytest.raises(StageError, match="expected LoRA, got LoHaModel"):
        destroy(other, "p1", log)
