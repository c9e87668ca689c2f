"""What the SRAM of a digital unit holds: what fits, what is loaded when, and who makes room."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from torch import Tensor

import aihwkit_lora as al
from aihwkit_lora.adapters import DigitalUnit, digitize_, power_cycle_, undigitize_
from aihwkit_lora.adapters.budget import Footprint
from aihwkit_lora.adapters.sram import Slot, Sram

Make = Callable[..., PeftModel]
Batch = Callable[..., Tensor]

PER_RANK = {"0": 10 + 12, "2": 12 + 8, "3": 8 + 3}
"""Weights of the linear network's adapters, per rank."""

CHIP = al.chips.get("rm-180nm")


def kib(bits: int) -> float:
    return bits / 8 / 1024


def loads(model: PeftModel, work: Callable[[], Any]) -> dict[str, dict[str, int]]:
    """Memory events by layer, without the traffic of the products."""
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping), torch.no_grad():
        work()
    return {
        layer: {"loads": counts["adapter_loads"], "bits": counts["offchip_read_bits"]}
        for layer, counts in ledger.by_layer().items()
        if counts["adapter_loads"]
    }


def once(rank: int, bits: int) -> dict[str, dict[str, int]]:
    return {layer: {"loads": 1, "bits": rank * n * bits} for layer, n in PER_RANK.items()}


@pytest.mark.parametrize("bits", [2, 5, 8, 16, None])
def test_the_first_load_is_counted_where_asked(
    adapted: Make, batch: Batch, bits: int | None
) -> None:
    model, ledger = adapted(r=3), al.Ledger()
    digitize_(model, DigitalUnit(bits=bits), ledger=ledger, phase="ship")
    width = bits or 16
    assert {layer: dict(counts) for layer, counts in ledger.by_layer("ship").items()} == {
        layer: {
            "adapter_loads": 1,
            "offchip_read_bits": 3 * n * width,
            "sram_write_bits": 3 * n * width,
        }
        for layer, n in PER_RANK.items()
    }
    assert loads(model, lambda: model(batch())) == {}


def test_the_first_load_is_counted_by_an_observer_otherwise(adapted: Make) -> None:
    model = adapted()
    assert loads(model, lambda: digitize_(model, DigitalUnit(bits=8))) == once(2, 8)
    ledger = al.Ledger()
    assert loads(model, lambda: digitize_(model, DigitalUnit(), ledger=ledger)) == {}
    assert ledger.total()["adapter_loads"] == 3


def test_biases_and_magnitudes_are_stored_too(adapted: Make) -> None:
    ledger = al.Ledger()
    targets = ["0", "3"]
    digitize_(adapted(target_modules=targets, lora_bias=True), DigitalUnit(bits=8), ledger=ledger)
    assert ledger.total(layer="0")["sram_write_bits"] == (2 * 22 + 12) * 8
    dora = al.Ledger()
    digitize_(adapted(target_modules=targets, use_dora=True), DigitalUnit(bits=4), ledger=dora)
    assert dora.total(layer="0")["sram_write_bits"] == 2 * 22 * 4 + 12 * 16


def test_without_power_everything_loads_again(adapted: Make, batch: Batch) -> None:
    model, x = digitize_(adapted(), DigitalUnit(bits=8)), batch()
    expected = model(x)
    power_cycle_(model)
    assert loads(model, lambda: model(x)) == once(2, 8)
    assert loads(model, lambda: model(x)) == {}
    assert torch.equal(model(x), expected)


def three_adapters(adapted: Make, config: Callable[..., LoraConfig], room: int) -> PeftModel:
    """Adapters a, b and c of rank 2, 3 and 4 in an SRAM for so many 8-bit weights."""
    model = adapted(r=2, target_modules=["0", "2", "3"])
    for name, rank in (("b", 3), ("c", 4)):
        model.add_adapter(name, config(model, r=rank))
    return digitize_(model, DigitalUnit(bits=8, sram_kib=kib(room * 8)))


def run(model: PeftModel, name: str, x: Tensor) -> dict[str, dict[str, int]]:
    model.set_adapter(name)
    return loads(model, lambda: model(x))


@pytest.mark.parametrize(
    ("room", "order", "expected"),
    [
        # 53 weights per rank; the default has rank 2, b 3 and c 4.
        (9 * 53, ["default", "b", "c", "default", "b", "c"], [0, 3, 4, 0, 0, 0]),
        (7 * 53, ["b", "default", "c", "default", "b", "c"], [3, 0, 4, 0, 3, 4]),
        (4 * 53, ["b", "b", "default", "c", "c"], [3, 0, 2, 4, 0]),
    ],
    ids=["all fit", "two fit", "one fits"],
)
def test_whoever_was_used_longest_ago_makes_room(
    adapted: Make,
    config: Callable[..., LoraConfig],
    batch: Batch,
    room: int,
    order: list[str],
    expected: list[int],
) -> None:
    model = three_adapters(adapted, config, room)
    found = [run(model, name, batch()) for name in order]
    assert found == [once(rank, 8) if rank else {} for rank in expected]


def test_switched_off_adapters_are_not_loaded(adapted: Make, batch: Batch) -> None:
    model = power_cycle_(digitize_(adapted(), DigitalUnit(bits=8)))
    with model.disable_adapter():
        assert loads(model, lambda: model(batch())) == {}
    assert loads(model, lambda: model(batch())) == once(2, 8)


def test_a_layer_that_does_not_run_loads_nothing(adapted: Make, batch: Batch) -> None:
    model = power_cycle_(digitize_(adapted(), DigitalUnit(bits=8)))
    first = model.base_model.model[0]
    assert set(loads(model, lambda: first(batch()))) == {"0"}
    assert set(loads(model, lambda: model(batch()))) == {"2", "3"}


def test_what_runs_together_has_to_fit_together(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model = three_adapters(adapted, config, room=5 * 53)
    model.base_model.set_adapter(["default", "b"])
    assert loads(model, lambda: model(batch())) == once(3, 8)
    model.base_model.set_adapter(["b", "c"])
    message = (
        r"digital unit: expected active adapters that fit 0\.258789 KiB of SRAM, got 0\.3623 KiB "
        r"at 8 bits \('b' 0\.1553 KiB, 'c' 0\.207 KiB\)\. What would fit is rank 2 in every layer "
        r"or 5 bits\."
    )
    with pytest.raises(al.ConfigurationError, match=message):
        model(batch())


def test_adapters_on_different_layers_have_to_fit_together_too(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model = adapted(target_modules=["0"])
    model.add_adapter("other", config(model, target_modules=["2"]))
    digitize_(model, DigitalUnit(bits=8, sram_kib=kib(2 * 22 * 8)))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(al.ConfigurationError, match="active adapters that fit"):
        model(batch())


def test_adapters_of_one_batch_have_to_fit_together(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model, x = three_adapters(adapted, config, room=7 * 53), batch(size=3)
    names = ["b", "__base__", "c"]
    model.set_adapter("default")
    found = loads(model, lambda: model.eval()(x, adapter_names=names))
    assert found == {
        layer: {"loads": 2, "bits": 7 * n * 8} for layer, n in PER_RANK.items()
    }  # and the default, which is active but not in the batch, made room
    assert run(model, "default", x) == once(2, 8)
    with pytest.raises(al.ConfigurationError, match=r"'b' .*, 'default' .*, 'c'"):
        model(x, adapter_names=["b", "default", "c"])


@pytest.mark.parametrize(
    ("room", "ways"),
    [
        (53 * 8 - 1, "What would fit is 7 bits."),
        (53 * 2 - 1, "No rank or width would fit."),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(
    adapted: Make, room: int, ways: str
) -> None:
    model = adapted(r=1)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(al.ConfigurationError) as error:
        digitize_(model, DigitalUnit(bits=8, sram_kib=kib(room)))
    assert str(error.value).endswith(f"at 8 bits ('default' 0.05176 KiB). {ways}")
    assert [type(module) for module in model.modules()] == kinds


def test_an_adapter_that_waits_need_not_fit(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model = adapted(r=1)
    model.add_adapter("big", config(model, r=9))
    digitize_(model, DigitalUnit(bits=8, sram_kib=kib(53 * 8)))
    model.set_adapter("big")
    with pytest.raises(al.ConfigurationError, match=r"'big' 0\.4658 KiB"):
        model(batch())


def test_a_later_adapter_is_loaded_when_it_runs(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model = digitize_(adapted(), DigitalUnit(bits=8))
    model.add_adapter("late", config(model, r=3, target_modules=["0", "2", "3"]))
    assert run(model.eval(), "late", batch()) == once(3, 8)


def test_a_deleted_adapter_takes_no_room(
    adapted: Make, config: Callable[..., LoraConfig], batch: Batch
) -> None:
    model = three_adapters(adapted, config, room=9 * 53)
    run(model, "b", batch())
    model.set_adapter("default")
    model.delete_adapter("b")
    model.add_adapter("b", config(model, r=7))
    assert run(model.eval(), "b", batch()) == once(7, 8)
    assert run(model, "c", batch()) == once(4, 8)


def test_memories_of_copies_are_separate(adapted: Make, batch: Batch) -> None:
    model = digitize_(adapted(), DigitalUnit(bits=8))
    twin = power_cycle_(copy.deepcopy(model))
    assert loads(model, lambda: model(batch())) == {}
    assert loads(twin, lambda: twin(batch())) == once(2, 8)


def test_another_unit_starts_empty(adapted: Make, batch: Batch) -> None:
    model = digitize_(adapted(), DigitalUnit(bits=8))
    assert loads(model, lambda: digitize_(model, DigitalUnit(bits=4))) == once(2, 4)
    undigitize_(model)
    assert loads(model, lambda: model(batch())) == {}


NAMES = ("a", "b", "c", "d")
SIZES = {"a": 1, "b": 2, "c": 3, "d": 5}


@given(
    st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True), max_size=12),
    st.integers(8, 12),
)
def test_the_memory_is_never_overfull_and_holds_what_runs(
    passes: list[list[str]], capacity: int
) -> None:
    """Against a list of names in the order of their last use."""
    slots = [Slot("x", name, Footprint(rank=1, per_rank=SIZES[name])) for name in NAMES]
    sram = Sram(DigitalUnit(bits=8, sram_kib=kib(capacity * 8)), slots)
    by_name = dict(zip(NAMES, slots, strict=True))
    recent: list[str] = []
    for names in passes:
        sram.require(tuple(names))
        for name in names:
            by_name[name].resident = True
        recent = [name for name in recent if name not in names] + names
        while sum(SIZES[name] for name in recent) > capacity:
            recent.pop(0)
        assert {name for name in NAMES if by_name[name].resident} == set(recent)
