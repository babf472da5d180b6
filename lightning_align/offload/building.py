"""A module that is built without being in memory: a few of its parameters are, the others on disk.

A parameter is taken over as it is registered, before anything is drawn into it, and leaves memory
when others need the room. Whoever uses it later, to draw its values (``apply(_init_weights)``,
``post_init``), to tie, copy, load or read it, finds it there: it comes back by itself (``away``).
So code that builds modules runs as it always does, with the same draws in the same order, and what
it makes is the same to the bit.

deepspeed's ``zero.Init`` does this module by module, as constructors end; what is drawn into other
modules later needs a context there.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from lightning_align._compat.glibc_memory import give_back_freed
from lightning_align._compat.torch_storage import is_shared_with_others
from lightning_align.offload.away import Away, come_back, go_away
from lightning_align.offload.buffers import BufferPool
from lightning_align.offload.files import DirectFile, Threads
from lightning_align.offload.places import aligned

_PIECE = 4 << 20  # bytes that are copied to be written


class _Place(NamedTuple):
    offset: int
    room: int  # bytes that are reserved there
    digest: bytes  # of what is there


class Building:
    """Where parameters are until a store takes them over.

    Args:
        folder: Where to put a file that has no name, so that nothing is left of it; it is made.
        budget: Bytes of parameters to have in memory; the one that is used always is.
        direct_io: Whether to go past the page cache.

    Attributes:
        close: Deletes the file; happens by itself when nobody has the parameters any more.
    """

    def __init__(
        self, folder: Path, budget: int, direct_io: bool | Literal["auto"] = "auto"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._threads = Threads(direct_io=direct_io)
        self._process = os.getpid()
        descriptor, path = tempfile.mkstemp(dir=folder, prefix="building-")
        os.close(descriptor)
        self._file = DirectFile(Path(path), self._threads)
        Path(path).unlink()
        self.close = weakref.finalize(self, _close, self._file, self._threads)
        self._end = 0
        self._budget = budget
        self._pool = BufferPool(budget + 2 * _PIECE)
        # Parameter -> its place; None before it was written.
        self._places: Any = WeakIdKeyDictionary()
        self._freed = 0  # bytes since memory was given back
        self._here: Any = WeakIdKeyDictionary()  # parameter -> its bytes; those that are in memory

    @contextmanager
    def taking_over(self) -> Iterator[None]:
        """Take over parameters as they are registered; at the end none is in memory."""
        module: Any = nn.Module
        kind: Any = nn.Parameter
        register, make, copy = (
            module.register_parameter,
            vars(kind)["__new__"],
            kind.__deepcopy__,
        )

        def register_here(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None:
                self.take_over(parameter)

        def copy_here(parameter: nn.Parameter, memo: Any) -> nn.Parameter:
            copied: nn.Parameter = copy(parameter, memo)
            self.take_over(copied)
            return copied

        def make_here(cls: Any, data: Any = None, *args: Any, **kwargs: Any) -> nn.Parameter:
            if isinstance(data, Away):  # of which torch would make one that is away, too
                away: Any = data
                self.bring([away])
            made: nn.Parameter = make(cls, data, *args, **kwargs)
            return made

        give_back_freed()  # what is freed from now on goes back to the system
        module.register_parameter = register_here
        kind.__new__, kind.__deepcopy__ = staticmethod(make_here), copy_here
        try:
            yield
        finally:
            module.register_parameter = register
            kind.__new__, kind.__deepcopy__ = make, copy
        self._make_room(0)

    def take_over(self, parameter: nn.Parameter) -> None:
        """Have a parameter in memory only while it is used; nothing on meta, and no integers."""
        is_known = parameter in self._places or isinstance(parameter, Away)
        if is_known or is_lazy(parameter) or parameter.device.type != "cpu":
            return
        if not parameter.is_floating_point() or not parameter.numel():
            return
        self._places[parameter] = None
        self._here[parameter] = _nbytes(parameter)
        self._make_room(self._budget, using=[parameter])

    def empty_like(self, like: nn.Parameter) -> nn.Parameter:
        """A parameter that is away, and NaN until it is given values.

        Args:
            like: On whatever device; its shape, dtype and whether it is trained are taken.
        """
        one = torch.empty((), dtype=like.dtype, device="cpu")
        parameter = nn.Parameter(one.expand(like.shape), like.requires_grad)
        self._places[parameter] = None
        self._send_away(parameter)
        return parameter

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave parameters as they are now: they have become somebody else's."""
        for parameter in parameters:
            self._places.pop(parameter, None)
            self._here.pop(parameter, None)

    @property
    def is_empty(self) -> bool:
        """Whether it has no parameters."""
        return not len(self._places)

    @torch.no_grad()
    def bring(self, parameters: list[nn.Parameter]) -> None:
        """Bring parameters into memory.

        Args:
            parameters: What is used now; those that are in memory already stay.
        """
        for parameter in parameters:
            if parameter in self._places and parameter not in self._here:
                nbytes, place = _nbytes(parameter), self._places[parameter]
                self._here[parameter] = nbytes
                self._make_room(self._budget, using=parameters)
                memory = self._pool.take(aligned(nbytes))
                values = memory[:nbytes].view(parameter.dtype).view(parameter.shape)
                if place is None:
                    values.fill_(torch.nan)
                else:
                    self._open_file().read(memory, place.offset).wait()
                come_back(parameter, values)

    @torch.no_grad()
    def _make_room(self, budget: int, using: Iterable[nn.Parameter] = ()) -> None:
        """Let go what came first, unless it is used."""
        excess = sum(self._here.values()) - budget
        kept = {id(parameter) for parameter in using}
        for parameter, nbytes in list(self._here.items()):
            if excess <= 0:
                break
            # A view that somebody holds must go on to be one.
            if id(parameter) not in kept and not is_shared_with_others(parameter):
                self._let_go(parameter)
                excess -= nbytes
        if not budget:
            self._pool.trim()

    def _let_go(self, parameter: nn.Parameter) -> None:
        del self._here[parameter]
        nbytes, place = _nbytes(parameter), self._places[parameter]
        values = parameter.detach().contiguous().view(-1).view(torch.uint8)
        array: Any = values.numpy()
        digest = xxhash.xxh3_128_digest(array)
        if place is None or place.digest != digest:  # what was only read is on disk
            if place is None or place.room < nbytes:
                place = _Place(self._end, aligned(nbytes), b"")
                self._end += place.room
            self._places[parameter] = place._replace(digest=digest)
            self._write(values, place.offset)
        self._send_away(parameter)
        self._freed += nbytes
        if self._freed > self._budget:  # what has found a hole in the heap leaves one there
            give_back_freed()
            self._freed = 0

    def _write(self, values: Tensor, offset: int) -> None:
        for start in range(0, len(values), _PIECE):
            part = values[start : start + _PIECE]
            memory = self._pool.take(aligned(len(part)))
            memory[: len(part)].copy_(part)
            self._open_file().write(memory, offset + start).wait()

    def _send_away(self, parameter: nn.Parameter) -> None:
        nan = torch.full((), torch.nan, dtype=parameter.dtype)
        go_away(parameter, "of a module that is built", nan.expand(parameter.shape), self.bring)

    def _open_file(self) -> DirectFile:
        if self._process != os.getpid():  # a fork takes no threads along
            self._process = os.getpid()
            self._threads.start()
        return self._file


def _nbytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _close(file: DirectFile, threads: Threads) -> None:
    file.close()
    threads.close()
