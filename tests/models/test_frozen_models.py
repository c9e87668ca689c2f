"""BERT, GPT-2, Llama, ViT and Whisper with frozen layers, and stock PEFT on top."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import aihwkit_lora as al

pytestmark = [
    # peft 0.21.2 asks transformers 5.23 by a name that is on its way out.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is dep:FutureWarning"),
]

Make = Callable[..., Any]


def lora(targets: str | list[str], **options: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, target_modules=targets, **options)


def logits(model: nn.Module, case: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**case.batch()).logits


def loss(model: nn.Module, case: Any) -> float:
    with torch.no_grad():
        return float(model.eval()(**case.batch()).loss)


def train(model: nn.Module, case: Any, steps: int = 20) -> None:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**case.batch()).loss.backward()
        optimizer.step()


def test_the_backbone_is_frozen_and_the_head_stays_digital(case: Any, frozen: Make) -> None:
    model = frozen(case)
    layers = dict(al.frozen_layers(model))
    assert len(layers) == case.backbone
    assert set(case.heads).isdisjoint(layers)
    assert all(type(model.get_submodule(head)) is nn.Linear for head in case.heads)


def test_a_model_built_again_is_equal(case: Any, frozen: Make, frozen_anew: Make) -> None:
    model, again = frozen(case), frozen_anew(case)
    assert al.fingerprint(again) == al.fingerprint(model)
    assert torch.equal(logits(again, case), logits(model, case))


def test_heads_are_frozen_when_asked_for(case: Any, frozen_anew: Make) -> None:
    model = frozen_anew(case, heads="analogue")
    layers = dict(al.frozen_layers(model))
    assert len(layers) == case.backbone + len(case.heads)
    assert set(case.heads) <= set(layers)
    assert not any(type(module) is nn.Linear for module in model.modules())


@pytest.mark.parametrize("targets", ["all-linear", "names"])
def test_lora_learns_on_a_frozen_base_and_loads_into_an_equal_one(
    case: Any, frozen: Make, targets: str, tmp_path: Path
) -> None:
    model = frozen(case)
    fingerprint = al.fingerprint(model)
    names = case.targets(model)
    adapted = get_peft_model(model, lora(names if targets == "names" else targets))
    adapters = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    linear = sum(isinstance(layer, nn.Linear) for _, layer in al.frozen_layers(adapted))
    # PEFT takes a classifier for an inner layer, but leaves out convolutions and output embeddings.
    extra = 0 if case.heads == ("lm_head",) else len(case.heads)
    assert len(adapters) == (len(names) if targets == "names" else linear + extra)

    before = loss(adapted, case)
    train(adapted, case)
    assert loss(adapted, case) < 0.8 * before
    assert al.fingerprint(adapted) == fingerprint
    al.verify(adapted)

    adapted.save_pretrained(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(frozen(case), tmp_path)
    assert torch.equal(logits(loaded, case), logits(adapted, case))
    assert not torch.equal(logits(loaded, case), logits(frozen(case), case))


def test_a_digital_head_is_trained_in_full_beside_the_adapters(
    cases: dict[str, Any], frozen: Make, tmp_path: Path
) -> None:
    case = cases["bert"]
    model = frozen(case)
    head = model.classifier.weight.detach().clone()
    # For this task PEFT saves the classifier along with the adapters.
    adapted = get_peft_model(model, lora("all-linear", task_type="SEQ_CLS"))
    train(adapted, case, steps=3)
    al.verify(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(frozen(case), tmp_path)
    assert not torch.equal(loaded.classifier.modules_to_save["default"].weight, head)
    assert torch.equal(logits(loaded, case), logits(adapted, case))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def stored(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, stored])
def test_copies_are_frozen_and_compute_the_same(
    case: Any, frozen: Make, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = frozen(case)
    other = copied(model)
    assert type(other) is type(model)
    assert al.fingerprint(other) == al.fingerprint(model)
    assert torch.equal(logits(other, case), logits(model, case))


def test_state_dict_loads_safely_into_a_model_frozen_for_it(
    case: Any, frozen: Make, unprogrammed: Make, tmp_path: Path
) -> None:
    model, other = frozen(case), unprogrammed(case)
    assert not torch.equal(logits(other, case), logits(model, case))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(logits(other, case), logits(model, case))
    assert al.fingerprint(other) == al.fingerprint(model)
    al.verify(other)


def test_save_pretrained_writes_what_load_state_dict_takes(
    case: Any, frozen: Make, unprogrammed: Make, tmp_path: Path
) -> None:
    model, other = frozen(case), unprogrammed(case)
    # transformers would write ViT under the names of older releases.
    model.save_pretrained(tmp_path, save_original_format=False)
    missing = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    # Tied weights are written once.
    assert set(missing.missing_keys) == set(model.all_tied_weights_keys)
    assert not missing.unexpected_keys
    assert torch.equal(logits(other, case), logits(model, case))
    al.verify(other)


def test_gradient_checkpointing_gives_the_same_gradients(case: Any, frozen: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = frozen(case)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        adapted = get_peft_model(model, lora("all-linear", init_lora_weights=False)).train()
        torch.manual_seed(3)
        adapted(**case.batch()).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert all(bool(gradient.any()) for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        # Of the largest gradient: elements near zero are differences of large sums, whose
        # last bits depend on the processor.
        assert float((recomputed - plain).abs().max()) <= 1e-5 * float(plain.abs().max())


def test_autocast_to_bfloat16_stays_near_full_precision(case: Any, frozen: Make) -> None:
    adapted = get_peft_model(frozen(case), lora("all-linear"))
    exact = logits(adapted, case)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = logits(adapted, case)
    assert reduced.dtype == torch.bfloat16
    # Inputs rounded to 8 bits of mantissa land on neighbouring steps of the converters.
    assert float((reduced - exact).norm() / exact.norm()) < 0.15
