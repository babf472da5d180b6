"""One rank fails, all end, and each says who failed first and at what.

A rank that only waits for its peer notices a closed connection at once, and gloo closes it when the
process ends. So a failing rank writes down the cause in the store that the ranks met in, and leaves
the process group, in which nothing could hold up its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import distributed

from lightning_align._compat_torch import default_store

_KEY = "lightning_align.failure"


class PipelineError(RuntimeError):
    """A stage failed, or lost a rank that did."""


def pipeline_error(place: str, error: BaseException) -> PipelineError:
    """The error of this rank, which names the rank that failed first.

    Args:
        place: Rank, stage and micro-batch, in words.
        error: What was raised here.
    """
    cause = error.__cause__ if error.__cause__ is not None else error
    own = f"{place}: {type(cause).__name__}: {cause}"
    first = _first_failure(own)
    if first is None or first == own:
        return PipelineError(own)
    return PipelineError(f"{place} has lost its peer. The failure was at {first}")


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
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _first_failure(own: str) -> str | None:
    """What the first rank that failed has written down, which may be this one."""
    try:
        store = default_store()
        store.set_timeout(timedelta(seconds=3))
        return str(store.compare_set(_KEY, "", own), "utf-8")
    except Exception:  # the store is gone with the rank that held it
        return None
