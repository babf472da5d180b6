"""The mode that sees each operation of a step, and takes of it what is gone afterwards.

A step has thousands of operations, of a few dozen kinds: the same function on tensors of the same
shapes, strides and dtypes. What follows from these (FLOPs, bytes, what is read and written) is
worked out at the first of a kind. Of each operation only its place, the storages of its tensors and
their offsets are noted, while the tensors live; ``write_down`` makes records of the notes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_align._compat.torch_autograd import running_checkpoint
from lightning_align._compat.torch_modules import without_frame
from lightning_align.planner.module_scopes import RECOMPUTE, ModuleScopes, Scope
from lightning_align.planner.op_bytes import Part, sent_bytes, traffic
from lightning_align.planner.op_flops import (
    BY_SHAPES,
    MESSAGE,
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
from lightning_align.planner.records import Checkpoint, Record, Region, Trace

IS_PAUSED = ContextVar("is_paused", default=False)

Place: TypeAlias = tuple[str, Scope]  # phase and modules
# Of each tensor in turn, arguments before results: number of its storage, offset in elements.
Seen: TypeAlias = list[Any]
# What tensors without strides or storage raise, and sizes without a value as part of a key.
_NOT_DENSE = (NotImplementedError, RuntimeError, TypeError)


_UNPACKS = "fsdp.split_with_sizes_copy"  # what was gathered, into the parameters of a block
_MOST_KINDS = 2**14


class Touched(NamedTuple):
    """What an operation reads or writes: where ``Seen`` has it, bytes of an element, how much."""

    place: int
    itemsize: int
    bytes: int


class Work(NamedTuple):
    """What all operations of one kind have in common, as ``Record`` has it.

    ``looked_at`` is how much of ``Seen`` is theirs.
    """

    name: str
    kind: str
    flops: int
    repeated_flops: int
    pointwise_flops: int
    bytes: int
    reads: tuple[Touched, ...]
    writes: tuple[Touched, ...]
    dtype: torch.dtype | None
    tensors: int
    sent: int
    looked_at: int


class Call(NamedTuple):
    """An operation as it was called."""

    op: Op
    args: tuple[Any, ...]
    named: dict[str, Any]
    out: Any

    @property
    def given(self) -> list[Any]:
        """All arguments."""
        return [*self.args, *self.named.values()]

    @property
    def new(self) -> Any:
        """What it gave, unless that is its argument, as it is in place."""
        return None if self.args and self.out is self.args[0] else self.out


class _Following:
    """What a mode does with operations.

    It is not in the mode's class, whose method torch would wrap to keep its compiler away, at a
    tenth of the time of an analysis: nothing is compiled while one runs. What runs for each
    operation is written for speed: many kernels take no longer than some lines of Python.
    """

    def __init__(self, trace: Trace, scopes: ModuleScopes) -> None:
        super().__init__()
        self._trace, self._storages, self._current = trace, trace.storages, scopes.current
        # By id of a function, which the value holds.
        self._ops: dict[int, tuple[Op, str, Any, Any]] = {}
        self._notes: list[Any] = []  # work, place, bytes made and Seen of one after the other
        self._count = len(trace.records)
        self._views: list[Place] = []
        self._checkpoint: object = None  # the one that ran last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if types and any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it takes the operation apart, into what this rank does
        known = self._ops.get(id(func))
        if known is None:
            op = describe(func)
            known = self._ops[id(func)] = op, op.kind, without_frame(func), func
        op, kind, call, _ = known
        if kind == QUERY or IS_PAUSED.get():
            return func(*args, **(kwargs or {}))
        if kind == VIEW:
            self._views.append(self._current())
            return call(*args, **kwargs) if kwargs else call(*args)
        if kind == UNKNOWN:
            if hasattr(func, "decompose"):
                with cast("TorchDispatchMode", self):  # in inference mode, they come here whole
                    parts = func.decompose(*args, **(kwargs or {}))
                if parts is not NotImplemented:
                    return parts
            self._trace.uncounted[op.name] = self._trace.uncounted.get(op.name, 0) + 1
        place = self._current()
        out = call(*args, **kwargs) if kwargs else call(*args)
        storages = len(self._storages.sizes)
        try:
            is_noted = self._note(op, place, args, kwargs, out)
        except _NOT_DENSE:
            is_noted = False
        if not is_noted:
            self._note_with_care(Call(op, args, kwargs or {}, out), place, storages)
        self._count += 1
        if place[0] is RECOMPUTE:
            self._recompute()
        return out

    def _note(self, op: Op, place: Place, args: Any, named: Any, out: Any) -> bool:
        """Whether it was noted: where tensors are dense and in no lists, as most are."""
        numbers, follow = self._storages.numbers, self._storages.follow
        key: list[Any] = [id(op)]  # all that its work follows from
        seen: Seen = []
        is_shared = False
        for value in (*args, *named.values()) if named else args:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                number = numbers.get(storage._cdata)
                if number is None:
                    number = follow(storage, True)
                elif number in seen:  # if by chance it is an offset, that does no harm
                    is_shared = True
                seen += (number, value.storage_offset())
                key += (value.shape, value.stride(), value.dtype)
            elif value is None or value is True or value is False:
                key.append(value)
            elif isinstance(value, (list, tuple)) and _has_tensors(value):
                return False
        made: tuple[int, ...] = ()
        if not args or out is not args[0]:  # as it is in place
            if not isinstance(out, Tensor):
                return False
            storage = out.untyped_storage()
            number = numbers.get(storage._cdata)
            if number is None:
                number = follow(storage, False)
                made = (self._storages.sizes[number],)
            else:
                is_shared = True
            seen += (number, out.storage_offset())
            key += (out.shape, out.stride(), out.dtype, 1)
        if is_shared:
            key += _equals((*args, *named.values(), out) if named else (*args, out))
        if named:
            key += named
        work = _WORKS.get(tuple(key))
        if work is None:
            work = _work_of(Call(op, args, named or {}, out), tuple(key))
        self._notes += (work, place, made, *seen)
        return True

    def _note_with_care(self, call: Call, place: Place, known: int) -> None:
        """Note whatever tensors there are; storages from ``known`` on are new here."""
        number, sizes, there = self._storages.number, self._storages.sizes, self._storages.there
        if call.op.name == _UNPACKS:
            for tensor in tensors_of(call.named["out"]):
                self._storages.follow_size(tensor)
        elif call.op.kind == MESSAGE:
            self._storages.look()
        seen: Seen = []
        for tensor in tensors_of(call.given):
            seen += (number(tensor, was_there=True), _offset(tensor))
        for tensor in tensors_of(call.new):
            seen += (number(tensor), _offset(tensor))
        made = tuple(sizes[each] for each in range(known, len(sizes)) if each not in there)
        key: list[Any] = [id(call.op), tuple(call.named)]
        held: list[Any] = []
        try:
            _add_shapes([call.given, call.new], key, held)
            key += _equals(held)
            work = _WORKS.get(tuple(key)) or _work_of(call, tuple(key))
        except _NOT_DENSE:
            work = _work_of(call, None)
        self._notes += (work, place, made, *seen)

    def _recompute(self) -> None:
        found, number = running_checkpoint(), self._count - 1
        if found is None:  # a module's own way to do so
            return
        if found[0] == self._checkpoint:
            self._trace.checkpoints[-1].last = number
        else:
            self._checkpoint = found[0]
            self._trace.checkpoints.append(Checkpoint(number, number, found[1]))

    def write_down(self) -> None:
        """Make records of what was noted."""
        self._trace.views.update(self._views)
        collects = gc.isenabled()
        gc.disable()  # which would look through thousands of tuples, none of which is in a cycle
        try:
            self._trace.records += self._records()
        finally:
            if collects:
                gc.enable()

    def _records(self) -> Iterator[Record]:
        notes, at = self._notes, 0
        while at < len(notes):
            work, (phase, scope), made = notes[at : at + 3]
            (
                name,
                kind,
                flops,
                repeated,
                pointwise,
                moved,
                reads,
                writes,
                dtype,
                tensors,
                sent,
                n,
            ) = work
            at += 3
            own = [_new(Region, (notes[at + i], notes[at + i + 1] * z, b)) for i, z, b in reads]
            new = [_new(Region, (notes[at + i], notes[at + i + 1] * z, b)) for i, z, b in writes]
            counts = name, kind, phase, scope, flops, repeated, pointwise, moved
            yield _new(Record, (*counts, tuple(own), tuple(new), dtype, tensors, made, sent))
            at += n


class Tracer(_Following, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context whose operations are noted, for ``write_down``.

    Args:
        trace: Where to.
        scopes: Which modules they belong to.
    """

    supports_higher_order_operators = True


_new: Any = tuple.__new__  # half of the time of a call of the class


# Work by all that it follows from; of this process, as steps are analysed again and again.
_WORKS: dict[tuple[Any, ...], Work] = {}


def _work_of(call: Call, key: tuple[Any, ...] | None) -> Work:
    """Of a kind of operations that is new here, which is kept if there is a ``key``."""
    op, args, named, out = call
    tensors = [*tensors_of(call.given), *tensors_of(call.new)]
    places = {id(tensor): place for place, tensor in reversed(list(enumerate(tensors)))}
    moved = traffic(op, args, named, out)

    def touched(parts: Sequence[Part]) -> tuple[Touched, ...]:
        return tuple(
            Touched(2 * places[id(each.tensor)], each.tensor.element_size(), each.bytes)
            for each in parts
        )

    is_list = bool(args) and isinstance(args[0], (list, tuple))
    work = Work(
        name=op.name,
        kind=op.kind,
        flops=product_flops(op, args, named, out),
        repeated_flops=repeated_flops(op, args),
        pointwise_flops=pointwise_flops(op, args, out),
        bytes=moved.bytes,
        reads=touched(moved.reads),
        writes=touched(moved.writes),
        dtype=next((t.dtype for t in tensors if t.dtype.is_floating_point), None),
        tensors=len(args[0]) if is_list else 1,
        sent=sent_bytes(op, args, named, out),
        looked_at=2 * len(tensors),
    )
    if op.kind == MESSAGE:  # a group is no part of the key
        return work
    if key is not None and (op.formula is None or op.name in BY_SHAPES):
        if len(_WORKS) >= _MOST_KINDS:
            _WORKS.clear()
        _WORKS[key] = work
    return work


def _offset(tensor: Tensor) -> int:
    try:
        return int(tensor.storage_offset())
    except _NOT_DENSE:
        return 0


def _add_shapes(value: Any, key: list[Any], held: list[Any]) -> None:
    """Add what is told of tensors to ``key``, and themselves to ``held``."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:  # whose shape does not tell how much is stored
            raise NotImplementedError
        held.append(value)
        key += (value.shape, value.stride(), value.dtype)
    elif value is None or value is True or value is False:
        key.append(value)
    elif isinstance(value, (list, tuple)) and _has_tensors(value):
        key.append(len(value))
        for each in value:
            _add_shapes(each, key, held)


def _equals(values: Sequence[Any]) -> Iterator[int]:
    """Which are the same: a tensor that is given twice is read once, its parts are not."""
    each = [*map(id, values)]
    if len(each) < 10:
        return map(each.index, each)
    first: dict[int, int] = {}
    return (first.setdefault(value, place) for place, value in enumerate(each))


def _has_tensors(values: Sequence[Any]) -> bool:
    """Whether they may be tensors, or have some; sizes and scalars do not."""
    return bool(values) and type(values[0]) not in (int, float)
