"""FLOPs, bytes and messages of a block, by hand."""

from dataclasses import replace

import pytest

from lightning_align.planner import ModelSpec, ParallelSpec
from lightning_align.planner.block_work import (
    Pass,
    block_passes,
    first_passes,
    frozen,
    last_passes,
)

B, S, H, V = 2, 128, 64, 1000
GPT = ModelSpec(3, H, 4, vocab_size=V, seq_len=S, attention="unfused", bias=False)
ONE = ParallelSpec(micro_batch_size=B)


def flops(work: Pass) -> float:
    return sum(piece.flops for piece in work.pieces)


def test_a_block_of_gpt_has_the_flops_of_its_closed_form() -> None:
    """24 b s h^2 (1 + s / 6h) forward, twice that backward (arXiv:2104.04473, Eq. 2)."""
    forward, backward = block_passes(GPT, ONE)
    closed = 24 * B * S * H**2 * (1 + S / (6 * H))
    assert flops(forward) == pytest.approx(closed)
    assert flops(backward) == pytest.approx(2 * closed)


def test_recomputation_adds_a_forward() -> None:
    forward, plain = block_passes(GPT, ONE)
    full = block_passes(GPT, replace(ONE, activation_checkpointing="full"))[1]
    assert flops(full) == pytest.approx(flops(plain) + flops(forward))
    scores = block_passes(GPT, replace(ONE, activation_checkpointing="selective"))[1]
    assert flops(scores) == pytest.approx(flops(plain) + 4 * B * S**2 * H)


def test_fused_attention_leaves_out_what_the_mask_hides_and_has_five_products() -> None:
    forward, backward = block_passes(replace(GPT, attention="fused"), ONE)
    matrices = 24 * B * S * H**2
    assert flops(forward) == pytest.approx(matrices + 2 * B * S**2 * H)
    assert flops(backward) == pytest.approx(2 * matrices + 5 * B * S**2 * H)


def test_ranks_divide_products_and_send_messages() -> None:
    spec = ParallelSpec(devices=2, tensor_parallel=2, micro_batch_size=B)
    whole, part = block_passes(GPT, ONE), block_passes(GPT, spec)
    assert [2 * flops(work) for work in part] == pytest.approx([flops(work) for work in whole])
    assert [work.collectives for work in part] == [2, 2]
    assert part[0].message == B * S * H * 2
    again = block_passes(GPT, replace(spec, activation_checkpointing="full"))[1]
    assert again.collectives == 4
    tokens = replace(spec, sequence_parallel=True)
    norms = [sum(p.bytes for p in w.pieces if p.name == "norm") for w in block_passes(GPT, tokens)]
    all_of = [sum(p.bytes for p in w.pieces if p.name == "norm") for w in part]
    assert norms[0] == all_of[0] / 2


def test_frozen_blocks_need_no_gradients_of_weights() -> None:
    backward = block_passes(GPT, ONE)[1]
    assert flops(frozen(backward)) == pytest.approx(flops(backward) - 24 * B * S * H**2)


def test_pairs_are_twice_as_many_rows() -> None:
    pairs = block_passes(GPT, replace(ONE, objective="dpo"))
    assert flops(pairs[0]) == pytest.approx(2 * flops(block_passes(GPT, ONE)[0]))


def test_head_and_embedding() -> None:
    forward, backward = last_passes(GPT, ONE)
    assert flops(forward) == 2 * B * S * H * V
    assert flops(backward) == 4 * B * S * H * V
    assert flops(first_passes(GPT, ONE)[0]) == 0
