"""Log-probabilities of given tokens under a linear head without the B x T x V logits.

Here each row gets its own gradient from above, so unlike a summed cross-entropy the backward pass
needs the probabilities again. Three ways, from cheap to frugal:

- weight and bias frozen (adapters): the gradient of each hidden state is computed in the forward
  pass for a unit gradient from above, and backward only scales it;
- few rows: the probabilities are kept;
- many rows: the logits are computed a second time in backward, chunk by chunk.

Shapes: N rows, R rows of a chunk, D hidden size, V vocabulary (``logits_RV``).
"""
# ruff: noqa: N815 (fields carry the shape suffix, as every tensor here does)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_align.layers import Head
from lightning_align.losses import _head_chunks as head_chunks
from lightning_align.losses._head_chunks import ChunkedHead

_WHERE = "linear_logprobs"

# Probabilities up to this size are kept for backward: the completions of a few pairs. The fourth
# matrix product would cost about a third of the time of the head.
_KEPT_BYTES = 64 * 2**20

_DOT_ROWS = 64  # the products of so many rows stay in a cache


class TokenLogprobs(NamedTuple):
    """What the head says about each given token. All but ``logps_N`` is detached.

    Without statistics the three after ``logps_N`` are nan, or False.

    Attributes:
        logps_N: Log-probability of the token, in nats. Differentiable.
        entropy_N: Entropy of the whole distribution, in nats.
        mean_logit_N: Mean logit over the vocabulary.
        is_top1_N: Whether no other token is likelier; a tie counts, unlike with argmax.
        log_collision_N: Logarithm of the sum of all squared probabilities, the probability that two
            samples are the same token; None where it was not asked for.
    """

    logps_N: Tensor
    entropy_N: Tensor
    mean_logit_N: Tensor
    is_top1_N: Tensor
    log_collision_N: Tensor | None = None


def linear_logprobs(
    hidden_ND: Tensor,
    head: Head,
    targets_N: Tensor,
    *,
    chunk_size: int | None = None,
    collision: bool = False,
    statistics: bool = True,
) -> TokenLogprobs:
    """Log-probability of ``targets_N`` under ``head.logits(hidden_ND)``, and its company.

    Give it only the rows that matter: it has no notion of padding. Precision is as in
    ``linear_cross_entropy``: everything in fp32 from the logits on.

    Args:
        hidden_ND: Hidden states after the final norm, (N, D).
        head: Output projection (V, D), with its bias, scale and softcap.
        targets_N: Token id whose log-probability is wanted, (N,).
        chunk_size: Rows whose logits exist at a time; their probabilities are kept for backward
            only if all rows are one chunk. Default: chunks of 24 MiB (CPU), and probabilities of up
            to 64 MiB are kept.
        collision: Whether ``log_collision_N`` is wanted, which costs a pass over the probabilities.
        statistics: Whether more than log-probabilities is wanted; without gradients they need no
            memory but one chunk of logits.

    Returns:
        Log-probabilities and statistics, each (N,).

    Raises:
        ValueError: If shapes do not match or a target is outside the vocabulary.

    Note: It cannot be differentiated twice: backward refuses ``create_graph=True``.
    """
    head_chunks.check_rows(_WHERE, hidden_ND, head, targets_N, "targets")
    way_out = "Leave rows without a target out"
    head_chunks.check_vocabulary(_WHERE, targets_N, head, "targets", way_out)
    arithmetic = head_chunks.head_arithmetic(hidden_ND, head)
    num_rows, vocab_size = len(targets_N), head.weight.shape[0]
    chunk_rows = head_chunks.rows_per_chunk(_WHERE, num_rows, head, chunk_size, arithmetic.dtype)
    if chunk_size is None:
        keep = num_rows * vocab_size * arithmetic.dtype.itemsize <= _KEPT_BYTES
    else:
        keep = num_rows <= chunk_rows
    options = _Options(arithmetic, chunk_rows, keep, torch.is_grad_enabled(), collision, statistics)
    tensors = hidden_ND, head.weight, head.bias, targets_N
    return TokenLogprobs(*_LinearLogprobs.apply(*tensors, options))  # type: ignore[no-untyped-call]


class _Options(NamedTuple):
    arithmetic: head_chunks.HeadArithmetic
    chunk_rows: int
    keep_gradient: bool
    grad_enabled: bool  # Inside a Function it is always off.
    collision: bool
    statistics: bool


class _LinearLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        head = ChunkedHead(hidden_ND, weight_VD, bias_V, options.arithmetic, options.chunk_rows)
        wanted = tuple(options.grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        frozen_head = wanted == (True, False, False)
        keep = options.keep_gradient and any(wanted) and not frozen_head
        head.want_gradients((frozen_head, False, False))
        num_rows = len(targets_N)
        apart = options.statistics or any(wanted)  # probabilities, from logits that are asked again
        probs_rows = num_rows if keep else options.chunk_rows
        probs_NV = head.new_empty(probs_rows, len(weight_VD)) if apart else None
        outputs = (
            *head.new_empty(3, num_rows).fill_(torch.nan),
            torch.zeros_like(targets_N, dtype=torch.bool),
        )
        collision_N = head.new_empty(num_rows) if options.collision else None
        for rows in head_chunks.chunks(num_rows, options.chunk_rows):
            logits_RV, targets_R1 = head.logits(rows), targets_N[rows, None]
            probs_RV = logits_RV
            if probs_NV is not None:
                probs_RV = probs_NV[rows] if keep else probs_NV[: len(logits_RV)]
            values = _logps_and_statistics(logits_RV, probs_RV, targets_R1, options.statistics)
            for output_N, value_R in zip(outputs, values, strict=False):
                output_N[rows] = value_R
            if collision_N is not None:  # before the probabilities become gradients
                collision_N[rows] = _dots(probs_RV, probs_RV).log()
            if keep or frozen_head:
                _nll_gradient_(probs_RV, logits_RV, targets_R1, options.arithmetic.softcap)
            if frozen_head:
                head.add_gradients(rows, probs_RV)

        ctx.options, ctx.unit_hidden_ND = options, head.gradients[0]
        ctx.kept_NV = probs_NV if keep else None
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        if collision_N is not None:
            outputs = (*outputs, collision_N)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, *_grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
        head_chunks.refuse_second_derivative(_WHERE)
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        # What is at hand is the gradient of the negative log-probability of each row.
        factor_N1 = -ctx.options.arithmetic.logit_scale * grad_N[:, None]
        if ctx.unit_hidden_ND is not None:
            return (ctx.unit_hidden_ND * factor_N1, *[None] * 4)

        # Overwritten below, so a second backward (after retain_graph=True) computes it again.
        kept_NV, ctx.kept_NV = ctx.kept_NV, None
        options = ctx.options
        head = ChunkedHead(hidden_ND, weight_VD, bias_V, options.arithmetic, options.chunk_rows)
        head.want_gradients(ctx.needs_input_grad[:3])
        for rows in head_chunks.chunks(len(targets_N), options.chunk_rows):
            if kept_NV is None:
                dlogits_RV = _recomputed_nll_gradient(head, rows, targets_N[rows, None])
            else:
                dlogits_RV = kept_NV[rows]
            head.add_gradients(rows, dlogits_RV.mul_(factor_N1[rows]))
        return (*head.gradients, None, None)  # Autograd casts to the dtypes of the parameters.


def _logps_and_statistics(
    logits_RV: Tensor, probs_RV: Tensor, targets_R1: Tensor, statistics: bool
) -> tuple[Tensor, ...]:
    """The outputs for a chunk, all or the first; its probabilities go into ``probs_RV``."""
    target_logit_R1 = logits_RV.gather(1, targets_R1)
    largest_R1, log_sum_R1 = head_chunks.softmax_(logits_RV, out_RV=probs_RV)
    logps_R1 = (target_logit_R1 - largest_R1) - log_sum_R1
    if not statistics:
        return (logps_R1.squeeze(1),)
    # Entropy = -sum(p log p) = log sum(exp(x)) - sum(p x).
    entropy_R = (largest_R1 + log_sum_R1).squeeze(1) - _dots(probs_RV, logits_RV)
    is_top1_R = (target_logit_R1 == largest_R1).squeeze(1)
    return logps_R1.squeeze(1), entropy_R, logits_RV.mean(1), is_top1_R


def _dots(left_RV: Tensor, right_RV: Tensor) -> Tensor:
    """Dot product of each two rows; their products are never there for all rows at once."""
    parts = head_chunks.chunks(len(left_RV), _DOT_ROWS)
    return torch.cat([torch.linalg.vecdot(left_RV[rows], right_RV[rows]) for rows in parts])


def _nll_gradient_(
    probs_RV: Tensor, logits_RV: Tensor, targets_R1: Tensor, softcap: float | None
) -> Tensor:
    """Turn probabilities into d(-log p(target)) / d(logits before the softcap), in place.

    softmax(x) - onehot(target), times the slope of the softcap.
    """
    probs_RV.scatter_(1, targets_R1, probs_RV.gather(1, targets_R1) - 1)
    if softcap is not None:
        probs_RV.mul_(head_chunks.softcap_slope(logits_RV, softcap))
    return probs_RV


def _recomputed_nll_gradient(head: ChunkedHead, rows: slice, targets_R1: Tensor) -> Tensor:
    """The same from the hidden states."""
    logits_RV = head.logits(rows)
    softcap = head.arithmetic.softcap
    probs_RV = logits_RV if softcap is None else torch.empty_like(logits_RV)
    torch.softmax(logits_RV, -1, out=probs_RV)
    return _nll_gradient_(probs_RV, logits_RV, targets_R1, softcap)
