"""Bytes that an operation moves, by the rule that its kernel reads inputs and writes outputs once.

That is what eager execution moves: every operation is a kernel of its own, and what it yields goes
through memory. Views move nothing; a tensor that is broadcast counts what is stored of it; a lookup
counts the rows that it touches; the same tensor given twice is read once. Caches are no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_align._compat.torch_messages import group_size
from lightning_align.planner.op_flops import MESSAGE, VIEW, Op, tensors_of, words


class Part(NamedTuple):
    """What an operation reads or writes of a tensor.

    Attributes:
        tensor: The tensor.
        bytes: How much of it.
    """

    tensor: Tensor
    bytes: int


class Traffic(NamedTuple):
    """What an operation reads and writes."""

    reads: list[Part]
    writes: list[Part]

    @property
    def bytes(self) -> int:
        """Of both."""
        return sum(part.bytes for part in [*self.reads, *self.writes])


# Operations that write into an argument without looking at what was there.
_OVERWRITES = words(
    """
    copy fill zero normal uniform bernoulli exponential random _foreach_copy _foreach_zero set
    resize log_normal cauchy geometric
    """
)
_EMPTY = words("empty empty_strided empty_like new_empty new_empty_strided resize")
# Arguments whose shape or dtype alone is looked at.
_SHAPES_ALONE = words(
    """
    zeros_like ones_like full_like rand_like randn_like randint_like empty_like new_empty new_zeros
    new_ones new_full new_empty_strided nll_loss_backward
    """
)
_NOT_READ = {
    **dict.fromkeys(_SHAPES_ALONE, ("self",)),
    "native_layer_norm_backward": ("bias",),
}
# They write into gradients if these have to be unscaled, and only then.
_FUSED_STEPS = words("_fused_sgd _fused_adam _fused_adamw _fused_adagrad")
# Lookups: of this argument as many elements are read as another one has, or the result (None).
_LOOKUPS: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(words("gather index index_select take _unsafe_index"), ("self", None)),
    "embedding": ("weight", None),
    "nll_loss_forward": ("self", "target"),
}
# In place, as many elements are written as are in this argument.
_SCATTERS = {
    **dict.fromkeys(words("scatter scatter_add scatter_reduce"), "src"),
    **dict.fromkeys(words("index_put _index_put_impl"), "values"),
    **dict.fromkeys(words("index_add index_copy"), "source"),
}
_ADDS = words("scatter_add scatter_reduce index_add")


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that are really there: a dimension that is broadcast has one."""
    if tensor.is_sparse:  # of which torch tells none
        return stored_bytes(tensor._indices()) + stored_bytes(tensor._values())
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return int(tensor.nbytes)
    elements, extent = 1, 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 0:
            return 0
        elements *= size if stride else 1
        extent += (size - 1) * stride
    return min(elements, extent) * tensor.element_size()  # windows may overlap


def traffic(op: Op, args: Any, kwargs: Any, out: Any) -> Traffic:
    """What an operation reads and writes.

    Args:
        op: What it is.
        args: Its arguments.
        kwargs: Likewise, by name.
        out: What it gave.
    """
    if op.kind == VIEW:
        return Traffic([], [])
    given = {**dict(zip(op.arguments, args, strict=False)), **kwargs}
    if op.kind == MESSAGE:
        return _message(given, out)
    if op.name == "fsdp.all_gather_copy_in":  # it gives its part of the output, and all of it
        own, _ = out
        return Traffic(list(map(_whole, tensors_of(given["all_gather_inputs"]))), [_whole(own)])
    if op.written and op.base in _SCATTERS:
        return _scatter(op, given)
    return Traffic(list(_reads(op, given, out)), list(_writes(op, given, out)))


def _reads(op: Op, given: dict[str, Any], out: Any) -> Iterator[Part]:
    not_read = _NOT_READ.get(op.base, ())
    overwritten = op.written if op.base in _OVERWRITES else op.written & {"out"}
    seen = set()
    for name, value in given.items():
        if name in not_read or name in overwritten:
            continue
        for tensor in tensors_of(value):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield Part(tensor, _looked_up(op, name, tensor, given, out))


def _looked_up(op: Op, name: str, tensor: Tensor, given: dict[str, Any], out: Any) -> int:
    stored = stored_bytes(tensor)
    table, counted = _LOOKUPS.get(op.base, ("", None))
    if name != table:
        return stored
    elements: int = out.numel() if counted is None else given[counted].numel()
    return min(stored, elements * tensor.element_size())


def _writes(op: Op, given: dict[str, Any], out: Any) -> Iterator[Part]:
    if op.base in _EMPTY:
        return
    unscaled = op.base in _FUSED_STEPS and given.get("grad_scale") is None
    written = op.written - {"grads"} if unscaled else op.written
    seen = set()
    for tensor in tensors_of([[given.get(name) for name in written], out]):
        if id(tensor) not in seen:  # in place, the result is the argument
            seen.add(id(tensor))
            yield Part(tensor, stored_bytes(tensor))


def sent_bytes(op: Op, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that a rank sends in a message, in a ring; those that it gets are as many.

    A gather, or a sum of which each rank keeps a part, takes (n - 1) / n of the whole from each of
    n ranks; a sum that all of them keep is both (Patarasuk and Yuan 2009).

    Args:
        op: What it is.
        args: Its arguments.
        kwargs: Likewise, by name.
        out: What it gave.
    """
    if op.kind != MESSAGE or op.base.startswith(("barrier", "monitored_barrier", "recv")):
        return 0
    given = [*args, *kwargs.values()]
    whole = max(sum(map(stored_bytes, tensors_of(each))) for each in [*given, out])
    if op.base == "send":
        return whole
    ranks = group_size(given)
    rounds = 2 if op.base.startswith(("allreduce", "all_reduce")) else 1
    return rounds * whole * (ranks - 1) // ranks


def _message(given: dict[str, Any], out: Any) -> Traffic:
    """Operations of ``c10d`` do not say what they write: outputs, if they name any, or all."""
    outputs = [value for name, value in given.items() if name.startswith("output")]
    sources = [value for name, value in given.items() if not name.startswith("output")]
    writes = tensors_of(outputs) if outputs else tensors_of(out)
    return Traffic(list(map(_whole, tensors_of(sources))), list(map(_whole, writes)))


def _whole(tensor: Tensor) -> Part:
    return Part(tensor, stored_bytes(tensor))


def _scatter(op: Op, given: dict[str, Any]) -> Traffic:
    target = given["self"]
    source = given.get(_SCATTERS[op.base])
    others = [*tensors_of(given.get("index", given.get("indices"))), *tensors_of(source)]
    elements = (source if isinstance(source, Tensor) else others[0]).numel()
    touched = Part(target, min(stored_bytes(target), elements * target.element_size()))
    reads = list(map(_whole, others))
    adds = op.base in _ADDS or bool(given.get("accumulate"))
    return Traffic([*reads, touched] if adds else reads, [touched])
