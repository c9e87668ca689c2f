"""Text from language models whose layers are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import aihwkit_lora as al

# peft 0.21.2 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("sample", [False, True])
def test_the_same_seed_gives_the_same_tokens(
    name: str, sample: bool, cases: dict[str, Any], frozen: Callable[..., Any]
) -> None:
    model = frozen(cases[name])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
    fingerprint = al.fingerprint(adapted)
    prompt = cases[name].batch()["input_ids"]

    def tokens(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        mask = torch.ones_like(prompt)
        return adapted.generate(
            input_ids=prompt, attention_mask=mask, max_new_tokens=6, do_sample=sample
        )

    first = tokens(0)
    assert first.shape[0] == len(prompt)
    assert first.shape[1] > prompt.shape[1]
    assert torch.equal(tokens(0), first)
    assert torch.equal(tokens(1), first) is not sample
    assert al.fingerprint(adapted) == fingerprint
