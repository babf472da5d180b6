"""What a block keeps of a micro-batch for its backward, in bytes (arXiv:2205.05198, section 4).

Counted are the tensors of the usual fused kernels: inputs of products and norms, queries, keys and
values, what dropout kept. A block of a real model, analysed on meta, has its own count.
"""

from __future__ import annotations

from lightning_align.planner.block_work import Sizes, sizes
from lightning_align.planner.model_spec import ModelSpec
from lightning_align.planner.parallel_spec import ParallelSpec

_LOGSUMEXP = 4  # bytes of a head and token that a fused attention keeps in place of scores


def block_saved_bytes(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes that one block keeps of one micro-batch.

    Args:
        model: Its sizes.
        parallel: How it is split, and what is computed again.
    """
    z = sizes(model, parallel)
    if parallel.activation_checkpointing == "full":
        return z.narrow * z.h * z.el  # its input
    if model.analysis is not None and parallel.tensor_parallel == 1:
        counted = model.analysis.saved_bytes(z.rows, z.s, parallel.is_half)
        if counted is not None:
            return counted
    scores = 0.0 if parallel.activation_checkpointing == "selective" else _scores(z)
    return _attention(z) + scores + _feed_forward(z) + _norms(z)


def _attention(z: Sizes) -> float:
    """Input, queries, keys, values, input of the last product, mask of dropout: 11 s b h."""
    wide = 2 * z.q + 2 * z.k
    return z.N * wide * z.el + z.narrow * z.h * (z.el + z.dropout)


def _scores(z: Sizes) -> float:
    """Softmax, mask and result of dropout: 5 a s^2 b."""
    if z.fused:
        return _LOGSUMEXP * z.N * z.heads
    scores = z.rows * z.heads * z.s * z.s
    return scores * (z.el + z.dropout * (1 + z.el))


def _feed_forward(z: Sizes) -> float:
    """Inputs of both products and of the activation, mask of dropout: 19 s b h."""
    return z.N * z.f * (1 + z.gates) * z.el + z.narrow * z.h * (z.el + z.dropout)


def _norms(z: Sizes) -> float:
    """Inputs of both: 4 s b h."""
    return 2 * z.narrow * z.h * z.el


def first_saved_bytes(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes that the embedding keeps of one micro-batch: token ids, mask of dropout."""
    z = sizes(model, parallel)
    return z.narrow * z.h * z.dropout + 8 * z.N


def last_saved_bytes(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes that final norm, head and loss keep of one micro-batch.

    A loss in chunks keeps the gradient of its input in place of logits.
    """
    z = sizes(model, parallel)
    logits = 0.0 if parallel.chunked_loss else 4 * z.N * z.V
    return 2 * z.narrow * z.h * z.el + logits
