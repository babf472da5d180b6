"""The output projection, and what a config says that it does besides."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from lightning_align.layers import Head, find_layers
from lightning_align.layers.head import head_arithmetic, logit_entries
from tests.helpers.tiny_models import TINY_MODELS


def test_gemma_granite_cohere_and_phi_do_more_than_a_product() -> None:
    heads = {name: find_layers(build()).head for name, build in TINY_MODELS.items()}
    assert {name for name, head in heads.items() if head.softcap == 0.5} == {"gemma2", "gemma3"}
    scales = {name: head.logit_scale for name, head in heads.items() if head.logit_scale != 1.0}
    assert scales == {"granite": 1 / 8, "cohere": 0.25, "cohere2": 0.25}
    assert {name for name, head in heads.items() if head.bias is not None} == {"phi"}


def test_head_computes_its_formula() -> None:
    """Weights and inputs are chosen so that the products are 1 and 3, hence logits 2 and 4.

    With bias 1 both are doubled by the scale; the softcap 4 then gives 4 tanh(1), 4 tanh(2).
    """
    head = Head(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
    hidden = torch.ones(1)
    assert head.logits(hidden).tolist() == [2.0, 4.0]
    assert replace(head, logit_scale=2.0).logits(hidden).tolist() == [4.0, 8.0]
    capped = replace(head, logit_scale=2.0, softcap=4.0).logits(hidden)
    torch.testing.assert_close(capped, 4 * torch.tensor([1.0, 2.0]).tanh())
    assert replace(head, logit_scale=2.0).logits(hidden.bfloat16().float()).dtype == torch.float32


def test_numbers_of_a_config_multiply_divide_and_cap() -> None:
    """As Granite (a divisor), Falcon-H1 (a multiplier) and Gemma 2 (a cap) name them; 0 is off."""
    config = SimpleNamespace(
        lm_head_multiplier=3.0, logits_scaling=4, logit_scale=0, final_logit_softcapping=30
    )
    assert head_arithmetic(config) == (0.75, 30.0)
    assert head_arithmetic(SimpleNamespace(get_text_config=lambda: config)) == (0.75, 30.0)
    assert head_arithmetic(SimpleNamespace(logit_scale=None)) == (1.0, None)
    assert head_arithmetic(None) == (1.0, None)


def test_entries_that_may_explain_the_logits() -> None:
    config = SimpleNamespace(hidden_size=8, logit_scale=2.0, scaling="none", soft_caps=0.5)
    assert logit_entries(config) == "logit_scale=2, soft_caps=0.5"
    assert logit_entries(None) == ""
