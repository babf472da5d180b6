"""Activations of a block against the formulas of arXiv:2205.05198."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_align import find_layers
from lightning_align.planner import ModelSpec, ParallelSpec, analyze_step
from lightning_align.planner.saved_bytes import (
    block_saved_bytes,
    first_saved_bytes,
    last_saved_bytes,
    loss_bytes,
)
from tests.helpers.step_models import gpt, llama

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


@pytest.mark.parametrize("build", [gpt, llama])
@pytest.mark.parametrize("trains", [True, False])
def test_mixed_precision_keeps_a_copy_of_each_matrix(build: Any, trains: bool) -> None:
    """Of two tokens these are all that counts; Lightning's autocast has no cache of its own."""
    model, ids = build(), torch.tensor([[1, 2]])
    spec = ModelSpec.from_module(model, seq_len=2)
    frozen = list(find_layers(model).blocks)[1]
    frozen.requires_grad_(trains)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found = model(ids)
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        return logits.float().sum()

    mixed = ParallelSpec(precision="bf16-mixed")
    held = list(analyze_step(model, loss).blocks.values())[1].saved_bytes
    assert held == pytest.approx(block_saved_bytes(spec, mixed), rel=0.05)
    assert block_saved_bytes(spec, replace(mixed, precision="bf16-true")) < held / 2
    recomputed = replace(mixed, activation_checkpointing="full")
    assert block_saved_bytes(spec, recomputed) == 2 * 2 * spec.hidden_size


def test_a_loss_in_chunks_keeps_no_logits() -> None:
    chunked = replace(PLAIN, chunked_loss=True)
    assert last_saved_bytes(MEGATRON, chunked) == 4 * SBH


@pytest.mark.parametrize(
    ("precision", "is_processor", "width"),
    [
        ("32-true", True, 0),
        ("bf16-mixed", True, 0),  # its products with the head are in fp32
        ("bf16-true", True, 4),
        ("bf16-mixed", False, 2),
        ("bf16-true", False, 0),
        ("16-master", False, 4),
    ],
)
def test_a_head_of_another_dtype_than_its_products_is_copied(
    precision: str, is_processor: bool, width: int
) -> None:
    parallel = replace(PLAIN, chunked_loss=True, precision=precision)
    wide = replace(parallel, precision="32-true")
    kept, chunk = loss_bytes(MEGATRON, parallel, is_processor)
    assert (kept, chunk - loss_bytes(MEGATRON, wide, True)[1]) == (
        loss_bytes(MEGATRON, wide)[0],
        width * MEGATRON.vocab_size * MEGATRON.hidden_size,
    )
