import copy
import pickle
from functools import partial

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_align.losses import lay_out_pairs
from lightning_align.losses.pair_mask import PairMask
from lightning_align.planner.meta_attention import attention_of_processor
from tests.losses.test_pair_attention import make_batch


def layout_of(packing, pairs=4, empty=()):
    batch = make_batch(pairs=pairs)
    for row in empty:
        batch["attention_mask"][row] = 0
    return lay_out_pairs(batch["input_ids"], batch["attention_mask"], packing=packing)


def inputs(layout, heads=(2, 2, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rows, width = layout.pair_RL.shape
    return [
        torch.randn(rows, of, width, 8, generator=generator, dtype=dtype, requires_grad=True)
        for of in heads
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("empty", [(), (1, 5), (6,)], ids=["whole", "no-pair", "no-rejected"])
def test_attention_is_that_of_the_mask_written_out(packing, empty):
    layout = layout_of(packing, empty=empty)
    is_token = (layout.pair_RL >= 0)[:, None, :, None]
    mask = PairMask.of(layout)
    results = []
    for attn_mask in (mask, layout.visible()):
        tensors = inputs(layout)
        options = {"scale": 0.5, "is_causal": False, "dropout_p": 0.0}
        out = F.scaled_dot_product_attention(*tensors, attn_mask=attn_mask, **options)
        seen = out * is_token  # of empty places nobody asks
        results.append([seen, *torch.autograd.grad(seen.square().sum(), tensors)])
        assert type(out) is torch.Tensor
    assert mask._written is None  # it was not
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_it_is_known_where_attention_is_another_function_for_a_while():
    """As while a step is analysed, which must not round otherwise."""
    mask = PairMask.of(layout := layout_of(packing=False))
    with attention_of_processor():
        F.scaled_dot_product_attention(*inputs(layout), attn_mask=mask)
    assert mask._written is None


def test_one_head_of_keys_serves_several_of_queries():
    layout = layout_of(packing=False)
    tensors = inputs(layout, heads=(4, 2, 2))
    ours, theirs = (
        F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
        for mask in (PairMask.of(layout), layout.visible())
    )
    is_token = (layout.pair_RL >= 0)[:, None, :, None]
    torch.testing.assert_close(ours * is_token, theirs * is_token)


@pytest.mark.parametrize(
    "use",
    [
        lambda mask, q, k, v: F.scaled_dot_product_attention(q, k, v, mask),
        lambda mask, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, :, :]),
        lambda mask, q, k, v: (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v,
        lambda mask, q, k, v: torch.cat([mask, mask], dim=1),
        lambda mask, q, k, v: torch.where(mask, 0.0, -1.0),
    ],
)
def test_whoever_looks_at_it_sees_the_mask(use):
    layout = layout_of(packing=True)
    tensors = inputs(layout)
    ours, theirs = (use(mask, *tensors) for mask in (PairMask.of(layout), layout.visible()))
    assert torch.equal(ours, theirs)
    assert type(ours) is torch.Tensor


def test_its_facts_are_known_without_it():
    mask, written = PairMask.of(layout_of(True)), layout_of(True).visible()
    assert isinstance(mask, torch.Tensor)
    assert (mask.shape, mask.dtype, mask.ndim) == (written.shape, torch.bool, 4)
    assert mask.device == written.device
    assert mask._written is None


def test_another_kernel_that_was_asked_for_is_taken():
    mask = PairMask.of(layout := layout_of(packing=True))
    tensors = inputs(layout)
    with sdpa_kernel(SDPBackend.MATH):
        ours, theirs = (
            F.scaled_dot_product_attention(*tensors, attn_mask=each)
            for each in (mask, layout.visible())
        )
        assert torch.equal(ours, theirs)
        torch.autograd.grad(ours.square().sum(), tensors, create_graph=True)  # which ours has not


def test_what_a_mixed_precision_casts_is_left_to_it():
    mask = PairMask.of(layout := layout_of(packing=True))
    is_token = (layout.pair_RL >= 0)[:, None, :, None]
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = inputs(layout, dtype=dtype)
            ours, theirs = (
                F.scaled_dot_product_attention(*tensors, attn_mask=each) * is_token
                for each in (mask, layout.visible())
            )
            assert ours.dtype is theirs.dtype is torch.bfloat16
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_hands_it_on(use_reentrant):
    layout = layout_of(packing=True)
    is_token = (layout.pair_RL >= 0)[:, None, :, None]

    def attend(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask) * is_token

    found = []
    for call in (attend, partial(checkpoint, attend, use_reentrant=use_reentrant)):
        tensors = inputs(layout)
        out = call(*tensors, PairMask.of(layout))
        out.square().sum().backward()
        found.append([out, *(each.grad for each in tensors)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_copies_of_it_are_plain_masks():
    mask, written = PairMask.of(layout_of(True)), layout_of(True).visible()
    for each in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to(torch.bool)):
        assert type(each) is torch.Tensor
        assert torch.equal(each, written)
