"""What a block keeps of a micro-batch for its backward, in bytes (arXiv:2205.05198, section 4).

Counted are the tensors of the usual fused kernels: inputs of products and norms, queries, keys and
values, what dropout kept. A block of a real model, analysed on meta, has its own count. Rows of
pairs need no mask on a CPU, nor with FlexAttention; of other kernels on CUDA a dense one is not
counted.
"""

from __future__ import annotations

from lightning_align.planner.block_work import Sizes, sizes
from lightning_align.planner.model_spec import ModelSpec, count
from lightning_align.planner.parallel_spec import ParallelSpec

CHUNK_BYTES = 24 * 2**20  # of logits that a loss in chunks has at a time
KEPT_BYTES = 64 * 2**20  # of probabilities up to which those of pairs are kept
DOT_ROWS = 64  # of probabilities times logits, for entropies, at a time
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
        counted = model.analysis.of(parallel).saved_bytes(z.rows, z.s)
        if counted is not None:
            return counted + repeated_bytes(z, parallel) + weight_copies(model, parallel)
    scores = 0.0 if parallel.activation_checkpointing == "selective" else _scores(z)
    kept = _attention(z) + scores + _feed_forward(z) + _norms(z)
    return kept + repeated_bytes(z, parallel) + weight_copies(model, parallel)


def weight_copies(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes of the 16-bit copies of a block's matrices that autograd keeps in mixed precision."""
    matrices = count(each for each in model.block_shapes if each[0].startswith("matrices"))
    return 2 * matrices / parallel.tensor_parallel * parallel.precision.endswith("mixed")


def shared_bytes(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes of those that all blocks of a stage keep together."""
    if parallel.activation_checkpointing == "full" or model.analysis is None:
        return 0.0
    if model.analysis.saved_a_token is None or parallel.tensor_parallel > 1:
        return 0.0
    return model.analysis.of(parallel).shared_bytes(model.seq_len)


def frozen_saved_bytes(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes that a block keeps whose weights are frozen: no inputs for their gradients.

    What norms and attention hand to products is not kept; what attention returns, it keeps itself.
    """
    trained = block_saved_bytes(model, parallel)
    if parallel.activation_checkpointing == "full":
        return trained
    z = sizes(model, parallel)
    if model.analysis is not None and model.analysis.saved_a_token is not None:
        return trained - z.N * model.analysis.of(parallel).trained_a_token
    return trained - (z.N * z.f + 2 * z.narrow * z.h) * z.el


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
    if model.analysis is not None:
        ends = model.analysis.of(parallel).ends_a_token
        if ends is not None:
            return z.N * ends + logits
    return 2 * z.narrow * z.h * z.el + logits


def handed_on_bytes(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes that one stage sends to the next of a micro-batch."""
    z = sizes(model, parallel)
    return z.narrow * z.h * z.el


def loss_bytes(
    model: ModelSpec, parallel: ParallelSpec, is_processor: bool = False
) -> tuple[float, float]:
    """Bytes that the loss of a micro-batch keeps until backward, and needs for a moment.

    In chunks, cross-entropy makes the gradients of hidden states and head in forward, in fp32. The
    log-probabilities of pairs keep the probabilities, where these are not too many; beside them are
    logits and a few rows of a product of both. A reference has one such chunk, and before it a
    block's forward.

    Args:
        model: Its sizes.
        parallel: How it is trained.
        is_processor: Whether it runs on one.
    """
    z = sizes(model, parallel)
    logits = 4 * parallel.predicted_rows * z.s * z.V
    if not parallel.chunked_loss:
        return 0.0, logits
    chunk = min(CHUNK_BYTES, logits)
    copied = z.V * z.h * _copied_head(parallel, is_processor)
    if parallel.objective != "dpo":
        return 4 * (z.narrow * z.h + z.V * z.h), chunk * (1 + z.h / z.V) + copied
    hidden = parallel.predicted_rows * z.s * z.h * z.el
    keeps = logits <= KEPT_BYTES
    product = min(chunk, 4 * DOT_ROWS * z.V)
    kept, chunks = hidden + logits * keeps, chunk * (1 if keeps else 2) + product + copied
    if parallel.has_reference:
        block = z.el * (z.N * z.f * (1 + z.gates) + 2 * z.narrow * z.h)
        chunks = max(chunks, block)
    return kept, chunks


def _copied_head(parallel: ParallelSpec, is_processor: bool) -> int:
    """Bytes of an element of the head's copy in the dtype of its products.

    That is fp32, as logits are; devices multiply bf16 into fp32, and take its copy.
    """
    takes_bf16 = parallel.precision.startswith("bf16") and not is_processor
    product = 2 if takes_bf16 else 4
    return 0 if product == parallel.weight_bytes else product


def repeated_bytes(z: Sizes, parallel: ParallelSpec) -> float:
    """Bytes of keys and values once for each head of queries, as transformers has them masked."""
    return z.N * 2 * (z.q - z.k) * z.el if parallel.shared_prefix else 0.0


def backward_temporary(model: ModelSpec, parallel: ParallelSpec) -> float:
    """Bytes of gradients that are there for a moment in the backward of a feed-forward part.

    Of its product, and of both factors of a gate, less the input that its last product kept.
    """
    z = sizes(model, parallel)
    return z.el * (z.gates * z.N * z.f + 2 * z.narrow * z.h)
