"""FLOPs of an operation: torch's own formulas first, ours for what it has none.

FLOPs are those of products (matrix products, convolutions, attention), a multiplication and an
addition each: the figure that model FLOPs utilisation is about. Attention counts all pairs of
tokens, because causal kernels that skip half of them are not told apart here; its fused backward
computes the scores again, so that it has 5 products where the unfused one has 4.

What else is computed are pointwise FLOPs: by convention one for each element that an operation
yields or sums up, and as written below for those that do more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PRODUCT, ATTENTION, POINTWISE, REDUCTION = "product", "attention", "pointwise", "reduction"
NORM, MOVE, VIEW, QUERY, UNKNOWN = "norm", "move", "view", "query", "unknown"
MESSAGE = "message"  # from rank to rank
Formula = Callable[..., int]


def words(text: str) -> frozenset[str]:
    """Names that are separated by spaces."""
    return frozenset(text.split())


def _each(**groups: str) -> dict[str, int]:
    """Name -> number, from groups ``_number="names"``."""
    return {name: int(key[1:]) for key, text in groups.items() for name in words(text)}


# FLOPs an element of what it yields.
_PER_ELEMENT = _each(
    _1="cumsum cumprod floor_divide threshold_backward",
    _2="native_dropout _fused_dropout",
    _3="addcmul addcdiv lerp softplus_backward log_sigmoid_forward log_sigmoid_backward",
    _4="silu",
    _7="silu_backward",
    _8="gelu",
    _12="gelu_backward",
)
# Of the largest tensor it is given. Softmax: maximum, difference, exponential, sum, quotient.
_NORMS = _each(
    _4="_softmax_backward_data _log_softmax_backward_data",
    _5="softmax _softmax _safe_softmax log_softmax _log_softmax _fused_rms_norm",
    _7="native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit",
    _10="_fused_rms_norm_backward",
    _12="native_layer_norm_backward native_batch_norm_backward native_group_norm_backward",
)
# Of all parameters.
_FUSED_STEPS = _each(
    _4="_fused_sgd_", _6="_fused_adagrad_", _14="_fused_adam_", _15="_fused_adamw_"
)
# One for each element of the argument of that place.
_SUMMED_INTO = _each(
    _0="""embedding_dense_backward linalg_vector_norm _foreach_norm logsumexp std var var_mean histc
    bincount max min argmax argmin""",
    _1="nll_loss_forward",
    _2="nll_loss_backward",
    _3="scatter_add index_add scatter_reduce",
)
_MOVES = words(
    """
    clone copy _to_copy cat stack embedding gather index index_select take scatter index_put
    _unsafe_index _unsafe_index_put _index_put_impl index_copy index_fill select_scatter
    slice_scatter as_strided_scatter select_backward slice_backward repeat tril triu roll flip
    constant_pad_nd masked_fill masked_scatter masked_select fill zero zeros ones full arange eye
    scalar_tensor empty empty_strided empty_like zeros_like ones_like full_like new_empty
    new_empty_strided new_zeros new_ones new_full rand randn randint randperm rand_like randn_like
    randint_like normal uniform bernoulli exponential random multinomial nonzero
    _local_scalar_dense resize _foreach_copy _foreach_zero set _pin_memory nan_to_num _copy_from
    split_with_sizes_copy unfold_backward repeat_interleave equal linspace _amp_update_scale
    diagonal_backward bucketize _chunk_cat sort topk argsort searchsorted unique_consecutive
    """
)
_VIEWS = words("_unsafe_view lift_fresh lift _reshape_alias alias detach")
_MESSAGES = ("c10d.", "_c10d_functional.")
_NO_MESSAGES = words("wait_tensor _wrap_tensor_autograd")  # but where one is waited for
_MOVES_OF_FSDP = frozenset(
    f"fsdp.{name}" for name in words("all_gather_copy_in split_with_sizes_copy chunk_cat")
)
_QUERIES = words(
    """
    _record_function_enter_new _record_function_exit device sym_size size stride storage_offset
    sym_stride sym_storage_offset sym_numel numel dim layout is_pinned is_contiguous
    sym_is_contiguous is_strides_like_format is_non_overlapping_and_dense is_same_size _version
    """
)


@dataclass(frozen=True)
class Op:
    """What does not depend on its arguments.

    Attributes:
        name: As it is reported, ``"aten.mm"``.
        base: Without its namespace, nor the sign that it works in place.
        kind: What bounds its speed.
        formula: FLOPs of its products, from its arguments and ``out_val``; None if it has none.
        arguments: Names, in order.
        written: Names of those that it writes into.
    """

    name: str
    base: str
    kind: str
    formula: Formula | None
    arguments: tuple[str, ...]
    written: frozenset[str]


@cache
def describe(func: Any) -> Op:
    """What an operation is.

    Args:
        func: As ``__torch_dispatch__`` gets it.
    """
    packet = getattr(func, "_overloadpacket", func)  # operators of higher order have no overloads
    name = str(packet)
    last = name.rpartition(".")[2]
    base = last.rstrip("_") if not last.startswith("__") else last
    schema = getattr(func, "_schema", None)
    arguments = () if schema is None else schema.arguments
    # In place torch has no formulas, and what is computed is the same.
    same = packet if base == last else getattr(torch.ops.aten, base, packet)
    formula = _torchs().get(packet) or _torchs().get(same) or OURS.get(name)
    return Op(
        name,
        base,
        _kind(func, name, base, formula),
        formula,
        tuple(argument.name for argument in arguments),
        frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write),
    )


def _kind(func: Any, name: str, base: str, formula: Formula | None) -> str:
    if base in _QUERIES:
        return QUERY
    if getattr(func, "is_view", False) or base in _VIEWS or _has_tag(func, "inplace_view"):
        return VIEW
    if name.startswith(_MESSAGES):
        return VIEW if base in _NO_MESSAGES else MESSAGE
    if name in _MOVES_OF_FSDP:
        return MOVE
    if formula is not None:
        return ATTENTION if "attention" in name else PRODUCT
    if not name.startswith(("aten.", "prims.", "prim.")):
        return UNKNOWN
    if base in _NORMS:
        return NORM
    if base in _MOVES:
        return MOVE
    if base in _SUMMED_INTO or _has_tag(func, "reduction"):
        return REDUCTION
    plain = base.removeprefix("_foreach_")
    if f"{base}_" in _FUSED_STEPS or plain in _PER_ELEMENT or _is_pointwise(func, plain):
        return POINTWISE
    return UNKNOWN


def _has_tag(func: Any, name: str) -> bool:
    return getattr(torch.Tag, name) in getattr(func, "tags", ())


def _is_pointwise(func: Any, plain: str) -> bool:
    """In-place and ``_foreach_`` variants do not say so themselves."""
    packet: Any = getattr(torch.ops.aten, plain, None)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return any(_has_tag(each, "pointwise") for each in [func, *overloads])


@cache
def _torchs() -> dict[Any, Formula]:
    """Formulas of torch; those that a user registers before the first analysis, too."""
    found: dict[Any, Formula] = FlopCounterMode(display=False).flop_registry
    return found


def product_flops(op: Op, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of products."""
    return 0 if op.formula is None else int(op.formula(*args, **kwargs, out_val=out))


def repeated_flops(op: Op, args: Any) -> int:
    """Those of ``product_flops`` that forward has done before: scores, in a fused backward."""
    if op.kind != ATTENTION or not op.name.endswith("_backward"):
        return 0
    pairs, width = _pairs_and_width(op, args)
    return pairs * 2 * width


def _softmax_of_pairs(op: Op, args: Any) -> int:
    """As softmax by itself; a fused backward has its exponentials once more, too."""
    pairs, _ = _pairs_and_width(op, args)
    if op.name.endswith("_backward"):
        return (2 + _NORMS["_softmax_backward_data"]) * pairs
    return _NORMS["_softmax"] * pairs


def _pairs_and_width(op: Op, args: Any) -> tuple[int, int]:
    """Pairs of tokens in all heads, and the width of a head; 0 for batches that are ragged."""
    first = 1 if op.name.endswith("_backward") else 0  # behind the gradient
    query, key = args[first], args[first + 1]
    if query.dim() != 4:  # lengths are in other arguments
        return 0, 0
    if op.base.startswith("_efficient_attention"):  # (batch, tokens, heads, width)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    return _pairs(query, key), int(query.shape[-1])


def pointwise_flops(op: Op, args: Any, out: Any) -> int:
    """FLOPs of what is no product; 0 for operations that are not known."""
    if op.kind == ATTENTION:
        return _softmax_of_pairs(op, args)
    if op.kind == NORM:
        return _NORMS[op.base] * _largest(args)
    if op.base in _SUMMED_INTO and op.kind == REDUCTION:
        place = _SUMMED_INTO[op.base]
        return _numel(args[place]) if place < len(args) else _largest(args)
    if op.kind == REDUCTION:
        return _largest(args)
    if op.kind != POINTWISE:
        return 0
    if f"{op.base}_" in _FUSED_STEPS:
        return _FUSED_STEPS[f"{op.base}_"] * _numel(args[0])
    elements = _largest(out) if out is not None else 0
    if op.base.startswith("_foreach_"):
        elements = _numel(args[0])
    return _PER_ELEMENT.get(op.base.removeprefix("_foreach_"), 1) * elements


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors in an argument or result, in order."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple)):
        for each in value:
            if isinstance(each, Tensor):
                found.append(each)
            elif isinstance(each, (list, tuple)):
                found += tensors_of(each)
    return found


def _numel(value: Any) -> int:
    return sum(tensor.numel() for tensor in tensors_of(value))


def _largest(values: Any) -> int:
    return max((tensor.numel() for tensor in tensors_of(values)), default=0)


def _pairs(query: Tensor, key: Tensor) -> int:
    batch, heads, queries, _ = query.shape
    return int(batch * heads * queries * key.shape[-2])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Q K^T and P V. Each head of the queries has its products, however few those of keys are."""
    return 2 * _pairs(query, key) * int(query.shape[-1] + value.shape[-1])


def _attention_backward(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> int:
    """Q K^T once more, dO V^T, P^T dO, dS K and dS^T Q."""
    return 2 * _pairs(query, key) * int(3 * query.shape[-1] + 2 * value.shape[-1])


def _grouped(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Matrices of experts: groups are a dimension of their own, or lie one behind another."""
    groups = int(left.shape[0]) if left.dim() == right.dim() == 3 else 1
    return 2 * groups * int(left.shape[-2] * left.shape[-1] * right.shape[-1])


def _names(formulas: Iterable[tuple[str, Formula]]) -> dict[str, Formula]:
    return {f"aten.{name}": formula for name, formula in formulas}


# torch.utils.flop_counter.register_flop_formula would raise once torch has one of its own.
OURS: dict[str, Formula] = _names(
    [
        ("_scaled_dot_product_flash_attention_for_cpu", _attention),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
        ("_scaled_dot_product_fused_attention_overrideable", _attention),
        ("_scaled_dot_product_fused_attention_overrideable_backward", _attention_backward),
        ("_grouped_mm", _grouped),
        ("mv", lambda matrix, *_, **__: 2 * matrix.numel()),
        ("addmv", lambda _, matrix, *__, **___: 2 * matrix.numel()),
        ("dot", lambda left, *_, **__: 2 * left.numel()),
        ("addr", lambda _, left, right, **__: 2 * left.numel() * right.numel()),
    ]
)
# Whose FLOPs are a matter of their tensors' shapes alone.
BY_SHAPES = frozenset(OURS) | frozenset(
    f"aten.{name}{sign}" for name in words("mm addmm bmm baddbmm") for sign in ("", "_")
)
