"""Observation of training: gradients, optimiser steps, phases, and when counting ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import aihwkit_lora as al
from aihwkit_lora.errors import StageError
from aihwkit_lora.recipes.mixer import LORA_TARGETS, MlpMixer

CHIP = replace(al.chips.get("rm-180nm"), rows=8, columns=4)
# in, out and tiles along both; rank of the adapters; vectors
FIRST, SECOND, THIRD, RANK, N = (20, 9, 3, 3), (9, 6, 2, 2), (6, 5, 1, 2), 2, 7


def frozen_model() -> nn.Module:
    torch.manual_seed(0)
    shapes = (FIRST, SECOND, THIRD)
    model = nn.Sequential(*(nn.Linear(ins, outs) for ins, outs, _, _ in shapes))
    model = al.convert(model, CHIP)
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model)


def adapted() -> nn.Module:
    return get_peft_model(frozen_model(), LoraConfig(r=RANK, target_modules=["0", "1", "2"]))


def vectors() -> Tensor:
    return torch.randn(N, FIRST[0], generator=torch.Generator().manual_seed(1))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trained(model: nn.Module, x: Tensor) -> al.Ledger:
    ledger = al.Ledger()
    optimizer = torch.optim.Adam(trainable(model))
    with al.observe(model, ledger, phase="train"):
        model(x).square().sum().backward()
        optimizer.step()
    return ledger


def backwards(ins: int, outs: int, in_tiles: int, out_tiles: int) -> dict[str, int]:
    return {
        "transposed_array_cycles": N,
        "transposed_tile_reads": N * in_tiles * out_tiles,
        "transposed_row_drives": N * outs * in_tiles,
        "transposed_row_drive_bits": 8 * N * outs * in_tiles,
        "transposed_cell_reads": N * ins * outs,
        "transposed_adc_conversions": N * ins * out_tiles,
        "transposed_shift_adds": N * ins * out_tiles,
    }


@pytest.mark.parametrize("first_wants_gradient", [False, True])
def test_a_training_step_of_a_model_with_adapters(first_wants_gradient: bool) -> None:
    x = vectors().requires_grad_(first_wants_gradient)
    ledger = trained(adapted(), x)
    for layer, (ins, outs, in_tiles, out_tiles) in enumerate((FIRST, SECOND, THIRD)):
        back = layer > 0 or first_wants_gradient
        counts = ledger.total(layer=str(layer))
        conducted = "transposed_cell_read_x2g"
        found = {k: counts[k] for k in counts if k.startswith("transposed") and k != conducted}
        assert found == (backwards(ins, outs, in_tiles, out_tiles) if back else {})
        assert counts["cell_reads"] == N * ins * outs
        assert counts["shift_adds"] == N * outs * in_tiles
        down, up = N * ins * RANK, N * RANK * outs
        assert dict(ledger.total(layer=f"{layer}.lora_A.default")) == {
            "forward_macs": down,
            "weight_gradient_macs": down,
        } | ({"input_gradient_macs": down} if back else {})
        assert dict(ledger.total(layer=f"{layer}.lora_B.default")) == {
            "forward_macs": up,
            "input_gradient_macs": up,
            "weight_gradient_macs": up,
        }
    sizes = RANK * sum(ins + outs for ins, outs, _, _ in (FIRST, SECOND, THIRD))
    assert dict(ledger.total(layer="")) == {"optimizer_updates": sizes}
    assert ledger.total().level == "exact"


def test_inference_counts_no_gradients() -> None:
    model, ledger = adapted(), al.Ledger()
    with al.observe(model, ledger, phase="infer"), torch.no_grad():
        model(vectors())
    assert not [k for k in ledger.total() if "gradient" in k or "transposed" in k]


def test_a_frozen_digital_layer_passes_gradients_on_but_takes_none() -> None:
    model, ledger = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)), al.Ledger()
    model[1].weight.requires_grad_(False)
    with al.observe(model, ledger, phase="train"):
        model(torch.ones(N, 3)).sum().backward()
    assert [dict(ledger.total(layer=layer)) for layer in "012"] == [
        {"forward_macs": N * 12, "weight_gradient_macs": N * 12},
        {"forward_macs": N * 20, "input_gradient_macs": N * 20},
        {"forward_macs": N * 10, "input_gradient_macs": N * 10, "weight_gradient_macs": N * 10},
    ]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimiser_step_updates_own_parameters_that_have_a_gradient(kind: type) -> None:
    model, stranger = nn.ModuleList([nn.Linear(3, 4), nn.Linear(5, 6)]), nn.Linear(7, 8)
    ledger = al.Ledger()
    optimizer = kind([*model.parameters(), *stranger.parameters()], lr=0.1)
    with al.observe(model, ledger, phase="train"):
        (model[0](torch.ones(1, 3)).sum() + stranger(torch.ones(1, 7)).sum()).backward()
        optimizer.step()
        optimizer.step()
    optimizer.step()
    assert ledger.total()["optimizer_updates"] == 2 * (3 * 4 + 4)


def test_the_phase_may_change_inside_the_block() -> None:
    model, ledger = frozen_model(), al.Ledger()
    with al.observe(model, ledger, phase="forget") as observer:
        model(vectors())
        observer.phase = "new"
        model(vectors()[:2])
        observer.phase = "infer"
        model(vectors()[:1])
    assert ledger.phases() == ("forget", "new", "infer")
    cycles = [ledger.total(phase=phase, layer="0")["array_cycles"] for phase in ledger.phases()]
    assert cycles == [N, 2, 1]


def test_nothing_is_counted_after_the_block() -> None:
    model = adapted()
    ledger = trained(model, vectors())
    before, optimizer = ledger.total(), torch.optim.Adam(trainable(model))
    model(vectors()).sum().backward()
    optimizer.step()
    assert ledger.total() == before


def test_an_exception_ends_counting() -> None:
    model, ledger = adapted(), al.Ledger()

    def fail() -> None:
        with al.observe(model, ledger, phase="infer"):
            model(vectors())
            raise KeyError("from the block")

    with pytest.raises(KeyError, match="from the block"):
        fail()
    before = ledger.total()
    assert before["cell_reads"] == N * (20 * 9 + 9 * 6 + 6 * 5)
    model(vectors())
    assert ledger.total() == before


def test_one_ledger_does_not_count_a_model_twice() -> None:
    model, ledger, other = adapted(), al.Ledger(), al.Ledger()
    with al.observe(model, ledger, phase="infer") as observer:
        with pytest.raises(StageError, match="expected an observer that is not running"):
            observer.start()
        with pytest.raises(StageError, match=r"layer '.*0': .* does not observe this"):
            al.observe(model, ledger, phase="new").start()
        with al.observe(model, other, phase="new"):
            model(vectors())
        model(vectors())
    assert ledger.total() == other.total().scaled(2)


def test_an_observer_can_be_started_again() -> None:
    model, ledger = adapted(), al.Ledger()
    observer = al.observe(model, ledger, phase="infer")
    observer.stop()
    for _ in range(3):
        observer.start()
        model(vectors())
        observer.stop()
        model(vectors())
    assert ledger.total(layer="0")["array_cycles"] == 3 * N


def test_rewritten_arrays_are_counted_with_their_new_conductances() -> None:
    model, x = frozen_model(), vectors()
    after, ledger = al.Ledger(), al.Ledger()
    with al.observe(model, ledger, phase="before") as observer:
        model(x)
        al.reprogram_(model, CHIP, {"0": -1.0 * model[0].weight}, seed=1)
        observer.phase = "after"
        model(x)
    with al.observe(model, after, phase="after"):
        model(x)
    assert ledger.total(phase="after") == after.total()
    x2g = [ledger.total(phase=p, layer="0")["cell_read_x2g"] for p in ("before", "after")]
    assert x2g[0] != x2g[1]


def test_the_face_workload_has_its_published_size() -> None:
    torch.manual_seed(0)
    mixer, images = MlpMixer(), torch.rand(3, 1, 16, 16)
    chip, ledger = al.chips.get("rm-180nm"), al.Ledger()
    assert sum(parameter.numel() for parameter in mixer.parameters()) == 5148
    model = al.convert(mixer, chip)
    assert al.program_(model, chip, seed=0).counts["programmed_cells"] == 5048
    model = get_peft_model(al.freeze_(model), LoraConfig(r=6, target_modules=LORA_TARGETS))
    assert sum(parameter.numel() for parameter in trainable(model)) == 1404
    with al.observe(model, ledger, phase="infer"), torch.no_grad():
        model(images)
    counts = ledger.total(phase="infer")
    assert (counts["cell_reads"], counts["forward_macs"]) == (3 * 87_160, 3 * 20_124)
    updates = trained(model, images).total()["optimizer_updates"]
    assert updates == 1404


def test_a_step_within_a_step_counts_once() -> None:
    class Noisy(torch.optim.SGD):
        """An optimiser that calls its parent's step, which torch has hooked as well."""

        def step(self, closure=None):
            return super().step(closure)

    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    plain, noisy = (kind(model.parameters(), lr=0.1) for kind in (torch.optim.SGD, Noisy))
    for optimizer in (plain, noisy, plain):
        ledger = al.Ledger()
        with al.observe(model, ledger, phase="train"):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        assert ledger.total()["optimizer_updates"] == 6


def test_a_step_that_raises_does_not_hide_the_next() -> None:
    model, ledger = nn.Sequential(nn.Linear(3, 2, bias=False)), al.Ledger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fail():
        raise RuntimeError("no closure today")

    with al.observe(model, ledger, phase="train"):
        model(torch.ones(1, 3)).sum().backward()
        with pytest.raises(RuntimeError, match="no closure today"):
            optimizer.step(fail)
        optimizer.step()
    assert ledger.total()["optimizer_updates"] == 6
