"""Small transformers models with random weights; nothing is downloaded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import aihwkit_lora as al

CHIP = al.chips.get("rm-180nm")
SIZES = {
    "initializer_range": 0.1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, and how many layers are frozen where.

    Args:
        build: Makes the model; its weights follow torch's seed.
        batch: Makes inputs and labels for one step.
        backbone: Layers that are frozen by default.
        heads: Layers that are frozen only with ``heads="analogue"``.
        bare: Frozen layers that cannot carry adapters.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    backbone: int
    heads: tuple[str, ...]
    bare: tuple[str, ...] = ()

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the frozen layers that can carry adapters."""
        return [name for name in al.target_modules(model) if name not in self.bare]


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, vocab_size=64, intermediate_size=48, max_position_embeddings=32, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **TEXT, initializer_range=0.1, n_positions=32, n_embd=32, n_layer=2, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, **TEXT, num_key_value_heads=1, intermediate_size=48, max_position_embeddings=32
    )
    return transformers.LlamaForCausalLM(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        **SIZES, intermediate_size=48, image_size=16, patch_size=8, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=32,
        init_std=0.1,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        max_source_positions=16,
        classifier_proj_size=16,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForAudioClassification(config)


def _text(classes: int | None) -> Callable[[], dict[str, Tensor]]:
    def batch() -> dict[str, Tensor]:
        ids = torch.randint(2, 64, (4, 8), generator=torch.Generator().manual_seed(7))
        labels = ids if classes is None else torch.arange(4) % classes
        return {"input_ids": ids, "labels": labels}

    return batch


def _signal(name: str, *shape: int) -> Callable[[], dict[str, Tensor]]:
    def batch() -> dict[str, Tensor]:
        values = torch.randn(4, *shape, generator=torch.Generator().manual_seed(7))
        return {name: values, "labels": torch.arange(4) % 3}

    return batch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Adapters start from the same values in every test, whatever ran before."""
    torch.manual_seed(0)


CASES = {
    # query, key, value and three dense layers in each of two blocks, and the pooler
    "bert": Case(_bert, _text(3), 13, ("classifier",)),
    # c_attn, c_fc and two c_proj, all Conv1D
    "gpt2": Case(_gpt2, _text(None), 8, ("lm_head",)),
    "llama": Case(_llama, _text(None), 14, ("lm_head",)),
    # the patch embedding is a convolution
    "vit": Case(
        _vit,
        _signal("pixel_values", 3, 16, 16),
        13,
        heads=("classifier",),
    ),
    # Two convolutions come before the blocks. The model asks them for their stride, which PEFT's
    # wrapper does not hand on.
    "whisper": Case(
        _whisper,
        _signal("input_features", 8, 32),
        14,
        heads=("projector", "classifier"),
        bare=("encoder.conv1", "encoder.conv2"),
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each model in turn."""
    return CASES[request.param]


@pytest.fixture
def cases() -> dict[str, Case]:
    """All models by name."""
    return CASES


def _frozen(build: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = al.convert(build(), CHIP, **options)
    al.program_(model, CHIP, seed=0)
    return al.freeze_(model).eval()


@functools.cache
def _kept(build: Callable[[], nn.Module]) -> nn.Module:
    return _frozen(build)


@pytest.fixture
def frozen() -> Callable[[Case], nn.Module]:
    """A function that gives a programmed and frozen model of its own for each call.

    Programming takes most of the time, so it copies one that is kept.
    """
    return lambda case: copy.deepcopy(_kept(case.build))


@pytest.fixture
def frozen_anew() -> Callable[..., nn.Module]:
    """A function that builds, programs and freezes a model, equally each time."""
    return lambda case, **options: _frozen(case.build, **options)


@pytest.fixture
def unprogrammed() -> Callable[[Case], nn.Module]:
    """A function that builds a frozen model with other weights, ready to take a checkpoint."""

    def make(case: Case) -> nn.Module:
        torch.manual_seed(1)
        model = al.convert(case.build(), CHIP)
        return al.freeze_(model, programmed_by="checkpoint").eval()

    return make
