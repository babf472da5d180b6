"""Attention on meta takes the way of the processor, whichever that is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_align.planner.analyze import analyze_step

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.ones(8, 8, dtype=torch.bool).tril()},
    "bias": {"attn_mask": torch.zeros(8, 8)},
    "mask of each row": {"attn_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)},
    "scale": {"scale": 0.3},
    "grouped": {"enable_gqa": True, "is_causal": True},
    "dropout": {"dropout_p": 0.1},
}


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (4, 4)).transpose(1, 2)
        keys = heads[:, :2] if "enable_gqa" in self.options else heads
        return F.scaled_dot_product_attention(heads, keys, keys, **self.options)


def report(device: str, **options: Any) -> dict[str, Any]:
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with torch.device(device):
        model, x = Attention(**options), torch.ones(2, 8, 16)
    return analyze_step(model, lambda: model(x).sum()).to_dict()


@pytest.mark.parametrize("way", WAYS)
def test_on_meta_it_is_as_on_the_processor(way: str) -> None:
    real, meta = report("cpu", **WAYS[way]), report("meta", **WAYS[way])
    assert (FLASH in real["ops"]) == (way != "dropout")
    assert meta["ops"].keys() == real["ops"].keys() or way == "dropout"
    for key in ("total_flops", "saved_bytes", "peak_bytes", "bytes", "least_bytes"):
        assert meta[key] == real[key] or way == "dropout"
    assert meta["total_flops"] == real["total_flops"]


def test_what_the_user_forbids_is_forbidden_on_meta_too() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        real, meta = report("cpu"), report("meta")
    assert FLASH not in real["ops"]
    assert FLASH not in meta["ops"]
    assert meta["total_flops"] == real["total_flops"]
