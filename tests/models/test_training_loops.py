"""Trainer of transformers and of Lightning: checkpoints and going on from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

import aihwkit_lora as al

# peft 0.21.2 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

Make = Callable[..., Any]


def adapted(model: Any, case: Any) -> PeftModel:
    set_seed(4)
    return get_peft_model(model, LoraConfig(r=2, target_modules=case.targets(model)))


def samples(case: Any) -> list[dict[str, Tensor]]:
    batch = case.batch()
    return [{name: values[i] for name, values in batch.items()} for i in range(4)]


def equal(one: PeftModel, other: PeftModel) -> bool:
    states = [get_peft_model_state_dict(model) for model in (one, other)]
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def hugging_face(model: PeftModel, case: Any, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=samples(case))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_transformers_trainer_saves_adapters_only_and_resumes(
    name: str, cases: dict[str, Any], frozen: Make, tmp_path: Path
) -> None:
    case = cases[name]
    through, stopped, resumed = (adapted(frozen(case), case) for _ in range(3))
    fingerprint = al.fingerprint(through)
    hugging_face(through, case, tmp_path / "a", max_steps=3, save_strategy="no").train()
    hugging_face(stopped, case, tmp_path / "b", max_steps=2, save_steps=2).train()
    checkpoint = tmp_path / "b" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not list(checkpoint.glob("model*.safetensors"))
    trainer = hugging_face(resumed, case, tmp_path / "c", max_steps=3, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert equal(resumed, through)
    assert not equal(resumed, stopped)
    assert al.fingerprint(through) == al.fingerprint(resumed) == fingerprint
    al.verify(resumed)


class Module(pl.LightningModule):
    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.01)


def lightning(module: Module, case: Any, epochs: int, checkpoint: Path | None = None) -> pl.Trainer:
    module.train()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(samples(case), batch_size=2), ckpt_path=checkpoint)
    return trainer


# Without dropout, since a checkpoint of Lightning does not hold torch's random state.
@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_lightning_resumes_from_its_checkpoint(
    name: str, cases: dict[str, Any], frozen: Make, tmp_path: Path
) -> None:
    case = cases[name]
    through, stopped, resumed = (Module(adapted(frozen(case), case)) for _ in range(3))
    fingerprint = al.fingerprint(through)
    lightning(through, case, 3)
    lightning(stopped, case, 2).save_checkpoint(tmp_path / "two.ckpt")
    lightning(resumed, case, 3, tmp_path / "two.ckpt")
    assert equal(resumed.model, through.model)
    assert not equal(resumed.model, stopped.model)
    assert al.fingerprint(through) == al.fingerprint(resumed) == fingerprint
    al.verify(resumed)
