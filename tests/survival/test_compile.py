"""torch.compile around a frozen model: the same numbers, and nothing remembered wrongly."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from aihwkit.inference import PCMLikeNoiseModel
from torch import Tensor, nn

import aihwkit_lora as al

# Dynamo of torch 2.15 looks at the gradients of hidden values that enter a part of a split graph.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
CHIP = al.chips.get("rm-180nm")
INDUCTOR = [("linear", "torch", "fused", "inductor")] if shutil.which("g++") else []
CASES = [
    ("linear", "inference", "fused", "eager"),
    ("linear", "inference", "reference", "eager"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            ("linear", "torch", "reference", "eager"),
            ("convolution", "pulsed", "fused", "aot_eager"),
            *INDUCTOR,
        )
    ),
]


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model: nn.Module, called: Any, x: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    called(x).square().mean().backward()
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_outputs_and_training_steps_are_the_same(case: tuple[str, ...], kind_of: Any) -> None:
    *names, backend = case
    kind = kind_of(*names)
    model, plain = kind.adapted(), kind.adapted()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        x = kind.x
        torch.testing.assert_close(compiled(x), plain(x), rtol=0, atol=1e-5)
        found, expected = step(model, compiled, x), step(plain, plain, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert al.fingerprint(compiled) == al.fingerprint(plain)
    al.verify(compiled)


def test_what_happens_to_the_arrays_is_seen(kind_of: Any) -> None:
    kind = kind_of()
    model = kind.frozen()
    compiled, x = torch.compile(model, backend="eager"), kind.x
    fresh = compiled(x)
    assert torch.equal(fresh, model(x))
    al.drift_(model, 3600.0, noise_model=PCMLikeNoiseModel())
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), fresh)
    al.drift_(model, 0.0)
    assert torch.equal(compiled(x), fresh)
    model.load_state_dict(kind.blank().state_dict())
    assert torch.equal(compiled(x), kind.blank()(x))


@pytest.mark.slow
def test_reads_are_counted_in_a_compiled_model(kind_of: Any) -> None:
    kind = kind_of()
    model, ledger = kind.frozen(), al.Ledger()
    compiled = torch.compile(model, backend="eager")
    compiled(kind.x)
    for phase, called in (("plain", model), ("compiled", compiled)):
        with al.observe(model, ledger, phase=phase, mapping=CHIP.mapping):
            called(kind.x)
            called(kind.batch(5))
    assert ledger.total(phase="compiled") == ledger.total(phase="plain")
    assert ledger.total(phase="plain")["tile_reads"] == (3 + 5) * (6 + 4)


def test_noise_of_a_compiled_model_follows_the_seed(kind_of: Any) -> None:
    kind = kind_of(noisy=True)
    model = kind.adapted()
    compiled = torch.compile(model, backend="eager")
    outputs = []
    for called, seed in ((model, 0), (compiled, 0), (compiled, 0), (compiled, 1)):
        torch.manual_seed(seed)
        outputs.append(called(kind.x))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])
    assert not torch.equal(outputs[3], outputs[0])


def test_importing_the_package_does_not_import_the_compiler() -> None:
    program = "import aihwkit_lora, sys; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
