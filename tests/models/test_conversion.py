"""What of transformers models becomes analogue, and what happens to tied weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import aihwkit_lora as al
from aihwkit_lora.tiles.grid import analog_layers

# peft 0.21.2 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

CHIP = al.chips.get("rm-180nm")
BERT = transformers.BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
)
VIT = transformers.ViTConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=16,
    patch_size=8,
)
GPT2 = transformers.GPT2Config(
    vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True
)
T5 = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)


def analogue(model: nn.Module) -> set[str]:
    return {name for name, _ in analog_layers(model)}


def digital(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
    return {name for name, module in model.named_modules() if type(module) in kinds}


class Wrapped(nn.Module):
    """A plain model around one of transformers, as a LightningModule is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.BertForSequenceClassification(BERT)
        self.output = nn.Linear(2, 1)


def encoder_decoder() -> nn.Module:
    return transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(VIT), decoder=transformers.GPT2LMHeadModel(GPT2)
    )


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        # A backbone has no head.
        (lambda: transformers.BertModel(BERT), set()),
        (
            lambda: transformers.BertForMaskedLM(BERT),
            {"cls.predictions.transform.dense", "cls.predictions.decoder"},
        ),
        # No backbone over all: two stacks side by side, the head beside them.
        (lambda: transformers.T5Model(T5), set()),
        (lambda: transformers.T5ForConditionalGeneration(T5), {"lm_head"}),
        (encoder_decoder, {"decoder.lm_head"}),
        # What a plain model adds is no head.
        (Wrapped, {"model.classifier"}),
    ],
    ids=["backbone", "masked", "stacks", "stacks and head", "model in model", "wrapped"],
)
def test_everything_but_the_head_becomes_analogue(
    build: Callable[[], nn.Module], heads: set[str]
) -> None:
    net = build()
    layers = digital(net)
    model = al.convert(net, CHIP)
    assert digital(model) == heads
    assert analogue(model) == layers - heads
    assert analogue(al.convert(net, CHIP, heads="analogue")) == layers
    assert digital(net) == layers


def test_excluded_modules_add_to_digital_heads() -> None:
    net = transformers.BertForSequenceClassification(BERT)
    model = al.convert(net, CHIP, exclude_modules=["bert.encoder"])
    assert analogue(model) == {"bert.pooler.dense"}
    model = al.convert(net, CHIP, exclude_modules=["classifier"], heads="analogue")
    assert digital(model) == {"classifier"}
    with pytest.raises(al.ConfigurationError, match=r"'query'\. Known: bert\.encoder\.layer\.0\.a"):
        al.convert(net, CHIP, exclude_modules=["query"])
    with pytest.raises(al.StageError, match=r"BertFor.* Check exclude_modules, and heads"):
        al.convert(net, CHIP, exclude_modules=["bert"])


def test_conv1d_becomes_a_linear_layer_with_the_transposed_weight() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(nf=5, nx=3)).eval()
    nn.init.normal_(net[0].bias)
    model = al.convert(net, CHIP)
    weight, bias = model[0].get_weights()
    assert weight.shape == (5, 3)
    torch.testing.assert_close(weight, net[0].weight.detach().T, rtol=0, atol=1e-6)
    assert torch.equal(bias, net[0].bias.detach())
    assert type(net[0]) is Conv1D
    assert not model[0].training
    x = torch.randn(4, 3)
    expected = net(x).detach()
    # What converters of finite resolution leave of it
    assert float((model(x).detach() - expected).norm() / expected.norm()) < 0.05


def test_a_digital_head_stays_tied_to_the_embedding() -> None:
    net = transformers.GPT2LMHeadModel(GPT2)
    model = al.convert(net, CHIP)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight is not net.lm_head.weight
    assert model.config.tie_word_embeddings
    al.freeze_(model, programmed_by="test")
    for other in (model, copy.deepcopy(model)):
        assert other.lm_head.weight is other.transformer.wte.weight


def test_an_analogue_head_is_cut_off_the_embedding() -> None:
    net = transformers.GPT2LMHeadModel(GPT2)
    model = al.convert(net, CHIP, heads="analogue")
    assert not model.config.tie_word_embeddings
    assert net.config.tie_word_embeddings
    assert net.lm_head.weight is net.transformer.wte.weight
    weight = model.lm_head.get_weights()[0]
    torch.testing.assert_close(weight, net.lm_head.weight.detach(), rtol=0, atol=1e-6)
    al.freeze_(model, programmed_by="test")
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, weight)
    # PEFT warns of adapters on layers that transformers calls tied.
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    assert adapted.base_model.model.lm_head.lora_A["default"].weight.shape == (2, 32)


def test_adapters_of_any_kind_come_after_conversion() -> None:
    net: Any = transformers.GPT2LMHeadModel(GPT2)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = get_peft_model(copy.deepcopy(net), prompts)
    with pytest.raises(al.StageError, match=r"the whole model: .* got PeftModelForCausalLM of"):
        al.convert(wrapped, CHIP)
    net.add_adapter(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(al.StageError, match=r"'transformer\.h\.0\.attn\.c_attn': .*got Linear of"):
        al.convert(net, CHIP)
