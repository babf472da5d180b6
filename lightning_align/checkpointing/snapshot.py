"""Copies of a training state in host memory that is allocated once and used again and again.

Fresh memory is what makes a copy slow: the first write to each page costs ten times the copy. So
all tensors of a state go into one block, which is laid out as the file that will be written (see
archive.py), and the layout is kept for as long as the state's tensors stay where they are.

Storage that several tensors share is copied once, and only the bytes that they cover. What shows a
part of a file that stays as it is (``mapped``) is not copied at all: it is read when it is written.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._compat.torch_storage import negative_view, rebuild_with_dtype
from lightning_align._errors import argument_error
from lightning_align.checkpointing.archive import Archive, Reduced, ending, reduce_ex, storage_key
from lightning_align.checkpointing.files import Bytes
from lightning_align.checkpointing.memory import Copies
from lightning_align.checkpointing.structure import cannot_be_saved, place_of
from lightning_align.host_block import HostBlock
from lightning_align.mapped import source_of

_GROWTH = 1.125  # a state that grows at every save is not laid out anew at every save
_WIDEST_DTYPE = 16  # bytes, complex128

# torch leaves these without types.
_Stream: Any = torch.cuda.Stream
_Storage: Any = torch.UntypedStorage

# What the file depends on, but for the tensors' places.
_LOOKS: Any = (*map(attrgetter, ("shape", "dtype", "requires_grad")), Tensor.stride, type)

_AT_A_TIME = 64  # tensors

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


@dataclass
class _Range:
    """Bytes of one storage that one or more tensors cover.

    The storage itself is not kept: it may be large, and freed before the next save.
    """

    address: int  # of the storage
    limit: int = 0  # size of the storage in bytes
    longest: int = -1  # the member that it is of: arrays of NumPy are one storage for each view
    members: list[int] = field(default_factory=list)
    start: int = 0
    stop: int = 0
    is_mapped: bool = False

    @property
    def nbytes(self) -> int:
        """Length of the range."""
        return self.stop - self.start

    def add(self, index: int, tensor: Tensor) -> None:
        """Widen the range by what a tensor covers."""
        start, stop = covered_bytes(tensor)
        if stop > start:
            self.start = min(self.start, start) if self.stop else start
            self.stop = max(self.stop, stop)
        nbytes = tensor.untyped_storage().nbytes()
        if nbytes > self.limit or self.longest < 0:
            self.limit, self.longest = nbytes, index
        self.members.append(index)

    def round_out(self) -> None:
        """Begin and end where any dtype may, if several tensors meet here."""
        if len(self.members) > 1:
            self.start -= self.start % _WIDEST_DTYPE
            self.stop = min(self.stop + -self.stop % _WIDEST_DTYPE, self.limit)

    def shape(self, tensors: list[Tensor]) -> Any:
        """What the layout of the block depends on."""
        places = [(i, covered_bytes(tensors[i])[0] - self.start) for i in self.members]
        return self.nbytes, places

    def is_in(self, tensors: list[Tensor]) -> bool:
        """Whether the tensors still share the storage."""
        storages = [tensors[index].untyped_storage() for index in self.members]
        return {storage.data_ptr() for storage in storages} == {self.address} and (
            max(storage.nbytes() for storage in storages) == self.limit
        )


@dataclass
class _Plan:
    """How a list of tensors lies in a block, and what to do to copy it there."""

    pointers: list[int]
    looks: list[Any]
    odd: list[int]
    bits: list[tuple[bool, bool]]
    ranges: list[_Range]
    shape: list[Any]  # of the ranges
    archive: Archive = field(default_factory=Archive)
    offsets: list[int] = field(default_factory=list)  # of the ranges in the block
    views: list[Tensor] = field(default_factory=list)
    leaves: list[Reduced] = field(default_factory=list)
    copies: Copies = field(default_factory=lambda: Copies([]))
    by_tensor: list[int] = field(default_factory=list)  # tensors that torch copies
    by_range: list[tuple[Tensor, _Range]] = field(default_factory=list)
    mapped: list[Tensor] = field(default_factory=list)  # bytes of the last ranges, not in the block

    def fits(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same tensors, where they were.

        There may be 20,000, a few at a time in the cache; values are compared as they come, because
        keeping lists of so many small objects takes longer than making them.
        """
        return (
            len(tensors) == len(self.pointers)
            and all(self._fits_from(i, tensors) for i in range(0, len(tensors), _AT_A_TIME))
            and _bits(tensors, self.odd) == self.bits
            and all(part.is_in(tensors) for part in self.ranges if len(part.members) > 1)
        )

    def _fits_from(self, start: int, tensors: list[Tensor]) -> bool:
        some = slice(start, start + _AT_A_TIME)
        tensors = tensors[some]
        return all(map(eq, map(Tensor.data_ptr, tensors), self.pointers[some])) and all(
            all(map(eq, map(look, tensors), seen[some]))
            for look, seen in zip(_LOOKS, self.looks, strict=True)
        )


class HostBuffer:
    """One reusable snapshot: the copied tensors of a state, laid out as a file."""

    def __init__(self) -> None:
        self.block: HostBlock | None = None
        self.allocations = 0
        self.layouts = 0
        self._plan: _Plan | None = None
        self._copied: torch.cuda.Event | None = None

    @property
    def plan(self) -> _Plan:
        """Where everything lies; there is one once something was copied."""
        assert self._plan is not None
        return self._plan

    def copy(self, tensors: list[Tensor], state: Any = None) -> int:
        """Copy tensors into the buffer and return how many bytes that were.

        Copies from a CUDA device are still under way when this returns: :meth:`ready` waits.

        Args:
            tensors: What to copy, dense and of any device.
            state: The state that they are from, for messages.
        """
        if self._plan is None or not self._plan.fits(tensors):
            self._lay_out(tensors, state)
        plan = self.plan
        plan.copies.run()
        with torch.no_grad():
            self._copy_by_torch(plan, tensors)
        return sum(part.nbytes for part in plan.ranges[: len(plan.offsets)])

    def ready(self) -> None:
        """Wait until the bytes are in host memory."""
        if self._copied is not None:
            self._copied.synchronize()

    def file(self, structure: Any) -> Iterator[Bytes]:
        """The file of the frozen state, in pieces.

        The pickle comes last in the file and is made last: writing the image does not need the
        interpreter, so the training thread can drop the state that it passed. Freeing a tensor
        gives the interpreter away, and 20,000 times that beside a thread that pickles took 0.4 s.

        Args:
            structure: What :func:`freeze` returned with the tensors that were copied here.
        """
        self.ready()
        assert self.block is not None
        plan, archive = self.plan, self.plan.archive
        yield memoryview(self.block.memory)[: archive.end]
        if plan.mapped:
            archive = Archive(list(archive.entries), archive.end)
        for number, part in enumerate(plan.mapped, len(plan.offsets)):
            yield archive.add(f"data/{number}", len(part))
            yield memoryview(part.numpy())  # type: ignore[arg-type]
        yield from ending(structure, plan.leaves, archive)

    def let_go(self) -> bool:
        """Hold no file any longer; whether it held one, and is empty now."""
        held = self._plan is not None and bool(self._plan.mapped)
        if held:
            self._plan = None
        return held

    def tensor(self, index: int, storages: dict[int, torch.UntypedStorage]) -> Tensor:
        """Copy tensor ``index`` out of the buffer; what a file shows, it goes on showing.

        Args:
            index: Its place in the order in which tensors were met while copying.
            storages: Copies made so far, by address, so that shared storage stays shared.
        """
        view = self.plan.views[index]
        if source_of(view) is not None:
            return view
        storage = view.untyped_storage()
        key = storage.data_ptr() or -1 - index
        if key not in storages:
            storages[key] = _Storage.clone(storage)
        copied = torch.empty(0, dtype=view.dtype)
        copied.set_(storages[key], view.storage_offset(), view.shape, view.stride())
        copied = _with_bits_of(view, copied)
        if isinstance(view, nn.Parameter):
            return nn.Parameter(copied, view.requires_grad)
        return copied.requires_grad_(view.requires_grad)

    def _copy_by_torch(self, plan: _Plan, tensors: list[Tensor]) -> None:
        stream = _side_stream(tensors) if self.block and self.block.pinned else None
        with torch.cuda.stream(stream) if stream else nullcontext():
            if plan.by_tensor:
                to = [plan.views[index] for index in plan.by_tensor]
                source = [tensors[index].detach() for index in plan.by_tensor]
                torch._foreach_copy_(to, source, non_blocking=stream is not None)
            for view, part in plan.by_range:
                storage = tensors[part.longest].untyped_storage()
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                view.copy_(whole[part.start : part.stop], non_blocking=stream is not None)
        self._copied = None
        if stream is not None:
            self._copied = stream.record_event()
            # What trains next may overwrite the tensors: it queues behind the copies.
            torch.cuda.current_stream(stream.device).wait_event(self._copied)
            for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
                if device != stream.device:
                    torch.cuda.synchronize(device)

    def _lay_out(self, tensors: list[Tensor], state: Any) -> None:
        old, self._plan = self._plan, None
        pointers = [tensor.data_ptr() for tensor in tensors]
        looks = [list(map(look, tensors)) for look in _LOOKS]
        odd = [index for index, tensor in enumerate(tensors) if _may_be_odd(tensor)]
        ranges = _ranges(tensors, state)
        shape = [part.shape(tensors) for part in ranges]
        plan = _Plan(pointers, looks, odd, _bits(tensors, odd), ranges, shape)
        in_block = [part for part in ranges if not part.is_mapped]
        plan.ranges = [*in_block, *(part for part in ranges if part.is_mapped)]
        same = old and (looks, plan.bits, shape) == (old.looks, old.bits, old.shape)
        if old and same and len(in_block) == len(ranges) and not old.mapped:
            # Only moved: gradients, say, or a tensor that state_dict() makes anew.
            plan.archive, plan.offsets = old.archive, old.offsets
            plan.views, plan.leaves = old.views, old.leaves
        else:
            self._lay_out_block(plan, tensors, state)
        _choose_copies(plan, tensors)
        self._plan = plan

    def _lay_out_block(self, plan: _Plan, tensors: list[Tensor], state: Any) -> None:
        self.layouts += 1
        archive, headers = plan.archive, []
        for number, part in enumerate(part for part in plan.ranges if not part.is_mapped):
            headers.append((archive.end, archive.add(f"data/{number}", part.nbytes)))
            plan.offsets.append(archive.end - part.nbytes)
        block = self._ensure(archive.end, any(tensor.is_cuda for tensor in tensors))
        for start, header in headers:
            block.memory[start : start + len(header)] = header
        _make_views(plan, tensors, block, state)

    def _ensure(self, nbytes: int, pinned: bool) -> HostBlock:
        block = self.block
        if block is None or block.nbytes < nbytes or block.pinned != pinned:
            regrown = block is not None and block.nbytes < nbytes
            self.block = None  # before the new one is allocated
            block = HostBlock(int(nbytes * _GROWTH) if regrown else nbytes, pinned)
            self.block = block
            self.allocations += 1
        return block


def covered_bytes(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of what a tensor covers of its storage."""
    if not tensor.numel():
        return 0, 0
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (1 + sum((n - 1) * step for n, step in steps)) * size


def _may_be_odd(tensor: Tensor) -> bool:
    """Whether it could be a conjugate, or ``x.conj().imag``, of what is in memory."""
    return tensor.is_complex() or tensor.numel() == 1 or not tensor.is_contiguous()


def _bits(tensors: list[Tensor], indices: list[int]) -> list[tuple[bool, bool]]:
    return [(tensors[index].is_conj(), tensors[index].is_neg()) for index in indices]


def _ranges(tensors: list[Tensor], state: Any) -> list[_Range]:
    """Which bytes to copy: one range for each storage."""
    ranges: dict[Any, _Range] = {}
    for index, tensor in enumerate(tensors):
        storage = tensor.untyped_storage()
        key: Any = (tensor.device, storage.data_ptr()) if tensor.numel() else index
        if key not in ranges:
            ranges[key] = _Range(storage.data_ptr(), is_mapped=source_of(tensor) is not None)
        ranges[key].add(index, tensor)
        if covered_bytes(tensor)[1] > storage.nbytes():
            place, way_out = place_of(state, tensor), "Save it while its values are there"
            rule = f"its storage holds {storage.nbytes()} bytes, and it shows more"
            raise argument_error("SnapshotEngine.save", "state", place, rule, way_out)
    for part in ranges.values():
        part.round_out()
    return list(ranges.values())


def _make_views(plan: _Plan, tensors: list[Tensor], block: HostBlock, state: Any) -> None:
    """A tensor in the block for each tensor of the state, and how it is pickled."""
    plan.views, plan.leaves = [torch.empty(0)] * len(tensors), [Reduced(())] * len(tensors)
    for number, part in enumerate(plan.ranges):
        if part.is_mapped:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensors[part.longest].untyped_storage())
            plan.mapped.append(
                torch.frombuffer(whole.numpy()[part.start : part.stop], dtype=torch.uint8)
            )
            storage = plan.mapped[-1].untyped_storage()
        else:
            storage = block.record(plan.offsets[number], part.nbytes)
        mixed = len({tensors[index].dtype for index in part.members}) > 1
        for index in part.members:
            tensor = tensors[index]
            view = torch.empty(0, dtype=tensor.dtype)
            shift = part.start // tensor.element_size() if tensor.numel() else 0
            begin = tensor.storage_offset() - shift if tensor.numel() else 0
            view = _with_bits_of(tensor, view.set_(storage, begin, tensor.shape, tensor.stride()))
            is_parameter = type(tensor) is nn.Parameter
            try:
                leaf = _reduce(view, number, mixed, tensor.requires_grad and not is_parameter)
            except Exception as error:  # a dtype that torch.save does not know
                raise cannot_be_saved(tensor, state, error) from error
            if is_parameter:
                view = nn.Parameter(view, tensor.requires_grad)
                function, arguments = reduce_ex(view)  # (data, requires_grad, hooks)
                leaf = Reduced((function, (leaf, *arguments[1:])))
            else:
                view.requires_grad_(tensor.requires_grad)
            plan.views[index], plan.leaves[index] = view, leaf


def _with_bits_of(tensor: Tensor, view: Tensor) -> Tensor:
    """Mark a view whose memory holds the conjugate, or the negative, of what it shows."""
    view = view.conj() if tensor.is_conj() else view
    return negative_view(view) if tensor.is_neg() else view


def _reduce(view: Tensor, number: int, mixed: bool, requires_grad: bool) -> Reduced:
    """How torch.save pickles a tensor, with record ``number`` in the place of its storage."""
    function, (storage, offset, shape, stride, _, hooks, *more) = reduce_ex(view)
    nbytes = view.untyped_storage().nbytes()
    if mixed and function is not rebuild_with_dtype:
        # torch.load takes the dtype from the storage, unless it is told one.
        function, storage, more = rebuild_with_dtype, view.untyped_storage(), [view.dtype, *more]
    key = storage_key(storage, number, nbytes)
    return Reduced((function, (key, offset, shape, stride, requires_grad, hooks, *more)))


def _choose_copies(plan: _Plan, tensors: list[Tensor]) -> None:
    """Plain memory where a tensor has a piece of it to itself, else whole ranges, else torch."""
    pieces = []
    for part in plan.ranges:
        first = part.members[0]
        tensor = tensors[first]
        if not part.nbytes or part.is_mapped:
            continue
        on_host = tensor.device.type == "cpu"
        whole = len(part.members) == 1 and tensor.is_contiguous()
        to = plan.views[first].untyped_storage()
        if whole and not on_host:
            plan.by_tensor.append(first)
        elif on_host:
            pieces.append((to.data_ptr(), part.address + part.start, part.nbytes))
        else:
            plan.by_range.append((torch.empty(0, dtype=torch.uint8).set_(to), part))
    plan.copies = Copies(pieces)


def _side_stream(tensors: list[Tensor]) -> torch.cuda.Stream:
    """A stream of the tensors' device that runs beside training, behind what is queued now."""
    device = next(tensor.device for tensor in tensors if tensor.is_cuda)
    if device not in _STREAMS:
        _STREAMS[device] = _Stream(device)
    stream = _STREAMS[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
