"""A cast to 16 bits leaves rotary frequencies alone; tests/modules/test_bf16.py trains so."""

import torch
from torch import nn

from lightning_align.models.rotary import rotary_in_fp32


class Rotary(nn.Module):
    """One buffer of frequencies, and another of no such name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** -torch.arange(0, 1, 1 / 8))
        self.register_buffer("mask", torch.ones(2))


def test_frequencies_stay_as_exact_as_they_were() -> None:
    model = nn.Sequential(Rotary(), nn.Linear(2, 2))
    frequencies = model[0].inv_freq.clone()
    with rotary_in_fp32(model):
        model.bfloat16()
    assert torch.equal(model[0].inv_freq, frequencies)
    assert model[0].mask.dtype == model[1].weight.dtype == torch.bfloat16


def test_frequencies_follow_to_more_bits() -> None:
    model = Rotary()
    with rotary_in_fp32(model):
        model.double()
    assert model.inv_freq.dtype == torch.float64
