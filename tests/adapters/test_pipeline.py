"""Arrays and digital unit side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

import aihwkit_lora as al
from aihwkit_lora.adapters import DigitalUnit, digitize_, pipeline
from aihwkit_lora.metering import Interval, PriceList, Quantity, Status

CYCLE = Quantity(value=2e-6, unit="s", source="test", status=Status.ASSUMED, low=1e-6, high=4e-6)
CHIP = replace(
    al.chips.get("rm-180nm"),
    name="test",
    prices=PriceList(energy={}, latency={"array_cycles": CYCLE}),
)
UNIT = DigitalUnit(macs_per_cycle=10, clock_hz=1e6)  # 10 MAC/µs


def layer(cycles: int, *macs: int) -> dict[str, al.Counts]:
    events = ("forward_macs", "forward_macs_int8", "forward_macs_int16")
    parts = {
        f"fc.lora_{part}.{name}": al.Counts({event: count})
        for part, name, event, count in zip("ABB", ("x", "x", "y-2"), events, macs, strict=False)
    }
    return {"fc": al.Counts({"array_cycles": cycles}), **parts}


@pytest.mark.parametrize(
    ("macs", "digital", "bottleneck", "overlapped"),
    [
        ((), 0.0, "analog", (6, 3, 12)),
        ((20, 10), 3.0, "analog", (6, 3, 12)),
        ((20, 10, 30), 6.0, "analog", (6, 6, 12)),
        ((20, 10, 70), 10.0, "digital", (10, 10, 12)),
        ((200, 0, 100), 30.0, "digital", (30, 30, 30)),
    ],
)
def test_a_layer_waits_for_the_slower_of_the_two(
    macs: tuple[int, ...], digital: float, bottleneck: str, overlapped: tuple[float, ...]
) -> None:
    (found,) = pipeline(layer(3, *macs), CHIP, UNIT).layers
    assert (found.layer, found.bottleneck) == ("fc", bottleneck)
    assert found.digital_s == pytest.approx(digital * 1e-6, rel=1e-12)
    micro = [end * 1e6 for end in found.overlapped_s.to_dict().values()]
    assert micro == pytest.approx(overlapped, rel=1e-12)
    sequential = [end * 1e6 for end in found.sequential_s.to_dict().values()]
    assert sequential == pytest.approx([end + digital for end in (6, 3, 12)], rel=1e-12)


def test_layers_wait_for_each_other() -> None:
    counts = {"a": al.Counts({"array_cycles": 2}), "b": al.Counts({"forward_macs": 100})}
    counts |= {
        "a.lora_A.x": al.Counts({"forward_macs_int8": 50}),
        "": al.Counts(),
        "act": al.Counts(),
    }
    report = pipeline(counts, CHIP, UNIT)
    assert [(part.layer, part.bottleneck) for part in report.layers] == [
        ("a", "digital"),
        ("b", "digital"),
    ]
    assert report.chip == "test"
    assert report.overlapped_s.value == pytest.approx(15e-6, rel=1e-12)
    assert report.sequential_s.value == pytest.approx(19e-6, rel=1e-12)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_overlap_helps_by_at_most_a_half(cycles: int, macs: int) -> None:
    report = pipeline(layer(cycles, macs), CHIP, UNIT)
    most, least = report.sequential_s.value, report.overlapped_s.value
    assert most / 2 <= least * (1 + 1e-12)
    assert least <= most * (1 + 1e-12)
    assert report.overlapped_s == Interval.sum(part.overlapped_s for part in report.layers)


def test_a_layer_and_its_adapters_belong_together(
    adapted: Callable[..., PeftModel], batch: Callable[..., Tensor]
) -> None:
    model, ledger = digitize_(adapted(), UNIT), al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping), torch.no_grad():
        model(batch(size=7))
    report = pipeline(ledger.by_layer("infer"), CHIP, UNIT)
    assert [part.layer for part in report.layers] == ["0", "2", "3"]
    assert [round(part.digital_s * 1e7) for part in report.layers] == [
        7 * 2 * sizes for sizes in (10 + 12, 12 + 8, 8 + 3)
    ]
    assert all(part.analog_s == CYCLE.interval * 7 for part in report.layers)


def test_what_claims_no_latency_is_refused() -> None:
    with pytest.raises(
        al.ConfigurationError, match="expected macs_per_cycle and clock_hz, got None"
    ):
        pipeline(layer(3, 20), CHIP, DigitalUnit())
    free = replace(CHIP, prices=PriceList(energy={}, latency={}))
    with pytest.raises(
        al.ConfigurationError, match="chip 'test': expected a latency of 'array_cyc"
    ):
        pipeline(layer(3, 20), free, UNIT)
