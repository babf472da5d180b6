"""One rank fails, all end, and each says who failed first and at what.

A rank that only waits for its peer notices a closed connection at once, and gloo closes it when the
process ends. So a failing rank writes down the cause in the store that the ranks met in, and leaves
the process group, in which nothing could hold up its end. That store lives in the process of rank
0 and ends with it, so the last rank holds a second one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed

from lightning_align._compat.torch_modules import default_store

_KEY = "lightning_align.failure"
_ADDRESS = "lightning_align.second_store"

# Like torch's default group, which it goes with, it belongs to the process.
_second_store: Any = None


class PipelineError(RuntimeError):
    """A stage failed, or lost a rank that did."""


def pipeline_error(place: str, error: BaseException) -> PipelineError:
    """The error of this rank, which names the rank that failed first.

    Args:
        place: Rank, stage and micro-batch, in words.
        error: What was raised here.
    """
    cause = error.__cause__ if error.__cause__ is not None else error
    first = first_failure(place, cause)
    if first is None:
        return PipelineError(f"{place}: {type(cause).__name__}: {cause}")
    return PipelineError(f"{place} has lost its peer. The failure was at {first}")


def first_failure(place: str, error: BaseException) -> str | None:
    """What has failed first, if that was elsewhere; otherwise others are told of this.

    Args:
        place: Rank and step, in words.
        error: What was raised here.
    """
    own = f"{place}: {type(error).__name__}: {error}"
    first = _first_failure(own)
    return None if first == own else first


@contextmanager
def failing_together(group: distributed.ProcessGroup) -> Iterator[None]:
    """Around what may refuse on one rank: then all ranks of the group raise its error; collective.

    Raises:
        ValueError: What was raised here, or the first that was raised elsewhere.
    """
    error: ValueError | None = None
    try:
        yield
    except ValueError as own:
        error = own
    told: list[str | None] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(told, error and str(error), group=group)
    first = next((text for text in told if text is not None), None)
    if first is not None:
        raise error or ValueError(first)


def leave() -> None:
    """Leave the process group, so that no collective operation holds up the end."""
    global _second_store
    _second_store = None
    if distributed.is_initialized():
        distributed.destroy_process_group()


def end_together(rank: int) -> None:
    """At the end of a run: wait until it has ended well on all ranks; collective.

    The hooks of the end do without the other ranks. One that fails there would leave them, and so
    the exit code of the script, none the wiser: now each has the first failure as a PipelineError.
    """
    if not distributed.is_initialized():
        return
    try:
        distributed.barrier()
    except RuntimeError as error:
        raise pipeline_error(f"rank {rank}, at the end of the run", error) from error


def keep_second_store(host: str, num_nodes: int) -> None:
    """Open the store that outlives rank 0, where one address serves all ranks; collective."""
    global _second_store
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if _second_store is not None or size == 1 or num_nodes > 1:
        return
    last = rank == size - 1
    port = 0 if last else int(default_store().get(_ADDRESS))
    store: Any = distributed.TCPStore  # type: ignore[attr-defined]
    _second_store = store(host, port, is_master=last, wait_for_workers=False)
    if last:
        default_store().set(_ADDRESS, str(_second_store.port))
    distributed.barrier()  # it must be there until all have found it


def _first_failure(own: str) -> str | None:
    """What the first rank that failed has written down, which may be this one."""
    told = []
    stores: list[Callable[[], Any]] = [default_store, lambda: _second_store]
    for opened in stores:
        try:
            store = opened()
            store.set_timeout(timedelta(seconds=3))
            told.append(str(store.compare_set(_KEY, "", own), "utf-8"))
        except Exception:  # noqa: PERF203  # gone with the rank that held it, or never there
            continue
    # A rank that another took along writes where the first could not any more.
    return next((text for text in told if text != own), told[0] if told else None)
