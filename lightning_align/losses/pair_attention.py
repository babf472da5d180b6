"""How a model is told who sees whom in rows of pairs: one mask for each type of its layers.

A mask of four dimensions replaces all masks that a model of transformers makes, also those of its
sliding windows: what is not in ours is lost in silence. So windows are read off the configuration,
whatever cannot be read is refused, and ``check_pair_attention`` compares with separate rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._compat.torch_modules import is_compiled
from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers
from lightning_align.layers.hugging_face import argument_names, base_model, is_hugging_face
from lightning_align.layers.probe import difference, probe_tokens, tolerance, undisturbed
from lightning_align.losses.pair_layout import PairLayout, lay_out_pairs, sees
from lightning_align.losses.pair_mask import PairMask

# What the mask of each attention kernel of transformers is made of.
_FORMS = {"sdpa": "boolean", "eager": "additive", "flex_attention": "blocks"}
_TYPES = ("full_attention", "sliding_attention")
# Numbers with "window" or "chunk" in their names that say nothing of who sees whom.
_HARMLESS = (
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "max_window_layers",
    "chunk_size_feed_forward",
)
_PROBE_WINDOW = 3
_LEAST_TOLERANCE = 2e-5  # kernels take the softmax in fp32, also of a model in float64


@dataclass(frozen=True)
class PairAttention:
    """What a model wants to be told about rows of pairs. Made by ``pair_attention``.

    Attributes:
        windows: Positions that each type of layers sees, None for all; a single type without a
            name for a model whose layers are all alike.
        form: Of a mask: boolean, additive or blocks (of FlexAttention).
        pairs_alone: Whether its attention was seen to run each pair alone (``PairMask``).
        compiled: Whether parts of it are, which would be traced anew for the pairs of each batch.
    """

    windows: tuple[tuple[str, int | None], ...]
    form: str
    pairs_alone: bool = False
    compiled: bool = False

    def arguments(self, layout: PairLayout, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of ``hidden_states`` for the rows of a layout.

        Args:
            layout: The rows.
            dtype: Of the model, and so of an additive mask.
        """
        masks = {name: self._mask(layout, window, dtype) for name, window in self.windows}
        return {
            "input_ids": layout.input_ids_RL,
            "position_ids": layout.position_ids_RL,
            "attention_mask": masks.get("", masks),
        }

    def _mask(self, layout: PairLayout, window: int | None, dtype: torch.dtype) -> Any:
        if self.form == "blocks":
            return _block_mask(layout, window)
        # In this order: elsewhere whoever reads a position waits for the device.
        is_ours = self.form == "boolean" and layout.pair_RL.device.type == "cpu"
        is_ours = is_ours and not (self.compiled or torch.compiler.is_compiling())
        if is_ours and (window is None or int(layout.position_ids_RL.max()) < window):
            return PairMask.of(layout)
        visible = layout.visible(window)
        if self.form == "boolean":
            return visible
        hidden = torch.finfo(dtype).min
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, hidden)


def _block_mask(layout: PairLayout, window: int | None) -> Any:
    """The same for FlexAttention, which skips the blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def mask_mod(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(layout, window, row, query, key)

    rows, width = layout.input_ids_RL.shape
    return create_block_mask(
        mask_mod, rows, None, width, width, device=str(layout.input_ids_RL.device)
    )


def pair_attention(model: nn.Module) -> PairAttention:
    """Read off a model what it must be told.

    Raises:
        ValueError: If it is no decoder of transformers, its attention takes no mask of four
            dimensions or no ``position_ids``, or it has layers that look back in another way.
    """
    if not is_hugging_face(model):
        raise _error(model, "its attention is not that of a model of transformers")
    called: Any = base_model(model) or model
    if "position_ids" not in argument_names(type(called).forward):
        raise _error(model, "its forward takes no position_ids")
    config: Any = called.config.get_text_config()
    kernel = config._attn_implementation
    if kernel not in _FORMS:
        rule = f"attn_implementation={kernel!r} takes no mask of rows"
        raise _error(model, rule, f"Use {' or '.join(map(repr, _FORMS))}")
    for name, value in vars(config).items():
        counts = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if counts and ("window" in name or "chunk" in name) and name not in _HARMLESS:
            raise _error(model, f"nobody knows what {name}={value} of its configuration hides")
    window = getattr(config, "sliding_window", None)
    types = dict.fromkeys(getattr(config, "layer_types", None) or ())
    unknown = [name for name in types if name not in _TYPES]
    if unknown:
        raise _error(model, f"it has layers of {' and '.join(map(repr, unknown))}")
    of_type = {name: window if name == "sliding_attention" else None for name in types}
    if len(set(of_type.values())) > 1:
        windows = tuple(of_type.items())
    else:
        windows = (("", next(iter(of_type.values())) if of_type else window),)
    compiled = any(map(is_compiled, model.modules()))
    return PairAttention(windows, _FORMS[kernel], compiled=compiled)


def check_pair_attention(layers: ModelLayers) -> PairAttention:
    """What a model must be told, once it has shown on a few tokens that it listens.

    Two pairs in one row must have the hidden states of their four sequences alone. A window of the
    configuration is 3 positions for that while, so that it bites whatever its size. Costs two
    forwards of 32 tokens.

    Raises:
        ValueError: As ``pair_attention``, or if the hidden states differ.
    """
    attention = pair_attention(layers.model)
    weight = layers.head.weight
    if any(parameter.is_meta for parameter in layers.model.parameters()):
        raise _error(layers.model, "its parameters are not here to compare")
    one_BT = probe_tokens(layers.vocab_size).to(weight.device)
    other_BT = (one_BT + 1) % layers.vocab_size
    tokens_BT = torch.stack([one_BT, other_BT], dim=1).flatten(0, 1)  # [chosen; rejected]
    layout = lay_out_pairs(tokens_BT, torch.ones_like(tokens_BT), packing=True)
    assert layout is not None
    assert len(layout.input_ids_RL) == 1
    with undisturbed(layers.model), _window_of(layers.model, _PROBE_WINDOW):
        alone_BTD = layers.hidden_states(tokens_BT)
        arguments = pair_attention(layers.model).arguments(layout, weight.dtype)
        try:
            in_rows_RLD = layers.hidden_states(arguments.pop("input_ids"), **arguments)
        except Exception as error:
            rule = f"it takes no mask of rows ({type(error).__name__}: {error})"
            raise _error(layers.model, rule) from error
    largest_error = difference(in_rows_RLD.flatten(0, 1)[layout.index_BT], alone_BTD)
    if not largest_error <= max(_LEAST_TOLERANCE, tolerance(layers.model)):  # also for NaN
        rule = (
            "its hidden states of two pairs in one row must be those of four separate rows; they"
            f" differ by {largest_error:.2g} of the largest"
        )
        raise _error(layers.model, rule)
    mask = arguments["attention_mask"]
    return replace(attention, pairs_alone=isinstance(mask, PairMask) and not mask.is_written)


@contextmanager
def _window_of(model: Any, window: int) -> Iterator[None]:
    """Another size for the sliding windows of a model for a while, if it has any."""
    called: Any = base_model(model) or model
    config = called.config.get_text_config()
    before = getattr(config, "sliding_window", None)
    if before is None:
        yield
        return
    config.sliding_window = window
    try:
        yield
    finally:
        config.sliding_window = before


def _error(model: nn.Module, rule: str, way_out: str = "") -> ValueError:
    return argument_error("pair_attention", "model", type(model).__name__, rule, way_out)
