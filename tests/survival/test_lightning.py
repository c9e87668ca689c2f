"""Lightning around a frozen model: checkpoints, averaging, precision, summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.utilities.model_summary import summarize

import aihwkit_lora as al
from aihwkit_lora.callbacks import FrozenGuard

EPOCHS = 4


def assert_learnt(module: pl.LightningModule, fresh: pl.LightningModule) -> None:
    """All adapters have moved, no conductance has."""
    now = module.adapters
    assert all(not torch.equal(now[n], p.to(now[n].dtype)) for n, p in fresh.adapters.items())
    assert al.fingerprint(module) == al.fingerprint(fresh)
    al.verify(module)


class PowerCut(pl.Callback):
    """Ends training within the third epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 15:
            raise RuntimeError("power cut")


# Checkpoints are written into a folder that has some already.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("averaging", [None, EMAWeightAveraging, WeightAveraging])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    regression: Any, fit: Any, tmp_path: Path, averaging: Any, few_kinds: Any
) -> None:
    def run(module: Any, *more: pl.Callback, **options: Any) -> None:
        averages = [] if averaging is None else [averaging()]
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = (saving, FrozenGuard(), *averages, *more)
        fit(module, *callbacks, enable_checkpointing=True, max_epochs=EPOCHS, **options)

    through, resumed = regression(few_kinds), regression(few_kinds)
    with pytest.raises(RuntimeError, match="power cut"):
        run(regression(few_kinds), PowerCut())
    # The file is loaded as Lightning does by default, with weights_only=True.
    run(resumed, resume=tmp_path / "epoch=1.ckpt")
    run(through)
    assert resumed.adapters.keys() == through.adapters.keys()
    assert all(torch.equal(p, through.adapters[n]) for n, p in resumed.adapters.items())
    assert_learnt(resumed, regression(few_kinds))
    few_kinds.assert_survived(resumed.model, through.model)


def test_a_checkpoint_builds_the_module_again(
    regression: Any, fit: Any, tmp_path: Path, kind: Any
) -> None:
    module = regression(kind)
    fit(module, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    loaded = regression.load_from_checkpoint(tmp_path / "a.ckpt", kind=kind)
    kind.assert_survived(loaded.model, module.model)


def test_a_checkpoint_fills_arrays_that_are_open_for_it(
    regression: Any, fit: Any, tmp_path: Path, few_kinds: Any
) -> None:
    module, other = regression(few_kinds), regression(few_kinds, seed=9)
    fit(module, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    assert al.fingerprint(other) != al.fingerprint(module)
    fit(other, FrozenGuard(), resume=tmp_path / "a.ckpt", max_epochs=2)
    assert_learnt(other, module)


AVERAGES = {
    "stochastic": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
    "exponential": EMAWeightAveraging,
    "plain": WeightAveraging,
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averaging_weights_leaves_conductances_alone(
    regression: Any, fit: Any, name: str, few_kinds: Any
) -> None:
    module, plain = regression(few_kinds), regression(few_kinds)
    fit(plain, max_epochs=EPOCHS)
    fit(module, FrozenGuard(1), AVERAGES[name](), max_epochs=EPOCHS)
    assert_learnt(module, regression(few_kinds))
    assert not any(torch.equal(p, plain.adapters[n]) for n, p in module.adapters.items())


PRECISIONS = {
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_precision_is_that_of_adapters_only(
    regression: Any, fit: Any, precision: str, few_kinds: Any
) -> None:
    module = regression(few_kinds)
    fit(module, FrozenGuard(), precision=precision)
    assert {p.dtype for p in module.adapters.values()} == {PRECISIONS[precision]}
    for _, layer in al.frozen_layers(module):
        assert layer.analog_module.conductance.dtype == torch.float32
        assert layer.analog_module.scale.dtype == torch.float32
    assert_learnt(module, regression(few_kinds))


class Unfreezing(BaseFinetuning):
    """Freezes the first layer by Lightning's means, and unfreezes it in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.base_model.model.layers[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            first = pl_module.model.base_model.model.layers[0]
            self.unfreeze_and_add_param_group(first, optimizer)


def moved(module: pl.LightningModule, fresh: pl.LightningModule) -> set[str]:
    old = dict(fresh.named_parameters())
    return {name for name, p in module.named_parameters() if not torch.equal(p, old[name])}


def test_finetuning_by_lightning_unfreezes_digital_parts_only(
    regression: Any, fit: Any, few_kinds: Any
) -> None:
    one, two, fresh = (regression(few_kinds) for _ in range(3))
    fit(one, FrozenGuard(1), Unfreezing(), max_epochs=1)
    assert moved(one, fresh) == {name for name in fresh.adapters if ".layers.0." not in name}
    fit(two, FrozenGuard(1), Unfreezing(), max_epochs=2)
    assert_learnt(two, fresh)
    # Unfreezing asks for the gradient of every parameter, the digital bias included.
    bias = "model.base_model.model.layers.0.base_layer.bias"
    assert moved(two, fresh) == {*fresh.adapters, bias}


def test_accumulated_gradients_are_those_of_a_larger_batch(
    regression: Any, fit: Any, few_kinds: Any
) -> None:
    module, whole = regression(few_kinds), regression(few_kinds)
    fit(module, FrozenGuard(1), accumulate_grad_batches=6, max_epochs=1)
    goal = torch.randn(12, 10, generator=torch.Generator().manual_seed(3))
    optimizer = whole.configure_optimizers()
    torch.nn.functional.mse_loss(whole.model(few_kinds.batch(12)), goal).backward()
    optimizer.step()
    assert_learnt(module, regression(few_kinds))
    torch.testing.assert_close(module.adapters, whole.adapters, rtol=0, atol=1e-4)


def test_clipping_and_anomaly_detection_run(regression: Any, fit: Any, few_kinds: Any) -> None:
    module = regression(few_kinds)
    fit(module, FrozenGuard(1), gradient_clip_val=0.1, detect_anomaly=True, max_epochs=1)
    assert_learnt(module, regression(few_kinds))


def test_summaries_count_adapters_and_digital_biases(
    regression: Any, fit: Any, kind_of: Any
) -> None:
    module = regression(kind_of())
    summary = summarize(module, max_depth=-1)
    adapters = 2 * (20 + 9) + 2 * (9 + 10)
    assert summary.trainable_parameters == adapters
    assert summary.total_parameters == adapters + 9
    layers = dict(zip(summary.layer_names, summary.param_nums, strict=True))
    assert layers["model.base_model.model.layers.0.base_layer.analog_module"] == 0
    fit(module, ModelSummary(max_depth=-1), max_epochs=1)
    assert_learnt(module, regression(kind_of()))
