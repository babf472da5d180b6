"""A head over a few rows at a time equals the head over all rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.layers import Head
from lightning_align.losses._head_chunks import (
    ChunkedHead,
    check_vocabulary,
    chunks,
    head_arithmetic,
    rows_per_chunk,
    softcap_slope,
    softmax_,
)

HEAD = Head(torch.randn(7, 4), torch.randn(7), logit_scale=0.5, softcap=2.0)


@given(st.integers(0, 50), st.integers(1, 60))
def test_chunks_cover_every_row_once(num_rows, chunk_rows):
    parts = list(chunks(num_rows, chunk_rows))
    assert [row for part in parts for row in range(num_rows)[part]] == list(range(num_rows))
    assert all(part.stop - part.start <= chunk_rows for part in parts)


def test_chunks_are_as_asked_for_or_fit_the_buffer():
    assert rows_per_chunk("here", 10, HEAD, 4, torch.float32) == 4
    assert rows_per_chunk("here", 3, HEAD, 4, torch.float32) == 3
    wide = Head(torch.empty(2**20, 1))  # 4 MiB a row of fp32: six rows fit
    assert rows_per_chunk("here", 13, wide, None, torch.float32) == 5, "three even parts"
    with pytest.raises(ValueError, match=r"here\(chunk_size=0\): must be at least 1 row"):
        rows_per_chunk("here", 10, HEAD, 0, torch.float32)


def test_on_meta_there_are_no_ids_to_check():
    check_vocabulary("here", torch.full((2,), 99, device="meta"), HEAD, "ids", "")


def test_logits_of_rows_are_those_of_the_head():
    hidden = torch.randn(5, 4)
    chunked = ChunkedHead(hidden, HEAD.weight, HEAD.bias, head_arithmetic(hidden, HEAD), 3)
    for rows in (slice(0, 3), torch.tensor([4, 1])):
        torch.testing.assert_close(chunked.logits(rows), HEAD.logits(hidden[rows]))


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_logits_are_never_16_bits(dtype, result):
    arithmetic = head_arithmetic(torch.zeros(1, 4, dtype=dtype), Head(HEAD.weight.to(dtype)))
    assert arithmetic.dtype == arithmetic.operand_dtype == result, "a CPU multiplies in fp32"


def test_softmax_gives_the_log_sum_exp_in_two_parts():
    logits = torch.randn(3, 6) * 30
    expected, total = logits.softmax(-1), logits.logsumexp(-1, keepdim=True)
    largest, log_sum = softmax_(logits, logits)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(largest + log_sum, total)


def test_slope_of_the_softcap():
    x = torch.linspace(-5, 5, 9, requires_grad=True)
    capped = 2 * torch.tanh(x / 2)
    (slope,) = torch.autograd.grad(capped.sum(), x)
    torch.testing.assert_close(softcap_slope(capped.detach(), 2.0), slope)


@pytest.mark.parametrize("offender", [-1, 7])
def test_an_id_outside_the_vocabulary_is_named(offender):
    with pytest.raises(ValueError, match=rf"here\(labels={offender}\): must be in \[0, 7\)"):
        check_vocabulary("here", torch.tensor([0, offender]), HEAD, "labels", "Way out")
