"""Activations of a block against the formulas of arXiv:2205.05198."""

from dataclasses import replace

import pytest

from lightning_align.planner import ModelSpec, ParallelSpec
from lightning_align.planner.saved_bytes import (
    block_saved_bytes,
    first_saved_bytes,
    last_saved_bytes,
)

S, B, H, A, V, T = 2048, 4, 6144, 64, 51200, 8
MEGATRON = ModelSpec(48, H, A, vocab_size=V, seq_len=S, attention="unfused", dropout=True)
PLAIN = ParallelSpec(micro_batch_size=B, precision="16-master", chunked_loss=False)
SPLIT = replace(PLAIN, devices=T, tensor_parallel=T)
SBH, SCORES = S * B * H, 5 * A * S / H


@pytest.mark.parametrize(
    ("parallel", "formula"),
    [
        (PLAIN, 34 + SCORES),  # Eq. 1
        (SPLIT, 10 + (24 + SCORES) / T),  # Eq. 2
        (replace(SPLIT, sequence_parallel=True), (34 + SCORES) / T),  # Eq. 4
        (replace(SPLIT, sequence_parallel=True, activation_checkpointing="selective"), 34 / T),
        (replace(SPLIT, activation_checkpointing="selective"), 10 + 24 / T),
        (replace(SPLIT, activation_checkpointing="full"), 2),
    ],
)
def test_a_block_keeps_what_the_paper_says(parallel: ParallelSpec, formula: float) -> None:
    assert block_saved_bytes(MEGATRON, parallel) == pytest.approx(SBH * formula, rel=1e-12)


def test_what_is_beside_the_blocks() -> None:
    """Section 4.3: a mask of dropout; final norm, head and fp32 logits, 4 s b h (1 + v / h)."""
    tokens = replace(SPLIT, sequence_parallel=True)
    assert first_saved_bytes(MEGATRON, tokens) == pytest.approx(SBH / T + 8 * S * B)
    expected = 4 * SBH / T * (1 + V / H)
    assert last_saved_bytes(MEGATRON, tokens) == pytest.approx(expected, rel=1e-12)


def test_fused_attention_keeps_no_scores() -> None:
    fused = replace(MEGATRON, attention="fused")
    assert block_saved_bytes(fused, PLAIN) == pytest.approx(SBH * 34 + 4 * S * B * A)


def test_a_loss_in_chunks_keeps_no_logits() -> None:
    chunked = replace(PLAIN, chunked_loss=True)
    assert last_saved_bytes(MEGATRON, chunked) == 4 * SBH
