"""The operations of a step as they run: FLOPs, bytes, modules, phase and live memory of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_align._compat.torch_autograd import (
    hooks_give_way,
    is_result,
    running_checkpoint,
)
from lightning_align.planner.live_bytes import Held, Saved, Storages
from lightning_align.planner.meta_attention import attention_of_processor
from lightning_align.planner.module_scopes import RECOMPUTE, ModuleScopes, Scope
from lightning_align.planner.op_bytes import Part, traffic
from lightning_align.planner.op_flops import (
    MATRIX_PRODUCTS,
    QUERY,
    UNKNOWN,
    VIEW,
    Op,
    describe,
    pointwise_flops,
    product_flops,
    repeated_flops,
    tensors_of,
)

IS_TRACING = ContextVar("is_tracing", default=False)
_IS_PAUSED = ContextVar("is_paused", default=False)


class Region(NamedTuple):
    """Memory that an operation reads or writes: of which storage, from where on, how much."""

    storage: int
    offset: int
    bytes: int


class Record(NamedTuple):
    """One operation.

    Attributes:
        name: Of it, ``"aten.mm"``.
        kind: What bounds its speed, as ``op_flops`` has it.
        phase: Forward, recompute, backward or optimizer.
        scope: Names of the modules that were called, the innermost last.
        flops: Of products.
        repeated_flops: Those of them that forward has done before.
        pointwise_flops: Of all else.
        bytes: Read and written.
        reads: From where.
        writes: Where to.
        dtype: Of what it computes with.
        tensors: How many it is given, for what is launched once for each.
        made: Bytes of each storage that is new with it.
    """

    name: str
    kind: str
    phase: str
    scope: Scope
    flops: int
    repeated_flops: int
    pointwise_flops: int
    bytes: int
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    dtype: torch.dtype | None
    tensors: int
    made: tuple[int, ...] = ()


@dataclass
class Checkpoint:
    """What a checkpoint ran again.

    Attributes:
        first: Number of the first operation.
        last: Of the last one.
        saved: Tensors that autograd would have saved; the checkpoint's Python is called for each.
    """

    first: int
    last: int
    saved: int


@dataclass
class Trace:
    """What a step did.

    Attributes:
        records: Its operations, in order.
        storages: All memory that they used.
        saved: What autograd holds for backward.
        saved_by: Scope -> numbers of the storages that were saved in it.
        views: Phase and scope -> how many operations made a view, which only costs its call.
        checkpoints: What was recomputed, in order.
        uncounted: Operations whose FLOPs are not known, and how often they ran.
    """

    records: list[Record] = field(default_factory=list)
    storages: Storages = field(default_factory=Storages)
    saved: Held = field(default_factory=Held)
    saved_by: dict[Scope, set[int]] = field(default_factory=dict)
    views: Counter[tuple[str, Scope]] = field(default_factory=Counter)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    uncounted: dict[str, int] = field(default_factory=dict)


@contextmanager
def tracing(model: nn.Module, there: list[Tensor], into: Trace | None = None) -> Iterator[Trace]:
    """Context whose operations are written down.

    Compiled parts run as they were written, because what compilers make of them cannot be seen.

    Args:
        model: Whose modules are named.
        there: Tensors that live from the beginning, used or not; the list is emptied.
        into: A trace that goes on with what runs here, as of a step in several parts; whoever made
            it closes its storages.
    """
    trace, scopes = Trace() if into is None else into, ModuleScopes(model)
    while there:  # not held any longer: gradients of the last step may be let go of meanwhile
        trace.storages.number(there.pop(), was_there=True)
    token = IS_TRACING.set(True)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(scopes.following())
            stack.enter_context(attention_of_processor())
            stack.enter_context(hooks_give_way())
            saving = _Saving(trace, scopes)
            hooks = torch.autograd.graph.saved_tensors_hooks(saving.pack, saving.unpack)
            stack.enter_context(hooks)
            stack.enter_context(_Tracer(trace, scopes))
            yield trace
    finally:
        IS_TRACING.reset(token)
        if into is None:
            trace.storages.close()


@contextmanager
def not_traced() -> Iterator[None]:
    """Context whose operations are no part of the step that is being analysed, if one is."""
    token = _IS_PAUSED.set(True)
    try:
        yield
    finally:
        _IS_PAUSED.reset(token)


class _Saving:
    """Counts what autograd saves, less what was there before the step."""

    def __init__(self, trace: Trace, scopes: ModuleScopes) -> None:
        self._trace, self._scopes = trace, scopes

    def pack(self, tensor: Tensor) -> Tensor | Saved:
        if _IS_PAUSED.get():
            return tensor
        # Inputs are saved before the operation is seen here, results after it: so what is new now
        # is an input that nothing has made.
        number = self._trace.storages.number(tensor, was_there=True)
        if number < 0 or number in self._trace.storages.there:  # a sparse one has none
            return tensor
        self._trace.saved_by.setdefault(self._scopes.current()[1], set()).add(number)
        if is_result(tensor):  # it would hold itself, and live on where no backward lets go of it
            with not_traced():
                tensor = tensor.detach()
        return Saved(self._trace.saved, tensor)

    @staticmethod
    def unpack(held: Tensor | Saved) -> Tensor:
        return held.tensor if isinstance(held, Saved) else held


class _Following:
    """What a mode does with operations.

    It is not in the mode's class, whose method torch would wrap to keep its compiler away, at a
    tenth of the time of an analysis: nothing is compiled while one runs.
    """

    def __init__(self, trace: Trace, scopes: ModuleScopes) -> None:
        super().__init__()
        self._trace, self._scopes = trace, scopes
        self._products: dict[tuple[str, tuple[torch.Size, ...]], int] = {}  # FLOPs by shapes
        self._checkpoint: object = None  # the one that ran last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        op = describe(func)
        if op.kind == QUERY or _IS_PAUSED.get():
            return func(*args, **named)
        if op.kind == VIEW:
            self._trace.views[self._scopes.current()] += 1
            return func(*args, **named)
        if op.kind == UNKNOWN and hasattr(func, "decompose"):
            with cast("TorchDispatchMode", self):  # in inference mode, operations come here whole
                parts = func.decompose(*args, **named)
            if parts is not NotImplemented:
                return parts
        number = self._trace.storages.number
        tensors = tensors_of([args, *named.values()])
        for tensor in tensors:
            number(tensor, was_there=True)
        phase, scope = self._scopes.current()
        known = len(self._trace.storages.sizes)
        out = func(*args, **named)
        for tensor in tensors_of(out):
            tensors.append(tensor)
            number(tensor)
        made = tuple(self._trace.storages.sizes[known:])
        self._write_down(op, phase, scope, args, named, out, _dtype(tensors), made)
        return out

    def _write_down(
        self,
        op: Op,
        phase: str,
        scope: Scope,
        args: Any,
        named: dict[str, Any],
        out: Any,
        dtype: torch.dtype | None,
        made: tuple[int, ...],
    ) -> None:
        moved = traffic(op, args, named, out)
        if op.kind == UNKNOWN:
            self._trace.uncounted[op.name] = self._trace.uncounted.get(op.name, 0) + 1
        is_list = bool(args) and isinstance(args[0], (list, tuple))
        record = Record(
            name=op.name,
            kind=op.kind,
            phase=phase,
            scope=scope,
            flops=self._product_flops(op, args, named, out),
            repeated_flops=repeated_flops(op, args),
            pointwise_flops=pointwise_flops(op, args, out),
            bytes=moved.bytes,
            reads=tuple(map(self._region, moved.reads)),
            writes=tuple(map(self._region, moved.writes)),
            dtype=dtype,
            tensors=len(args[0]) if is_list else 1,
            made=made,
        )
        self._trace.records.append(record)
        if phase == RECOMPUTE:
            self._recompute()

    def _recompute(self) -> None:
        found, number = running_checkpoint(), len(self._trace.records) - 1
        if found is None:  # a module's own way to do so
            return
        if found[0] == self._checkpoint:
            self._trace.checkpoints[-1].last = number
        else:
            self._checkpoint = found[0]
            self._trace.checkpoints.append(Checkpoint(number, number, found[1]))

    def _product_flops(self, op: Op, args: Any, named: dict[str, Any], out: Any) -> int:
        if op.name not in MATRIX_PRODUCTS:
            return product_flops(op, args, named, out)
        # torch's formulas look through all arguments for shapes, which takes as long as all else.
        key = op.name, tuple(each.shape for each in args if isinstance(each, Tensor))
        found = self._products.get(key)
        if found is None:
            found = self._products[key] = product_flops(op, args, named, out)
        return found

    def _region(self, part: Part) -> Region:
        tensor = part.tensor
        number = self._trace.storages.number(tensor)
        offset = 0 if number < 0 else int(tensor.storage_offset()) * tensor.element_size()
        return Region(number, offset, part.bytes)


class _Tracer(_Following, TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True


def _dtype(tensors: list[Tensor]) -> torch.dtype | None:
    """Of inputs, then outputs."""
    return next((t.dtype for t in tensors if t.dtype.is_floating_point), None)
