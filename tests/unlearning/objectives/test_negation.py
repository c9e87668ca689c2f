"""An adapter turned round: exactly the opposite, for good, and once."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import aihwkit_lora as al
from aihwkit_lora import ConfigurationError, StageError
from aihwkit_lora.unlearning import objectives
from aihwkit_lora.unlearning.reference import reference

NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4)), torch.randn(5, 6)),
    "image": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2)), torch.randn(5, 2, 3, 3)),
    "words": (lambda: nn.Sequential(nn.Embedding(7, 3)), torch.arange(7)[None]),
}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_what_was_added_is_subtracted(kind, options):
    make, x = NETS[kind]
    options = {"target_modules": ["0"], "init_lora_weights": False, **options}
    model = get_peft_model(make(), LoraConfig(**options))
    with torch.no_grad():
        with reference(model):
            base = model(x)
        added = model(x) - base
        objectives.apply_negation_(model, "default", strength=0.5)
        # 32-bit floats of order 1.
        torch.testing.assert_close(model(x), base - 0.5 * added, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_survives_the_unit_and_the_disk(adapted, frozen, batch, tmp_path):
    model, x = adapted(init_lora_weights=False).eval(), batch["forget"][0]
    objectives.apply_negation_(model, "default")
    with torch.no_grad():
        wanted = model(x)
        model.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(frozen(), tmp_path)(x), wanted)
        al.digitize_(model, al.DigitalUnit(bits=16, sram_kib=4))
        torch.testing.assert_close(model(x), wanted, rtol=1e-2, atol=1e-2)  # 16-bit codes


def test_twice_is_refused(adapted):
    model = adapted(init_lora_weights=False)
    objectives.apply_negation_(model, "default")
    with pytest.raises(StageError, match="adapter 'default' in training, got none, or a frozen"):
        objectives.apply_negation_(model, "default")
    with pytest.raises(StageError, match="adapter 'other' in training"):
        objectives.apply_negation_(model, "other")


def test_a_strength_of_nothing_is_refused(adapted):
    with pytest.raises(ConfigurationError, match=r"expected strength above 0, got 0\.0"):
        objectives.apply_negation_(adapted(), "default", strength=0.0)


def test_dora_has_no_negative(adapted):
    model = adapted(use_dora=True)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigurationError, match="layer '0': expected a plain LoRA"):
        objectives.apply_negation_(model, "default")
    assert all(map(torch.equal, before, model.parameters()))
