"""ZClip and AGC: their formulas on numbers with a known answer, and which parameters are units."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_align.layers import find_layers
from lightning_align.optimizers.clipping import ZClip, clip_units_, units, zclip
from tests.helpers.tiny_models import TINY_MODELS

# ZClip


def test_an_outlier_is_clipped_the_shorter_the_further_out_it_is() -> None:
    """mean 1, std 0.1, z_thres 2: z = 4 gives 1 + 2^2/4 * 0.1 = 1.1, z = 8 gives 1.05."""
    assert zclip(1.15, 1.0, 0.1, 2.0) == 1.15
    # 1e-6 beside a std of 0.1, as in the authors' code.
    assert zclip(1.4, 1.0, 0.1, 2.0) == pytest.approx(1.1, rel=1e-5)
    assert zclip(1.8, 1.0, 0.1, 2.0) == pytest.approx(1.05, rel=1e-5)


def theirs(norms: list[float], alpha: float, z_thres: float, warmup: int) -> list[float]:
    """The paper's Algorithm 1 by its steps: warm-up, z-score, clip, then the moving averages."""
    head = norms[:warmup]
    mean = sum(head) / warmup
    variance = sum((norm - mean) ** 2 for norm in head) / warmup
    clipped = list(head)
    for norm in norms[warmup:]:
        z = (norm - mean) / (variance**0.5 + 1e-6)
        value = mean + z_thres**2 / z * variance**0.5 if z > z_thres else norm
        clipped.append(value)
        mean = alpha * mean + (1 - alpha) * value
        variance = alpha * variance + (1 - alpha) * (value - mean) ** 2
    return clipped


def test_zclip_matches_the_papers_algorithm() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = (1 + 0.1 * torch.randn(80, generator=generator)).tolist()
    for number in (30, 31, 60):
        norms[number] *= 10
    limits = ZClip(warmup_steps=10)
    ours = [limits.update(norm) for norm in norms]
    # The same double arithmetic in another order.
    assert ours == pytest.approx(theirs(norms, 0.97, 2.5, 10), rel=1e-9)
    assert sum(a != b for a, b in zip(ours, norms, strict=True)) >= 3


def test_the_state_of_zclip_round_trips_and_nan_is_no_part_of_it() -> None:
    limits, other = ZClip(warmup_steps=2), ZClip(warmup_steps=2)
    for norm in (1.0, 1.1, math.nan, 1.2, math.inf):
        limits.update(norm)
    other.load_state_dict(limits.state_dict())
    assert other.state_dict() == limits.state_dict()
    assert other.update(9.0) == limits.update(9.0) < 2


@pytest.mark.parametrize(
    "wrong", [{"alpha": 1.0}, {"alpha": -0.1}, {"z_thres": 0.0}, {"warmup_steps": 0}]
)
def test_what_zclip_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ZClip(**wrong)


# AGC


def test_a_units_gradient_is_at_most_a_fraction_of_its_weight() -> None:
    """Rows of norm 5 and 0.0005 (below eps); gradients of norm 10, 0.1. With lambda 0.1 they are
    clipped to 0.5 and to 0.1 * 1e-3."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [3e-4, 4e-4], [6.0, 8.0]]))
    weight.grad = torch.tensor([[6.0, 8.0], [0.06, 0.08], [0.6, 0.8]])
    clip_units_([(weight, (1,))], 0.1)
    expected = torch.tensor([[0.3, 0.4], [6e-5, 8e-5], [0.6, 0.8]])
    torch.testing.assert_close(weight.grad, expected)
    assert torch.equal(weight.grad[2], expected[2])  # at its limit of 1, and not above


def test_below_the_limit_nothing_changes_to_the_bit() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 7))
    weight.grad = 1e-3 * torch.randn(5, 7)
    before = weight.grad.clone()
    clip_units_([(weight, (1,)), (nn.Parameter(torch.ones(2)), (0,))], 0.1)
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_units_make_one_output_and_head_and_embedding_have_none(name: str) -> None:
    model = TINY_MODELS[name]()
    layers = find_layers(model)
    dims = units(model)
    ends = {layers.embedding.weight, layers.head.weight}
    assert ends.isdisjoint(dims)
    assert set(dims) | ends <= set(model.parameters())
    block = layers.blocks[0]
    if name == "llama":
        assert dims[block.mlp.up_proj.weight] == (1,)
        assert dims[block.input_layernorm.weight] == (0,)
    else:
        assert dims[block.mlp.c_fc.weight] == (0,)  # stored (in, out)
        assert dims[block.mlp.c_fc.bias] == (0,)


def test_filters_and_scalars_are_units_too() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(2, 3, 5), nn.Parameter(torch.tensor(2.0))

    module = Mixed()
    dims = units(module)
    assert dims[module.conv.weight] == (1, 2, 3)
    module.scale.grad = torch.tensor(-3.0)
    clip_units_(dims.items(), 0.5)
    assert module.scale.grad == -1.0


@pytest.mark.parametrize("wrong", [{"clipping": 0.0}, {"clipping": math.nan}, {"eps": 0.0}])
def test_what_agc_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        clip_units_([], **{"clipping": 0.1, **wrong})
