"""Counts of the callbacks against an oracle that counts by hand, one at a time.

All events but the two sums of x²·G, which ``tests/metering/test_tile_probe.py`` adds up by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from aihwkit.simulator.parameters.enums import BoundManagementType
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

import aihwkit_lora as al
from aihwkit_lora.callbacks import EnergyMeter, PulseCounter
from aihwkit_lora.metering import Counts

ROWS, COLUMNS, RANK, BATCH = 4, 3, 2, 2


@dataclass(frozen=True)
class Layer:
    """What the oracle knows of a layer.

    Args:
        name: As in the model.
        ins: Inputs, those of one window for a convolution.
        outs: Outputs.
        vectors: Input vectors of one sample, windows of a convolution, time steps.
        back: Whether gradients pass to its input.
        adapter: Whether LoRA is attached.
    """

    name: str
    ins: int
    outs: int
    vectors: int = 1
    back: bool = True
    adapter: bool = True


def perceptron():
    model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 2))
    layers = [
        Layer("0", 10, 7, back=False),
        Layer("2", 7, 5),
        Layer("4", 5, 2, adapter=False),
    ]
    return model, torch.Size([10]), layers, 7 + 5


def convolution():
    convs = (nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 2, stride=2), nn.Flatten())
    layers = [
        Layer("0", 2 * 9, 5, vectors=16, back=False),
        Layer("2", 5 * 4, 3, vectors=4),
        Layer("4", 12, 2),
    ]
    return nn.Sequential(*convs, nn.Linear(12, 2)), torch.Size([2, 4, 4]), layers, 16 * 5


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, potential):
        ctx.save_for_backward(potential)
        return (potential > 0.3).float()

    @staticmethod
    def backward(ctx, grad):
        (potential,) = ctx.saved_tensors
        return grad / (1 + (potential - 0.3).abs()) ** 2


class Spiking(nn.Module):
    """Leaky neurons in a loop over time; spikes of the first layer come back to it."""

    STEPS = 3

    def __init__(self):
        super().__init__()
        self.inward, self.recurrent = nn.Linear(6, 5), nn.Linear(5, 5, bias=False)
        self.outward = nn.Linear(5, 2)

    def forward(self, spikes):
        fired = potential = spikes.new_zeros(len(spikes), 5)
        out = 0
        for _ in range(self.STEPS):
            potential = 0.8 * potential + self.inward(spikes) + self.recurrent(fired)
            fired = Spike.apply(potential)
            out = out + self.outward(fired)
        return out


def spiking():
    steps = Spiking.STEPS
    layers = [
        Layer("inward", 6, 5, vectors=steps, back=False),
        # Nothing has fired before the first time step, so no gradient passes there.
        Layer("recurrent", 5, 5, vectors=steps - 1),
        Layer("recurrent", 5, 5, back=False),
        Layer("outward", 5, 2, vectors=steps, adapter=False),
    ]
    return Spiking(), torch.Size([6]), layers, 0


class Transformer(nn.Module):
    TOKENS, WIDTH = 3, 6

    def __init__(self):
        super().__init__()
        width = self.WIDTH
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 10), nn.Linear(10, width)
        self.first, self.second, self.activation = nn.LayerNorm(6), nn.LayerNorm(6), nn.GELU()
        self.head = nn.Linear(width, 2)
        self.requires_grad_(False)

    def forward(self, x):
        y = self.first(x)
        attended = scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        x = x + self.out(attended)
        x = x + self.narrow(self.activation(self.wide(self.second(x))))
        return self.head(x).mean(dim=1)


def transformer():
    tokens = Transformer.TOKENS
    layers = [
        Layer("query", 6, 6, tokens, back=False),
        Layer("key", 6, 6, tokens, back=False, adapter=False),
        Layer("value", 6, 6, tokens, back=False),
        Layer("out", 6, 6, tokens, adapter=False),
        Layer("wide", 6, 10, tokens),
        Layer("narrow", 10, 6, tokens, adapter=False),
        Layer("head", 6, 2, tokens, adapter=False),
    ]
    return Transformer(), torch.Size([tokens, Transformer.WIDTH]), layers, tokens * 10


MODELS = {model.__name__: model for model in (perceptron, convolution, spiking, transformer)}


def pieces(size: int, most: int) -> list[int]:
    """How aihwkit cuts a side of a layer: evenly, larger pieces first."""
    found = [0] * -(-size // most)
    for index in range(size):
        found[index % len(found)] += 1
    return found


def tiles(layer: Layer) -> Iterator[tuple[int, int]]:
    """Rows and columns of each tile."""
    for rows in pieces(layer.ins, ROWS):
        for columns in pieces(layer.outs, COLUMNS):
            yield rows, columns


def forwards(layer: Layer) -> Iterator[str]:
    """Every single event of one sample on its way forwards."""
    for _ in range(layer.vectors):
        yield "array_cycles"
        for rows, columns in tiles(layer):
            yield "tile_reads"
            yield from ["row_drives"] * rows
            for _ in range(rows):
                yield from ["row_drive_bits"] * 8
                yield from ["cell_reads"] * columns
            for _ in range(columns):
                yield from ("adc_conversions", "shift_adds")
        if layer.adapter:
            yield from ["forward_macs"] * RANK * (layer.ins + layer.outs)
            yield from ["additions"] * layer.outs


def backwards(layer: Layer) -> Iterator[str]:
    """Every single event of one sample's gradients."""
    for _ in range(layer.vectors):
        if layer.adapter:
            yield from ["weight_gradient_macs"] * RANK * (layer.ins + layer.outs)
            yield from ["input_gradient_macs"] * RANK * layer.outs
        if layer.adapter and layer.back:
            yield from ["input_gradient_macs"] * RANK * layer.ins
        if layer.back:
            yield "transposed_array_cycles"
        for rows, columns in tiles(layer) if layer.back else ():
            yield "transposed_tile_reads"
            for _ in range(columns):
                yield "transposed_row_drives"
                yield from ["transposed_row_drive_bits"] * 8
                yield from ["transposed_cell_reads"] * rows
            for _ in range(rows):
                yield from ("transposed_adc_conversions", "transposed_shift_adds")


def active_drives(vectors: Tensor, layer: Layer) -> int:
    """Rows that are driven with another code than 0, for each tile along the output."""
    found = 0
    for vector in vectors.reshape(-1, layer.ins).tolist():
        for rows in pieces(layer.ins, ROWS):
            tile, vector = vector[:rows], vector[rows:]
            largest = max(map(abs, tile)) or 1.0
            found += sum(round(127 * value / largest) != 0 for value in tile)
    return found * len(pieces(layer.outs, COLUMNS))


def vectors_of(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        return x.transpose(1, 2)
    return x


def hybrid(model: nn.Module, layers: list[Layer], chip: al.chips.Chip) -> nn.Module:
    """Frozen layers with adapters where the oracle expects them, and a digital head."""
    model = al.freeze_(al.convert(model.requires_grad_(False), chip), programmed_by="test")
    adapted = [layer.name for layer in layers if layer.adapter]
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=sorted(set(adapted))))
    return nn.Sequential(model, nn.Linear(2, 2))


def watch_drives(model: nn.Module, layers: list[Layer]) -> Counter[str]:
    """Count active drives of both phases from now on, from what each layer is given."""
    active: Counter[str] = Counter()
    known = {layer.name: layer for layer in layers}
    for name, module in al.frozen_layers(model):
        layer = known[name.removesuffix(".base_layer").rpartition(".")[2]]

        def note(module, inputs, layer=layer):
            phase = "train" if module.training else "validate"
            active[phase] += active_drives(vectors_of(module, inputs[0]), layer)

        module.register_forward_pre_hook(note)
    return active


def data(shape: torch.Size, batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH * batches, *shape, generator=generator)
    x[x.abs() < 0.2] = 0.0
    y = torch.randn(BATCH * batches, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def oracle(layers: list[Layer], activations: int, *, gradients: bool) -> Counter[str]:
    """Events of one sample."""
    events = Counter(event for layer in layers for event in forwards(layer))
    events.update(event for layer in layers if gradients for event in backwards(layer))
    events["activation_functions"] = activations
    events["forward_macs"] += 2 * 2
    if gradients:
        events["input_gradient_macs"] += 2 * 2
        events["weight_gradient_macs"] += 2 * 2
    return events


def times(events: Counter[str], n: int) -> Counter[str]:
    return Counter({event: n * count for event, count in events.items()})


def counted(ledger: al.Ledger, phase: str) -> Counter[str]:
    total = ledger.total(phase=phase)
    return Counter({event: n for event, n in total.items() if not event.endswith("_x2g")})


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_oracle(lab, name):
    torch.manual_seed(2)
    net, shape, layers, activations = MODELS[name]()
    chip = replace(lab.fake, rows=ROWS, columns=COLUMNS)
    assert chip.rpu_config().forward.bound_management == BoundManagementType.NONE
    model, ledger = hybrid(net, layers, chip), al.Ledger()
    active = watch_drives(model, layers)
    trainer = lab.fit(
        lab.Module(model), PulseCounter(ledger), EnergyMeter(chip, ledger),
        data=(data(shape, 5), data(shape, 2)), accumulate_grad_batches=2,
    )  # fmt: skip

    sample, shown = (oracle(layers, activations, gradients=wanted) for wanted in (True, False))
    updates = sum(p.numel() for p in model.parameters() if p.requires_grad)
    drives = {phase: {
        "active_row_drives": n, "active_row_drive_bits": 8 * n
    } for phase, n in active.items()}  # fmt: skip
    training = times(sample, 5 * BATCH) + Counter({"optimizer_updates": 3 * updates})
    assert counted(ledger, "train") == training + Counter(drives["train"])
    assert counted(ledger, "validate") == times(shown, 2 * BATCH) + Counter(drives["validate"])

    # Two batches, two batches, and the last one.
    steps = [
        al.price(Counts(times(sample, n * BATCH) | {"optimizer_updates": updates}), chip)
        for n in (2, 2, 1)
    ]
    rows = [row for row in trainer.memory.logged if "energy_j" in row]
    assert [row["energy_j"] for row in rows] == [step.energy_j.value for step in steps]
    assert [row["latency_s"] for row in rows] == [step.latency_s.value for step in steps]
    assert {row["pulses"] for row in rows} == {0.0}


@pytest.mark.parametrize("name", MODELS)
def test_the_oracle_sees_an_error_of_one(lab, name):
    _, _, layers, activations = MODELS[name]()
    sample = oracle(layers, activations, gradients=True)
    smaller = replace(layers[0], ins=layers[0].ins - 1)
    other = oracle([smaller, *layers[1:]], activations, gradients=True)
    assert sample["row_drives"] != other["row_drives"]
    assert sample["forward_macs"] - other["forward_macs"] == RANK * layers[0].vectors
