"""What a decoder computes and moves for one micro-batch, piece by piece, on one rank of a split.

Pieces are what runs as a few kernels: a product, a norm, a softmax. FLOPs are two for a
multiplication and an addition; bytes are what eager kernels read and write. Suffixes of sizes: N
tokens of the micro-batch, h width, q of all queries, k of all keys, f of the feed-forward part, V
vocabulary; t ranks of tensor parallelism.
"""

from __future__ import annotations

from typing import NamedTuple

from lightning_align.planner.model_spec import ModelSpec
from lightning_align.planner.parallel_spec import ParallelSpec

# Passes over fp32 logits of an unfused cross-entropy: cast, maximum, difference, exponential, sum
# and quotient; the gradient reads and writes once and is cast.
LOSS_BYTES, LOSS_GRADIENT_BYTES = 34, 14
ATTENTION, CACHE = "attention", "cache"
FUSED_BACKWARD = 2.5  # of a fused attention's forward: five products in place of two


class Piece(NamedTuple):
    """Some kernels.

    Attributes:
        name: Of what they compute.
        flops: Of products.
        depth: Inner side of these products.
        bytes: Read and written.
        kernels: How many.
        of_weights: Whether it is for a gradient of weights only, which frozen ones do not need.
        share: Of the roofline that it reaches, beside what all pieces fall short of.
    """

    name: str
    flops: float = 0.0
    depth: float = 1.0
    bytes: float = 0.0
    kernels: int = 1
    of_weights: bool = False
    share: float = 1.0


class Pass(NamedTuple):
    """Forward or backward of a block, or of what is before or after all of them.

    Attributes:
        pieces: What runs.
        collectives: All-reduces among the ranks of tensor parallelism.
        message: Bytes of each.
    """

    pieces: tuple[Piece, ...]
    collectives: int = 0
    message: float = 0.0


class Sizes(NamedTuple):
    """Sizes of a micro-batch on one rank; see the module's docstring."""

    N: float
    rows: float
    s: int
    h: int
    q: float
    k: float
    f: float
    V: float
    heads: float
    head_width: int
    narrow: float  # tokens of norms, dropout and residuals
    el: int
    fused: bool
    gates: int
    dropout: bool


def sizes(model: ModelSpec, parallel: ParallelSpec) -> Sizes:
    """Sizes of a micro-batch on one rank."""
    t = parallel.tensor_parallel
    tokens = parallel.rows * model.seq_len
    return Sizes(
        N=tokens,
        rows=parallel.rows,
        s=model.seq_len,
        h=model.hidden_size,
        q=model.query_width / t,
        k=model.key_width / t,
        f=model.ffn_width / t,
        V=model.vocab_size / t,
        heads=model.num_heads / t,
        head_width=model.head_width,
        narrow=tokens / t if parallel.sequence_parallel else tokens,
        el=parallel.element_bytes,
        fused=model.attention == "fused",
        gates=1 + model.gated_ffn,
        dropout=model.dropout,
    )


def block_passes(model: ModelSpec, parallel: ParallelSpec) -> tuple[Pass, Pass]:
    """Forward and backward of one block that trains; recomputation is in backward."""
    z = sizes(model, parallel)
    core, core_backward = _attention(z)
    forward = [*_projections(z), *core, *_feed_forward(z), *_stream(z)]
    backward = [
        *(piece for product in _products(z) for piece in _product_backward(product, z)),
        *core_backward,
        *_pointwise_backward(z),
    ]
    reduces = 2 if parallel.tensor_parallel > 1 else 0
    message = z.N * z.h * z.el
    again = 0
    if parallel.activation_checkpointing == "full":
        backward, again = forward + backward, reduces
    elif parallel.activation_checkpointing == "selective" and not z.fused:
        backward = core + backward
    ahead = Pass(tuple(forward), reduces, message)
    return ahead, Pass(tuple(backward), reduces + again, message)


def frozen(backward: Pass) -> Pass:
    """The same backward where weights are frozen."""
    return backward._replace(pieces=tuple(p for p in backward.pieces if not p.of_weights))


def first_passes(model: ModelSpec, parallel: ParallelSpec) -> tuple[Pass, Pass]:
    """Forward and backward of the embedding."""
    z = sizes(model, parallel)
    looked_up = Piece("embedding", bytes=3 * z.N * z.h * z.el, kernels=3)
    added = Piece("embedding's gradient", bytes=3 * z.N * z.h * z.el, kernels=2)
    reduces = 1 if parallel.tensor_parallel > 1 else 0
    return Pass((looked_up,), reduces, z.N * z.h * z.el), Pass((added,))


def last_passes(model: ModelSpec, parallel: ParallelSpec) -> tuple[Pass, Pass]:
    """Forward and backward of final norm, head and loss."""
    z = sizes(model, parallel)
    head = _product("head", z.N, z.h, z.V, z)
    forward = (_norm(z), head, Piece("loss", bytes=LOSS_BYTES * z.N * z.V, kernels=10))
    gradient = Piece("loss's gradient", bytes=LOSS_GRADIENT_BYTES * z.N * z.V, kernels=5)
    backward = (gradient, *_product_backward(("head", z.N, z.h, z.V), z), _norm_backward(z))
    reduces = 1 if parallel.tensor_parallel > 1 else 0
    return Pass(forward), Pass(backward, reduces, z.N * z.h * z.el)


def decoding_pass(model: ModelSpec, parallel: ParallelSpec, context: float) -> Pass:
    """Forward of one block for a new token of each row, whose keys and values join the cache.

    Args:
        model: What generates.
        parallel: How it is split; a micro-batch are the rows.
        context: Tokens that it attends to, itself among them.
    """
    z = sizes(model.with_seq_len(1), parallel)
    cached, added = (2 * z.k * z.rows * tokens * z.el for tokens in (context, 1))
    scores = Piece(
        ATTENTION, 4 * z.rows * context * z.q, z.head_width, cached + 2 * z.rows * z.q * z.el, 2
    )
    joined = Piece(CACHE, bytes=2 * added, kernels=2)
    reduces = 2 if parallel.tensor_parallel > 1 else 0
    pieces = (*_projections(z), joined, scores, *_feed_forward(z), *_stream(z))
    return Pass(pieces, reduces, z.N * z.h * z.el)


def _products(z: Sizes) -> list[tuple[str, float, float, float]]:
    """Name, rows, inputs and outputs of the products with weights of a block."""
    return [
        ("queries, keys, values", z.N, z.h, z.q + 2 * z.k),
        ("attention's output", z.N, z.q, z.h),
        ("feed-forward in", z.N, z.h, z.gates * z.f),
        ("feed-forward out", z.N, z.f, z.h),
    ]


def _product(name: str, rows: float, inputs: float, outputs: float, z: Sizes) -> Piece:
    moved = (rows * inputs + inputs * outputs + rows * outputs) * z.el
    return Piece(name, 2 * rows * inputs * outputs, inputs, moved)


def _product_backward(product: tuple[str, float, float, float], z: Sizes) -> list[Piece]:
    """The gradient of the input, whose depth are the outputs, and that of the weight."""
    name, rows, inputs, outputs = product
    flops = 2 * rows * inputs * outputs
    moved = (rows * inputs + inputs * outputs + rows * outputs) * z.el
    summed = moved + inputs * outputs * z.el  # added to what earlier micro-batches left there
    return [
        Piece(f"{name}'s gradient of its input", flops, outputs, moved),
        Piece(f"{name}'s gradient", flops, rows, summed, 2, of_weights=True),
        Piece(f"{name}'s gradient of a bias", bytes=rows * outputs * z.el, of_weights=True),
    ]


def _projections(z: Sizes) -> list[Piece]:
    return [_product(*product, z) for product in _products(z)[:2]]


def _feed_forward(z: Sizes) -> list[Piece]:
    activation = (1 + z.gates) * z.N * z.f * z.el
    pieces = [_product(*product, z) for product in _products(z)[2:]]
    return [*pieces, Piece("activation", bytes=activation, kernels=z.gates)]


def _attention(z: Sizes) -> tuple[list[Piece], list[Piece]]:
    """Scores and what they weigh: forward and backward."""
    flops = 4 * z.N * z.s * z.q
    moved = (2 * z.q + 2 * z.k) * z.N * z.el
    if z.fused:  # which leaves out the half of the blocks that the causal mask hides
        ahead = Piece(ATTENTION, flops / 2, z.head_width, moved, 2)
        back = Piece(
            *("attention's gradient", FUSED_BACKWARD * flops / 2, z.head_width, 2 * moved, 4)
        )
        return [ahead], [back]
    scores = z.rows * z.heads * z.s * z.s
    mask = scores if z.dropout else 0.0
    product = Piece("scores", flops / 2, z.head_width, moved / 2 + scores * z.el, 2)
    weighed = Piece("weighed values", flops / 2, z.s, moved / 2 + scores * z.el, 2)
    softmax = Piece("softmax", bytes=2 * scores * z.el)
    dropped = [Piece("dropout of scores", bytes=2 * scores * z.el + mask)] * z.dropout
    forward = [product, softmax, *dropped, weighed]
    backward = [
        *(weighed._replace(depth=depth) for depth in (z.s, z.head_width)),
        *dropped,
        Piece("softmax's gradient", bytes=3 * scores * z.el),
        *(product._replace(depth=z.s),) * 2,
    ]
    return forward, backward


def _norm(z: Sizes) -> Piece:
    return Piece("norm", bytes=2 * z.narrow * z.h * z.el)


def _norm_backward(z: Sizes) -> Piece:
    return Piece("norm's gradient", bytes=4 * z.narrow * z.h * z.el, kernels=2)


def _stream(z: Sizes) -> list[Piece]:
    """Norms and residuals, with dropout."""
    mask = z.narrow * z.h * z.dropout
    added = Piece("residual", bytes=3 * z.narrow * z.h * z.el + mask, kernels=1 + z.dropout)
    return [_norm(z), _norm(z), added, added]


def _pointwise_backward(z: Sizes) -> list[Piece]:
    activation = (1 + 2 * z.gates) * z.N * z.f * z.el
    stream = Piece("residual's gradient", bytes=3 * z.narrow * z.h * z.el, kernels=2)
    slope = Piece("activation's gradient", bytes=activation, kernels=z.gates)
    return [slope, _norm_backward(z), _norm_backward(z), stream, stream]
