"""Pipelines of aihwkit that know nothing of us run as before when our package is imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

# Short forms of aihwkit's examples 1 (a layer), 3 (a convolutional net), 5 (hardware-aware
# training and drift) and 18 (recurrent nets), on torch tiles, which follow torch's seed.
PIPELINES = {
    "layer": """
        from aihwkit.nn import AnalogLinear
        model = AnalogLinear(4, 2, bias=True, rpu_config=TorchInferenceRPUConfig())
        x, y = torch.rand(3, 4), torch.rand(3, 2)
        optimizer = AnalogSGD(model.parameters(), lr=0.1)
        optimizer.regroup_param_groups(model)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        result = model(x)
    """,
    "convolutions": """
        from aihwkit.nn import AnalogConv2d, AnalogLinear, AnalogSequential
        config = TorchInferenceRPUConfig()
        model = AnalogSequential(
            AnalogConv2d(1, 4, 3, rpu_config=config), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(),
            AnalogLinear(4 * 5 * 5, 3, rpu_config=config), nn.LogSoftmax(dim=1),
        )
        optimizer = AnalogSGD(model.parameters(), lr=0.05)
        optimizer.regroup_param_groups(model)
        images = torch.rand(6, 1, 12, 12)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.nll_loss(model(images), torch.arange(6) % 3).backward()
            optimizer.step()
        result = model(images)
    """,
    "hardware-aware training, then drift": """
        from aihwkit.nn.conversion import convert_to_analog
        config = TorchInferenceRPUConfig()
        config.modifier.type = WeightModifierType.ADD_NORMAL
        config.modifier.std_dev = 0.1
        config.mapping.max_input_size = 8
        net = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))
        model = convert_to_analog(net, config)
        optimizer = AnalogSGD(model.parameters(), lr=0.05)
        x = torch.rand(6, 20)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(6) % 3).backward()
            optimizer.step()
        model.eval().drift_analog_weights(3600.0)
        result = model(x)
    """,
    "recurrent": """
        from aihwkit.nn import AnalogLSTMCell, AnalogRNN
        model = AnalogRNN(AnalogLSTMCell, 5, 6, rpu_config=TorchInferenceRPUConfig())
        optimizer = AnalogSGD(model.parameters(), lr=0.05)
        x = torch.rand(4, 2, 5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x)[0].square().mean().backward()
            optimizer.step()
        result = model(x)[0]
    """,
}
SCRIPT = """
import sys
if sys.argv[1] == "with":
    import aihwkit_lora
import torch
from aihwkit.optim import AnalogSGD
from aihwkit.simulator.configs import TorchInferenceRPUConfig
from aihwkit.simulator.parameters.enums import WeightModifierType
from torch import nn
torch.manual_seed(0)
{pipeline}
torch.save(result.detach(), sys.argv[2])
"""


def run(pipeline: str, folder: Path, imported: str) -> Path:
    script, out = folder / "pipeline.py", folder / f"{imported}.pt"
    script.write_text(SCRIPT.format(pipeline=textwrap.dedent(PIPELINES[pipeline])))
    subprocess.run(
        [sys.executable, str(script), imported, str(out)], check=True, capture_output=True
    )
    return out


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_it_gives_the_same_with_our_package_imported(pipeline: str, tmp_path: Path) -> None:
    ours, theirs = (torch.load(run(pipeline, tmp_path, how)) for how in ("with", "without"))
    assert ours.numel() > 0
    assert torch.equal(ours, theirs)
