"""The language model: it looks back only, and what it writes is what it finds likeliest."""

import pytest
import torch
from torch import nn

from aihwkit_lora.errors import ConfigurationError, DataError
from aihwkit_lora.recipes.lm_model import CausalTransformer, LmShape, answer_greedily
from aihwkit_lora.recipes.lm_tokens import END

SHAPE = LmShape(vocabulary=20, length=12, width=16, depth=2, heads=4)


def model():
    torch.manual_seed(0)
    return CausalTransformer(SHAPE)


def test_a_position_depends_on_those_before_it_only():
    tokens = torch.randint(20, (3, 12))
    changed = tokens.clone()
    changed[:, 7:] = (tokens[:, 7:] + 1) % 20
    net = model()
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=-1).min() > 1e-3


def test_every_linear_layer_can_be_an_array_and_all_but_the_head_take_lora():
    linear = [name for name, layer in model().named_modules() if isinstance(layer, nn.Linear)]
    assert len(linear) == 2 * 6 + 1
    assert "head" in linear


def test_sizes_are_checked():
    for name in ("vocabulary", "length", "width", "depth"):
        with pytest.raises(ConfigurationError, match=f"expected {name} of at least 1, found 0"):
            LmShape(**{"vocabulary": 9, "length": 9, name: 0})
    with pytest.raises(ConfigurationError, match="heads=4 and width=6"):
        LmShape(vocabulary=9, length=9, width=6)
    with pytest.raises(DataError, match="at most 12 tokens, found 13"):
        model()(torch.zeros(1, 13, dtype=torch.long))


class Counts(nn.Module):
    """After a token n comes n + 1; after 9 the end."""

    def forward(self, tokens):
        after = torch.where(tokens == 9, END, tokens + 1)
        return nn.functional.one_hot(after, 20).float()


def test_answers_end_where_the_model_says_or_where_there_is_no_more_room():
    found = answer_greedily(Counts(), [[7], [1, 5], [9], [11, 12]], longest=5)
    assert found == [[8, 9], [6, 7, 8], [], [13, 14, 15]]


def test_answers_do_not_depend_on_who_is_asked_beside():
    net = model()
    prompts = [[1, 5, 2], [1, 6, 7, 8, 2], [1, 2]]
    alone = [answer_greedily(net, [each], longest=12)[0] for each in prompts]
    assert answer_greedily(net, prompts, longest=12) == alone


def test_a_prompt_without_room_gets_no_answer():
    assert answer_greedily(Counts(), [[5, 6, 7], [8]], longest=3) == [[], [9]]
