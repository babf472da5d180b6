"""The attention kernel of a model, and another one for a while."""

import pytest
import torch
from torch import nn

from lightning_align._compat.transformers_attention import attention_of, eager_attention
from tests.helpers.tiny_models import TINY_MODELS


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_kernel_is_the_eager_one_inside_and_then_what_it_was(family):
    model = TINY_MODELS[family]()
    model.set_attn_implementation("sdpa")
    ids = torch.arange(12).reshape(2, 6)
    names = []

    with torch.no_grad():
        before = model(ids).logits
        with eager_attention([model, nn.Linear(2, 2)]):
            names.append(attention_of(model))
            inside = model(ids).logits
        assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-4)
    assert (names, attention_of(model)) == (["eager"], "sdpa")
    with pytest.raises(KeyError), eager_attention([model]):
        raise KeyError
    assert attention_of(model) == "sdpa"


def test_a_module_without_a_choice_has_none():
    assert attention_of(nn.Linear(2, 2)) is None
