"""Ranks that train one model: what they send each other, and that all send the same.

Messages go through a thread of their own, one after the other, so that those of the next block are
under way while the present one computes. Before each the ranks compare what they are about to do:
ranks that would wait for different things are told so, in place of waiting or of mixing up blocks,
and a rank that cannot take part, as its disk has failed, tells the others.

A gather is a broadcast of each section, a sum a reduction of each: both are in place, where gloo's
``all_gather_into_tensor`` and ``reduce_scatter_tensor`` take new memory and six and four times as
long.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor, distributed, nn

from lightning_align.offload.block import Block
from lightning_align.offload.files import Transfer

_Result = TypeVar("_Result")
_END_S = 2.0  # for what was begun; nobody waits for it any more


class RankError(RuntimeError):
    """Another rank has failed, or is somewhere else."""


class Ranks:
    """The ranks that train one model, seen from this one; without others nothing is sent.

    Args:
        group: They, in a group that nobody else sends messages in; None if there is one rank.

    Attributes:
        rank: Number of this one.
        size: How many there are.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self._group = group
        self._failure: BaseException | None = None
        self._open: set[Future[Any]] = set()
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        # A daemon: what it waits for may never come, and must not hold up the end.
        self._thread = Thread(target=self._work, name="offload-ranks", daemon=True)
        if self.size > 1:
            self._thread.start()
            atexit.register(self._end)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, call = task
            with suppress(InvalidStateError):  # nobody waits for it any more
                try:
                    if self._failure is not None:
                        raise self._failure
                    future.set_result(call())
                except BaseException as error:
                    self._failure = error
                    future.set_exception(error)

    def _start(self, call: Callable[[], _Result]) -> Future[_Result]:
        future: Future[_Result] = Future()
        if self._failure is not None:
            future.set_exception(self._failure)
            return future
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        self._tasks.put((future, call))
        return future

    def _agree(self, what: str, error: BaseException | None = None) -> None:
        """Compare what the ranks are about to do.

        Raises:
            RankError: If it is not the same, or another rank has failed.
            error: What has failed here.
        """
        code = crc32(what.encode())
        told = torch.tensor([code, -code, 0 if error is None else self.rank + 1])
        distributed.all_reduce(told, distributed.ReduceOp.MAX, self._group)
        if error is not None:
            raise error
        if told[2]:
            raise RankError(f"rank {int(told[2]) - 1} has failed; rank {self.rank} was at: {what}")
        if told[0] != -told[1]:
            everyone: list[Any] = [None] * self.size
            distributed.all_gather_object(everyone, what, group=self._group)
            listed = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(everyone))
            raise RankError(
                f"The ranks are at different places ({listed}). Each must call the same blocks in"
                " the same order, as often as the others."
            )

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Around what may fail on one rank: then it fails on all.

        Args:
            what: Name of what it is.

        Raises:
            RankError: If another rank has failed.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        self._start(lambda: self._agree(what, error)).result()

    def leave(self, error: BaseException, wait_s: float) -> None:
        """Let those know that wait for this rank; it takes part in nothing any more.

        Args:
            error: Why.
            wait_s: How long; who is somewhere else meanwhile will find a closed connection.
        """
        wait([self._start(lambda: self._agree("its end", error))], wait_s)
        self._failure = error
        for future in list(self._open):
            with suppress(InvalidStateError):
                future.set_exception(error)
        self.close()

    def close(self) -> None:
        """End the thread when what was begun is done."""
        atexit.unregister(self._end)
        self._tasks.put(None)

    def _end(self) -> None:
        """Let go of the group while there is an interpreter.

        A thread of gloo may still hold a message that was waited for. If it lets go of the last
        reference to a tensor while the interpreter ends, Python stops it, and C++ aborts the
        process.
        """
        self.close()
        self._thread.join(_END_S)
        self._group = None

    # What all ranks get

    def gather(self, what: str, memory: Tensor, own: Transfer | None = None) -> Future[None]:
        """Fill the sections of all ranks.

        Args:
            what: Name of what it is.
            memory: Of which this rank's section is there.
            own: Brings that section; None if it is there.
        """

        def run() -> None:
            error: Exception | None = None
            try:
                if own is not None:
                    own.wait()
            except Exception as failed:
                error = failed
            self._agree(f"the values of {what}", error)
            self._wait(
                distributed.broadcast(part, group_src=rank, group=self._group, async_op=True)
                for rank, part in enumerate(memory.chunk(self.size))
            )

        return self._start(run)

    def mean(self, block: Block, memory: Tensor, present: Tensor) -> Future[Tensor]:
        """Means of gradients over ranks, of which each gets its section.

        Args:
            block: Of which.
            memory: This rank's gradients; they are lost.
            present: For each parameter of the block whether it has a gradient here; becomes
                whether it has one anywhere.
        """

        def run() -> Tensor:
            self._agree(f"the gradients of {block.name}")
            distributed.all_reduce(present, distributed.ReduceOp.MAX, self._group)
            if present.any():
                for dtype, part in block.stretches(slice(0, block.nbytes)):
                    memory[part].view(dtype).mul_(1 / self.size)  # as DDP: first divided, ...
                self._wait(self._reductions(block, memory))  # ... then added up
            return memory[block.section]

        return self._start(run)

    def _reductions(self, block: Block, memory: Tensor) -> Iterator[Any]:
        length = block.section_nbytes
        for rank in range(self.size):
            for dtype, part in block.stretches(slice(rank * length, (rank + 1) * length)):
                numbers = memory[part].view(dtype)
                yield distributed.reduce(numbers, group_dst=rank, group=self._group, async_op=True)

    def share_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Put means over ranks in the place of ``p.grad``, wherever one rank has it."""
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.long)

        def run() -> None:
            self._agree("the gradients of what stays in memory")
            distributed.all_reduce(present, distributed.ReduceOp.MAX, self._group)
            for parameter in (p for p, there in zip(parameters, present, strict=True) if there):
                if parameter.grad is None:
                    parameter.grad = torch.zeros(
                        parameter.shape, dtype=parameter.dtype, device=parameter.device
                    )
                here = parameter.grad.mul_(1 / self.size).cpu()  # messages are of host memory
                distributed.all_reduce(here, group=self._group)
                parameter.grad.copy_(here)

        self._start(run).result()

    def sum(self, what: str, numbers: Tensor) -> Tensor:
        """Sum over ranks, in place.

        Args:
            what: Name of what it is.
            numbers: Of this rank.
        """

        def run() -> Tensor:
            self._agree(what)
            distributed.all_reduce(numbers, group=self._group)
            return numbers

        return numbers if self.size == 1 else self._start(run).result()

    def of_one(self, what: str, numbers: Tensor, rank: int = 0) -> Tensor:
        """What one rank has, in place on the others.

        Args:
            what: Name of what it is.
            numbers: Of this rank.
            rank: Which one's.
        """

        def run() -> Tensor:
            self._agree(what)
            distributed.broadcast(numbers, group_src=rank, group=self._group)
            return numbers

        return numbers if self.size == 1 else self._start(run).result()

    def of_all(self, what: str, own: _Result) -> list[_Result]:
        """What each rank gives, by rank.

        Args:
            what: Name of what it is.
            own: Of this rank; anything that can be pickled.
        """

        def run() -> list[_Result]:
            self._agree(what)
            everyone: list[Any] = [None] * self.size
            distributed.all_gather_object(everyone, own, group=self._group)
            return everyone

        return [own] if self.size == 1 else self._start(run).result()

    def _wait(self, works: Iterable[Any]) -> None:
        for work in list(works):
            work.wait()
