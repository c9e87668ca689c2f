"""Observation of the digital side: adapters on a unit and off it, additions, activations."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.adapters import DigitalUnit, digitize_, power_cycle_, undigitize_
from aihwkit_lora.metering import EVENTS, Side

CHIP = replace(al.chips.get("rm-180nm"), rows=8, columns=4)
INS, HIDDEN, OUTS, RANK, N = 10, 6, 3, 2, 5
SRAM = ("sram_read_bits", "sram_write_bits")
X = torch.randn(N, INS, generator=torch.Generator().manual_seed(1))


def adapted(*layers: nn.Module, targets: tuple[str, ...] = ("0", "2"), **options: Any) -> PeftModel:
    torch.manual_seed(0)
    layers = layers or (nn.Linear(INS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTS))
    model = al.freeze_(al.convert(nn.Sequential(*layers), CHIP), programmed_by="test")
    defaults = {"r": RANK, "target_modules": list(targets), "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**(defaults | options))).eval()


def observed(model: nn.Module, x: Tensor = X, **options: Any) -> dict[str, dict[str, int]]:
    """Digital and memory events of a pass, by layer."""
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping), torch.no_grad():
        model(x, **options)
    assert ledger.total().level == "exact"
    beside = {event for event in EVENTS.names() if EVENTS.get(event).side != Side.ANALOG}
    return {
        layer: dict(counts.only(beside - {"shift_adds"}))
        for layer, counts in ledger.by_layer().items()
    }


@pytest.mark.parametrize(
    ("bits", "event", "width"),
    [
        (2, "forward_macs_int8", 2),
        (8, "forward_macs_int8", 8),
        (9, "forward_macs_int16", 9),
        (16, "forward_macs_int16", 16),
        (None, "forward_macs", 16),
    ],
)
@pytest.mark.parametrize("reuse", ["batch", "none"])
def test_macs_and_memory_of_a_branch(bits: int | None, event: str, width: int, reuse: Any) -> None:
    model = digitize_(adapted(), DigitalUnit(bits=bits, reuse=reuse))
    fetches = N if reuse == "none" else 1
    expected: dict[str, dict[str, int]] = {"1": {"activation_functions": N * HIDDEN}}
    for layer, (ins, outs) in {"0": (INS, HIDDEN), "2": (HIDDEN, OUTS)}.items():
        expected[layer] = {"additions": N * outs}
        for part, (read, write) in {"A": (ins, RANK), "B": (RANK, outs)}.items():
            expected[f"{layer}.lora_{part}.default"] = {
                event: N * read * write,
                "sram_read_bits": (read * write * fetches + N * read) * width,
                "sram_write_bits": N * write * width,
            }
    assert observed(model) == expected


def test_without_a_unit_there_is_no_memory() -> None:
    found = observed(undigitize_(digitize_(adapted(), DigitalUnit())))
    assert found == observed(adapted())
    assert found["0"] == {"additions": N * HIDDEN}
    assert found["0.lora_A.default"] == {"forward_macs": N * INS * RANK}


def test_a_convolution_reads_its_image_once_and_its_kernel_as_told() -> None:
    for reuse, fetches in (("batch", 1), ("none", 2 * 4 * 3)):
        model = adapted(nn.Conv2d(3, 5, (2, 3), padding=(0, 1)), targets=("0",))
        digitize_(model, DigitalUnit(bits=6, reuse=reuse))  # type: ignore[arg-type]
        found = observed(model, torch.ones(2, 3, 5, 3))
        assert found["0"] == {"additions": 2 * 5 * 4 * 3}
        assert found["0.lora_A.default"] == {
            "forward_macs_int8": 2 * 4 * 3 * RANK * 3 * 6,
            "sram_read_bits": (RANK * 3 * 6 * fetches + 2 * 3 * 5 * 3) * 6,
            "sram_write_bits": 2 * RANK * 4 * 3 * 6,
        }
        assert found["0.lora_B.default"] == {
            "forward_macs_int8": 2 * 4 * 3 * RANK * 5,
            "sram_read_bits": (RANK * 5 * fetches + 2 * RANK * 4 * 3) * 6,
            "sram_write_bits": 2 * 5 * 4 * 3 * 6,
        }


def test_a_bias_of_b_is_read_with_its_weights() -> None:
    model = digitize_(adapted(lora_bias=True), DigitalUnit(bits=8))
    found = observed(model)["2.lora_B.default"]
    assert found["sram_read_bits"] == (RANK * OUTS + OUTS + N * RANK) * 8
    assert found["forward_macs_int8"] == N * RANK * OUTS


SPLIT = digitize_(adapted(), DigitalUnit(bits=8, reuse="none"))


@given(st.integers(0, N))
def test_without_reuse_counts_do_not_depend_on_how_a_batch_is_split(cut: int) -> None:
    def total(*parts: Tensor) -> al.Counts:
        ledger = al.Ledger()
        with al.observe(SPLIT, ledger, phase="infer", mapping=CHIP.mapping), torch.no_grad():
            for part in parts:
                SPLIT(part)
        return ledger.total()

    assert total(X[:cut], X[cut:]) == total(X)


@pytest.mark.parametrize("unit", [None, DigitalUnit(bits=8), DigitalUnit(reuse="none")])
def test_an_empty_batch_costs_nothing(unit: DigitalUnit | None) -> None:
    model = adapted()
    if unit is not None:
        digitize_(model, unit)
    ledger = al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping), torch.no_grad():
        model(X[:0])
    assert ledger.total() == al.Counts()


def test_training_on_a_unit_counts_gradients_as_ever() -> None:
    found = []
    for unit in (DigitalUnit(bits=None), DigitalUnit(bits=8)):
        model, ledger = digitize_(adapted(), unit), al.Ledger()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
        with al.observe(model, ledger, phase="train", mapping=CHIP.mapping):
            model(X).square().sum().backward()
            optimizer.step()
        found.append(ledger.total())
    events = ("input_gradient_macs", "weight_gradient_macs", "optimizer_updates")
    floats, integers = ([counts[event] for event in events] for counts in found)
    first, second = RANK * (INS + HIDDEN), RANK * (HIDDEN + OUTS)
    down = RANK * INS  # nobody wants the gradient of the input
    assert floats == integers == [N * (first + second - down), N * (first + second), first + second]
    assert found[1]["forward_macs_int8"] == found[0]["forward_macs"] == N * (first + second)
    assert [found[1][event] * 2 for event in SRAM] == [found[0][event] for event in SRAM]


def test_each_active_adapter_adds_to_the_output() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=1, target_modules=["2"], init_lora_weights=False))
    for active, at_0, at_2 in (
        (["default"], 1, 1),
        (["second"], 0, 1),
        (["default", "second"], 1, 2),
    ):
        model.base_model.set_adapter(active)
        found = observed(model.eval())
        assert found["0"].get("additions", 0) == at_0 * N * HIDDEN
        assert found["2"]["additions"] == at_2 * N * OUTS
    with model.disable_adapter():
        assert not any("additions" in counts for counts in observed(model).values())


def test_rows_add_the_adapters_that_they_take() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=1, target_modules=["2"], init_lora_weights=False))
    names = ["default", "__base__", "second", "default", "default"]
    found = observed(model.eval(), adapter_names=names)
    assert found["0"]["additions"] == 3 * HIDDEN
    assert found["2"]["additions"] == 4 * OUTS
    assert found["2.lora_B.second"] == {"forward_macs": 1 * OUTS}


def test_magnitudes_are_applied_once() -> None:
    assert observed(adapted(use_dora=True))["2"]["additions"] == N * OUTS


def test_adapters_of_digital_layers_and_of_lookups_add_too() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    found = observed(model, torch.zeros(N, 2, dtype=torch.long))
    assert found["0"] == {"additions": N * 2 * 4}
    assert found["1"]["additions"] == N * 2 * 3


def test_adapters_merged_into_digital_weights_add_nothing() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter()
    assert "additions" not in observed(model, torch.ones(N, 4))["0"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_adapters_that_change_weights_add_to_no_output() -> None:
    """PEFT adds them to the weights of torch's attention, and of single parameters, for a pass."""
    attention = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"]))
    found = observed(attention, torch.ones(2, 3, 4))
    assert not any("additions" in counts for counts in found.values())
    single = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), single)
    assert not any("additions" in counts for counts in observed(model, torch.ones(N, 4)).values())


@pytest.mark.parametrize(
    "function",
    [
        *(nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Softmax(dim=-1)),
        *(nn.LeakyReLU(), nn.ELU(), nn.Hardswish(), nn.LogSoftmax(dim=-1), nn.PReLU(), nn.Mish()),
    ],
    ids=lambda function: type(function).__name__,
)
def test_activation_functions_count_their_values(function: nn.Module) -> None:
    assert observed(nn.Sequential(function), torch.ones(N, 3)) == {
        "0": {"activation_functions": N * 3}
    }


def test_a_gate_has_half_as_many_values_as_inputs() -> None:
    assert observed(nn.GLU(), torch.ones(N, 6)) == {"": {"activation_functions": N * 3}}


def test_activation_functions_of_transformers_count() -> None:
    activations = pytest.importorskip("transformers.activations")
    for name in ("gelu_new", "quick_gelu", "relu2"):
        model = nn.Sequential(activations.get_activation(name))
        assert observed(model, torch.ones(N, 3)) == {"0": {"activation_functions": N * 3}}


def test_functions_that_are_no_modules_are_not_seen() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    assert observed(Hidden(), X) == {}


def test_a_unit_may_come_and_go_while_it_is_observed() -> None:
    model, ledger = adapted(), al.Ledger()
    with al.observe(model, ledger, phase="float", mapping=CHIP.mapping) as watch, torch.no_grad():
        model(X)
        watch.phase = "deploy"
        digitize_(model, DigitalUnit(bits=8))
        watch.phase = "integer"
        model(X)
        watch.phase = "reload"
        power_cycle_(model)
        model(X)
        watch.phase = "float again"
        undigitize_(model)
        model(X)
    totals = {phase: ledger.total(phase=phase) for phase in ledger.phases()}
    sizes = RANK * (INS + HIDDEN + HIDDEN + OUTS)
    assert dict(totals["deploy"]) == {
        "adapter_loads": 2,
        "offchip_read_bits": 8 * sizes,
        "sram_write_bits": 8 * sizes,
    }
    assert totals["float"] == totals["float again"]
    assert totals["float"]["forward_macs"] == totals["integer"]["forward_macs_int8"] == N * sizes
    assert totals["integer"]["forward_macs"] == totals["integer"]["adapter_loads"] == 0
    assert totals["reload"] == totals["integer"] + totals["deploy"]


def test_nested_observers_see_the_same() -> None:
    model, outer, inner = (
        power_cycle_(digitize_(adapted(), DigitalUnit())),
        al.Ledger(),
        al.Ledger(),
    )
    with (
        al.observe(model, outer, phase="infer", mapping=CHIP.mapping),
        al.observe(model, inner, phase="infer", mapping=CHIP.mapping),
    ):
        model(X)
    assert outer.state_dict() == inner.state_dict()
    assert outer.total()["adapter_loads"] == 2


def test_a_pass_that_fails_counts_what_it_did() -> None:
    def fail(*_: object) -> None:
        raise KeyError("from a hook")

    model, ledger = digitize_(adapted(), DigitalUnit()), al.Ledger()
    expected = observed(model)
    hook = model.base_model.model[1].register_forward_hook(fail)
    with (
        pytest.raises(KeyError, match="from a hook"),
        al.observe(model, ledger, phase="infer", mapping=CHIP.mapping),
    ):
        model(X)
    hook.remove()
    done = ledger.by_layer()
    assert set(done) == {"0", "0.lora_A.default", "0.lora_B.default"}
    assert dict(done["0.lora_A.default"].only(SRAM)) == {
        event: expected["0.lora_A.default"][event] for event in SRAM
    }
    assert observed(model) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_on_a_unit_is_not_observed(copied: Any) -> None:
    model, ledger = digitize_(adapted(), DigitalUnit()), al.Ledger()
    with al.observe(model, ledger, phase="infer", mapping=CHIP.mapping):
        twin = copied(model)
        power_cycle_(twin)(X)
    assert ledger.total() == al.Counts()
    assert observed(twin) == observed(model)
