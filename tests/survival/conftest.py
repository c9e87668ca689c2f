"""Frozen models of every kind, with adapters, and what it takes to have survived something."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from aihwkit.nn.conversion import convert_to_analog
from aihwkit.simulator.configs import InferenceRPUConfig, TorchInferenceRPUConfig
from aihwkit.simulator.presets import ReRamESPreset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import aihwkit_lora as al

TILE = 8
CONFIGS = {
    "inference": InferenceRPUConfig,
    "torch": TorchInferenceRPUConfig,
    "pulsed": ReRamESPreset,
}
ENGINES = ("fused", "reference")
INPUTS = {"linear": (20,), "convolution": (2, 4, 4)}
OUTPUTS = 10


class Net(nn.Module):
    """Layers inside a module that no conversion replaces."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def digital(network: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if network == "linear":
        return Net(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, OUTPUTS, bias=False))
    return Net(
        *(nn.Conv2d(2, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 3, 2, stride=2, bias=False)),
        *(nn.Flatten(), nn.Linear(12, OUTPUTS)),
    )


@functools.cache
def converted(network: str, config: str, noisy: bool, tile: int, seed: int) -> nn.Module:
    rpu_config = CONFIGS[config]()
    rpu_config.mapping.max_input_size = rpu_config.mapping.max_output_size = tile
    for direction in ("forward", "backward"):
        periphery = getattr(rpu_config, direction, None)
        if periphery is not None and not noisy:
            periphery.inp_noise = periphery.out_noise = periphery.w_noise = 0.0
    model = convert_to_analog(digital(network, seed), rpu_config, ensure_analog_root=False)
    return model.requires_grad_(False)


def with_adapters(model: nn.Module, **options: Any) -> nn.Module:
    """Attach adapters; unless asked otherwise they have an effect from the start."""
    torch.manual_seed(2)
    options = {"r": 2, "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(target_modules=al.target_modules(model), **options))


def optimise(model: nn.Module, x: Tensor, steps: int = 1) -> None:
    """Train what wants a gradient, deterministically."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@dataclass(frozen=True)
class Kind:
    """A network on one kind of tiles, read by one engine; each layer is several tiles."""

    network: str = "linear"
    config: str = "torch"
    engine: str = "fused"
    noisy: bool = False
    tile: int = TILE

    def __str__(self) -> str:
        return f"{self.network} {self.config} {self.engine}"

    @property
    def x(self) -> Tensor:
        """A batch of three."""
        return self.batch(3)

    def batch(self, vectors: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(vectors, *INPUTS[self.network], generator=generator)

    def frozen(self, seed: int = 0) -> nn.Module:
        """A frozen model of its own; all of one kind and seed hold the same."""
        made = converted(self.network, self.config, self.noisy, self.tile, seed)
        model = al.freeze_(copy.deepcopy(made), programmed_by="checkpoint", engine=self.engine)
        if self.config == "pulsed":
            # What aihwkit writes into pulsed tiles follows no seed; here every run has the same.
            model.load_state_dict(replace(self, config="torch").frozen(seed).state_dict())
        return model

    def blank(self) -> nn.Module:
        """A frozen model of the same shape that holds something else."""
        return self.frozen(seed=9)

    def adapted(self, seed: int = 0, **options: Any) -> nn.Module:
        """A frozen model with adapters that have an effect."""
        return with_adapters(self.frozen(seed), **options)

    def assert_survived(self, model: nn.Module, original: nn.Module) -> None:
        """Same outputs, same conductances, and whatever adapters there are still learn."""
        x = self.x
        assert torch.equal(model(x), original(x))
        assert al.fingerprint(model) == al.fingerprint(original)
        al.verify(model)
        if not any(p.requires_grad for p in model.parameters()):
            model = with_adapters(model)
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in adapters.items()}
        optimise(model, x)
        assert not any(torch.equal(adapters[name], old) for name, old in before.items())
        assert al.fingerprint(model) == al.fingerprint(original)
        al.verify(model)


KINDS = [Kind(n, c, e) for n in INPUTS for c in CONFIGS for e in ENGINES]


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=[k for k in KINDS if k.network == "linear"], ids=str)
def linear_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(
    params=[
        *(Kind("linear", "inference", "fused"), Kind("linear", "torch", "reference")),
        Kind("convolution", "pulsed", "fused"),
    ],
    ids=str,
)
def few_kinds(request: pytest.FixtureRequest) -> Kind:
    """Each configuration, engine and network at least once."""
    return request.param


@pytest.fixture(params=[k for k in KINDS if k.engine == "fused"], ids=str)
def fused_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def kind_of() -> type[Kind]:
    """Kinds made to order."""
    return Kind


@pytest.fixture
def train() -> Callable[..., None]:
    return optimise


class Regression(pl.LightningModule):
    """An adapted model that learns random numbers; it can be built from its own checkpoint."""

    def __init__(self, kind: Kind, seed: int = 0) -> None:
        super().__init__()
        self.kind, self.model = kind, kind.adapted(seed)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("checked", nn.functional.mse_loss(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)

    @property
    def adapters(self) -> dict[str, Tensor]:
        """Copies of all that is trained."""
        return {n: p.detach().clone() for n, p in self.named_parameters() if p.requires_grad}


@pytest.fixture
def regression() -> type[Regression]:
    return Regression


@pytest.fixture
def fit() -> Callable[..., pl.Trainer]:
    """Train on six batches an epoch."""

    def run(
        module: Regression, *callbacks: pl.Callback, resume: Any = None, **options: Any
    ) -> pl.Trainer:
        options = {"max_epochs": 2, "enable_checkpointing": False} | options
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **options,
        )
        goal = torch.randn(12, OUTPUTS, generator=torch.Generator().manual_seed(3))
        data = DataLoader(TensorDataset(module.kind.batch(12), goal), batch_size=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")
            trainer.fit(module, data, data, ckpt_path=resume)
        return trainer

    return run
