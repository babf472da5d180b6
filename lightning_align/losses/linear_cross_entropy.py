"""Cross-entropy of a linear head without the B x T x V logits.

``F.cross_entropy(head.logits(hidden), labels)`` keeps three tensors of the size of the logits. The
gradient of a summed cross-entropy needs nothing that backward would bring but one number, so here
it is computed in the forward pass, chunk by chunk, while the chunk's softmax is at hand: the same
three matrix products, no recomputation, and memory for one chunk. The idea is Liger Kernel's
(arXiv:2410.10989, section 3.2); the arithmetic is written out below.

Shapes: N rows, K rows with a label, R rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_align._errors import argument_error
from lightning_align.layers import Head
from lightning_align.losses import _head_chunks as head_chunks

_WHERE = "linear_cross_entropy"


class CrossEntropy(NamedTuple):
    """Sums over the tokens that have a label; divide by ``num_tokens`` for means.

    Attributes:
        loss: Cross-entropy with label smoothing and z-loss. Differentiable.
        nll: Negative log-likelihood alone, whose mean's exponential is the perplexity. Detached.
        num_tokens: Number of tokens with a label. Integer, on the device of the labels.
    """

    loss: Tensor
    nll: Tensor
    num_tokens: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> CrossEntropy:
    """Summed cross-entropy of ``head.logits(hidden)``, whose gradient is ready after forward.

    Rows without a label are dropped before the head. Logits, loss and the sums of gradients are
    fp32 whatever the model's dtype (also under autocast), fp64 for an fp64 model; gradients come
    back in the dtype of what they belong to. What is frozen costs nothing, nor does ``no_grad``.

    Args:
        hidden: Hidden states after the final norm, (..., D).
        head: Output projection (V, D), with its bias, scale and softcap.
        labels: Token id that each hidden state should predict, (...): shifted already.
        ignore_index: Label of rows that do not count.
        label_smoothing: Share of the target that is spread evenly over the vocabulary, in [0, 1].
        z_loss: Weight of the squared log-normaliser. PaLM used 1e-4.
        chunk_size: Rows whose logits exist at a time. Default: as many as fit in 24 MiB (CPU).

    Returns:
        Sum of the losses, sum of the plain negative log-likelihoods, number of labels. All labels
        ignored is no error: both sums and all gradients are zero.

    Raises:
        ValueError: If shapes do not match, a label is outside the vocabulary, or an option is
            outside its range.

    Note: It cannot be differentiated twice: backward refuses ``create_graph=True``.
    """
    head_chunks.check_rows(_WHERE, hidden, head, labels, "labels")
    if not 0 <= label_smoothing <= 1:
        raise argument_error(_WHERE, "label_smoothing", label_smoothing, "must be in [0, 1]")
    if not z_loss >= 0:
        raise argument_error(_WHERE, "z_loss", z_loss, "must be 0 or more")
    labels_N = labels.reshape(-1)
    has_label_N = labels_N != ignore_index
    rows_K = has_label_N.nonzero().squeeze(1)
    labels_K = labels_N[rows_K]
    way_out = f"Mark tokens that do not count with ignore_index={ignore_index}"
    head_chunks.check_vocabulary(_WHERE, labels_K, head, "labels", way_out)
    arithmetic = head_chunks.head_arithmetic(hidden, head)
    chunk_rows = head_chunks.rows_per_chunk(_WHERE, len(rows_K), head, chunk_size, arithmetic.dtype)
    grad_enabled = torch.is_grad_enabled()  # Inside a Function it is always off.
    options = _Options(arithmetic, label_smoothing, z_loss, chunk_rows, grad_enabled)
    loss, nll = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, labels_K, rows_K, options
    )
    return CrossEntropy(loss, nll, has_label_N.sum())


class _Options(NamedTuple):
    arithmetic: head_chunks.HeadArithmetic
    label_smoothing: float
    z_loss: float
    chunk_rows: int
    grad_enabled: bool


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, options = inputs  # as _forward takes them
        wanted = tuple(options.grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        losses_K, nlls_K, ctx.gradients = _forward(options, wanted, *tensors)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        loss, nll = losses_K.sum(), nlls_K.sum()
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        head_chunks.refuse_second_derivative(_WHERE)
        # Taken out of the context: only a gradient that nothing else holds is not copied.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # A second backward, after retain_graph=True.
            wanted = ctx.needs_input_grad[:3]
            *_, gradients = _forward(ctx.options, wanted, *ctx.saved_tensors)
        factor = grad_loss * ctx.options.arithmetic.logit_scale
        # Autograd casts each to the dtype of its parameter.
        return (*(g if g is None else g.mul_(factor) for g in gradients), None, None, None)


def _forward(
    options: _Options,
    wanted: Sequence[bool],
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_K: Tensor,
    rows_K: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss and plain NLL of each row, and the gradients of the summed losses that are wanted."""
    head = head_chunks.ChunkedHead(
        hidden_ND, weight_VD, bias_V, options.arithmetic, options.chunk_rows
    )
    head.want_gradients(wanted)
    losses_K, nlls_K = head.new_empty(2, len(rows_K))
    for chunk in head_chunks.chunks(len(rows_K), options.chunk_rows):
        logits_RV = head.logits(rows_K[chunk])
        losses_K[chunk], nlls_K[chunk] = _losses_and_gradient_(
            logits_RV, labels_K[chunk, None], options, with_gradient=any(wanted)
        )
        if any(wanted):
            head.add_gradients(rows_K[chunk], logits_RV)
    return losses_K, nlls_K, head.gradients


def _losses_and_gradient_(
    logits_RV: Tensor, labels_R1: Tensor, options: _Options, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses and plain NLLs of a chunk; the logits become the gradient of the summed losses.

    With x the logits, y the label, s the smoothing, z the z-loss and Z = sum(exp(x)):

        loss  = (1 - s) (log Z - x_y) + s (log Z - mean(x)) + z log(Z)^2
        dloss = (1 + 2 z log Z) softmax(x) - (1 - s) onehot(y) - s / V

    z-loss: PaLM, arXiv:2204.02311, section 5. Smoothing: as in ``F.cross_entropy``.
    """
    smoothing, z_loss = options.label_smoothing, options.z_loss
    softcap = options.arithmetic.softcap if with_gradient else None
    slope_RV = None if softcap is None else head_chunks.softcap_slope(logits_RV, softcap)
    label_logit_R1 = logits_RV.gather(1, labels_R1)
    mean_logit_R1 = logits_RV.mean(1, keepdim=True) if smoothing else label_logit_R1
    largest_R1, log_sum_R1 = head_chunks.softmax_(logits_RV, out_RV=logits_RV)
    nll_R1 = (largest_R1 - label_logit_R1) + log_sum_R1
    loss_R1 = nll_R1
    log_Z_R1 = largest_R1 + log_sum_R1
    if smoothing:
        loss_R1 = (1 - smoothing) * nll_R1 + smoothing * (log_Z_R1 - mean_logit_R1)
    if z_loss:
        loss_R1 = loss_R1 + z_loss * log_Z_R1.square()
    if not with_gradient:
        return loss_R1.squeeze(1), nll_R1.squeeze(1)

    if z_loss:
        logits_RV.mul_(1 + 2 * z_loss * log_Z_R1)
    if smoothing:
        logits_RV.sub_(smoothing / logits_RV.shape[1])
    logits_RV.scatter_(1, labels_R1, logits_RV.gather(1, labels_R1) - (1 - smoothing))
    if slope_RV is not None:
        logits_RV.mul_(slope_RV)
    return loss_R1.squeeze(1), nll_R1.squeeze(1)
