"""What the planner must know of a model: its sizes, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from lightning_align._errors import argument_error

if TYPE_CHECKING:
    from torch import nn

    from lightning_align.planner.block_analysis import BlockAnalysis

WHERE = "ModelSpec"
# Kind of a parameter, as build_param_groups sorts them, and its shape.
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_LEAST_ONE = ("num_layers", "hidden_size", "num_heads", "vocab_size", "seq_len")


@dataclass(frozen=True)
class ModelSpec:
    """A decoder by its sizes.

    Args:
        num_layers: Blocks.
        hidden_size: Width of the stream between blocks.
        num_heads: Heads of attention.
        num_kv_heads: Heads of keys and values; None has as many as queries.
        ffn_hidden_size: Width inside the feed-forward part; None is four times ``hidden_size``.
        vocab_size: Tokens that there are.
        seq_len: Tokens of a row.
        head_dim: Width of a head; None divides ``hidden_size``.
        gated_ffn: Whether the feed-forward part has a gate, as Llama's: three matrices.
        bias: Whether linear layers have biases.
        norm_bias: Whether norms have them, as LayerNorm does.
        num_positions: Learned positions; 0 for rotary ones.
        tied_embeddings: Whether the head is the embedding.
        dropout: Whether there is dropout, whose masks are kept for backward.
        attention: ``"fused"`` never has the scores in memory, ``"unfused"`` keeps them.
        analysis: What a block of a real model computes and keeps, of ``from_module``.

    Raises:
        ValueError: If a number is not positive, or heads cannot be divided.

    Example:
        >>> gpt2_medium = ModelSpec(24, 1024, 16, vocab_size=50257, seq_len=1024)
        >>> round(gpt2_medium.parameters / 1e6)
        354
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    ffn_hidden_size: int | None = None
    _: KW_ONLY
    vocab_size: int
    seq_len: int
    head_dim: int | None = None
    gated_ffn: bool = False
    bias: bool = True
    norm_bias: bool = True
    num_positions: int | None = None
    tied_embeddings: bool = True
    dropout: bool = False
    attention: str = "fused"
    analysis: BlockAnalysis | None = None

    def __post_init__(self) -> None:
        for argument in (*_LEAST_ONE, "num_kv_heads", "ffn_hidden_size", "head_dim"):
            value = getattr(self, argument)
            optional = argument not in _LEAST_ONE
            if (value is None and optional) or (type(value) is int and value >= 1):
                continue
            raise argument_error(WHERE, argument, value, "must be a whole number of at least 1")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            rule = f"must divide hidden_size={self.hidden_size}"
            raise argument_error(WHERE, "num_heads", self.num_heads, rule, "Or give head_dim")
        if self.num_heads % self.kv_heads:
            rule = f"must divide num_heads={self.num_heads}"
            raise argument_error(WHERE, "num_kv_heads", self.num_kv_heads, rule)
        if self.attention not in ("fused", "unfused"):
            rule = "must be 'fused' or 'unfused'"
            raise argument_error(WHERE, "attention", self.attention, rule)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def query_width(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_width

    @property
    def key_width(self) -> int:
        """Width of all heads of keys."""
        return self.kv_heads * self.head_width

    @property
    def ffn_width(self) -> int:
        """Width inside the feed-forward part."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def positions(self) -> int:
        """Learned positions; where nothing is said, one for each token of a row."""
        return self.seq_len if self.num_positions is None else self.num_positions

    @property
    def block_shapes(self) -> Shapes:
        """Parameters of one block."""
        if self.analysis is not None:
            return self.analysis.block_shapes
        h, q, k, f = self.hidden_size, self.query_width, self.key_width, self.ffn_width
        gates = [(f, h)] * (1 + self.gated_ffn)
        matrices = [(q, h), (k, h), (k, h), (h, q), *gates, (h, f)]
        vectors = [(h,), (h,)] * (1 + self.norm_bias)
        vectors += [(rows,) for rows, _ in matrices] * self.bias
        return _of("matrices", matrices) + _of("norms_biases", vectors)

    @property
    def first_shapes(self) -> Shapes:
        """Parameters before the first block."""
        if self.analysis is not None:
            return self.analysis.first_shapes
        h = self.hidden_size
        positions = [(self.positions, h)] if self.positions else []
        return _of("embeddings", [(self.vocab_size, h), *positions])

    @property
    def last_shapes(self) -> Shapes:
        """Parameters after the last block that are not tied to those before the first."""
        if self.analysis is not None:
            return self.analysis.last_shapes
        h = self.hidden_size
        heads = [] if self.tied_embeddings else [(self.vocab_size, h)]
        return _of("norms_biases", [(h,)] * (1 + self.norm_bias)) + _of("head", heads)

    @property
    def parameters(self) -> int:
        """How many there are; what is tied counts once."""
        blocks = self.num_layers * count(self.block_shapes)
        return count(self.first_shapes) + blocks + count(self.last_shapes)

    def with_seq_len(self, seq_len: int) -> ModelSpec:
        """The same model on rows of another length."""
        positions = self.num_positions if self.analysis is not None else self.positions
        return replace(self, seq_len=seq_len, num_positions=positions)

    @classmethod
    def from_config(cls, config: Any, *, seq_len: int | None = None) -> ModelSpec:
        """Of a model of transformers, without its weights.

        Args:
            config: A Hugging Face name or folder, a configuration, or the YAML of a run.
            seq_len: Tokens of a row; None takes the YAML's, else the most the model has positions
                for, at most 4096.

        Raises:
            ValueError: If it names no decoder whose sizes can be read.
        """
        from lightning_align.planner.read_config import sizes_of

        return cls(**sizes_of(config, seq_len))

    @classmethod
    def from_module(cls, module: nn.Module, *, seq_len: int) -> ModelSpec:
        """Of a real model, by analysing its blocks on the meta device.

        Args:
            module: A language model, or a module that holds one; it stays as it is.
            seq_len: Tokens of a row.

        Raises:
            ValueError: If its layers cannot be found, or it does not run on the meta device.
        """
        from lightning_align.planner.block_analysis import sizes_of_module

        return cls(**sizes_of_module(module, seq_len))


def count(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Elements of all of them."""
    return sum(prod(shape) for _, shape in shapes)


def _of(kind: str, shapes: Iterable[tuple[int, ...]]) -> Shapes:
    return tuple((kind, shape) for shape in shapes)
