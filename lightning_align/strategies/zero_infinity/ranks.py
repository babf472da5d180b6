"""Ranks that train one model: how they meet, go on from one step, and end together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed, nn

from lightning_align._errors import add_note
from lightning_align.durable import sync_path
from lightning_align.offload.ranks import Ranks
from lightning_align.offload.record import BEFORE, FILE, read_record
from lightning_align.strategies import failure, launching
from lightning_align.strategies.zero_infinity.blocks import WHERE

if TYPE_CHECKING:
    from lightning_align.strategies.zero_infinity.strategy import ZeROInfinityStrategy

_FAREWELL_S = 5.0  # until then one that computes comes to its next message; then it is cut off


def join(strategy: ZeROInfinityStrategy) -> None:
    """Let the ranks be one group; collective. One that is alone needs none: it would bar forks."""
    if strategy.is_distributed:
        launching.join_ranks(strategy)
        if strategy.ranks.size == 1:
            # Nobody else may send messages in it, or they would be taken for others.
            # What is sent is in host memory, also where a device computes and has a backend.
            backend = None if strategy.root_device.type == "cpu" else "gloo"
            group = distributed.new_group(timeout=strategy.timeout, backend=backend)
            strategy.ranks = Ranks(group)


def persistent_buffers(module: nn.Module) -> list[str]:
    """Names of what training may change beside parameters, such as running means."""
    named, state = dict(module.named_buffers()), module.state_dict(keep_vars=True)
    return [name for name, buffer in named.items() if state.get(name) is buffer]


def share_buffers(strategy: ZeROInfinityStrategy) -> None:
    """Give all ranks the buffers of the first, as DDP does before a forward; collective."""
    module = strategy.lightning_module
    if module is None or strategy.ranks.size == 1:
        return
    buffers = [module.get_buffer(name) for name in strategy._buffers]
    works: list[Any] = [distributed.broadcast(each, 0, async_op=True) for each in buffers]
    for work in works:
        work.wait()


# Steps that were committed


def is_committed(folders: list[Path]) -> bool:
    """Whether all ranks of this machine have a step; their first may have been cut off.

    Args:
        folders: Of these ranks.
    """
    have = [(folder / FILE).is_file() for folder in folders]
    if all(have) or not any(have):
        return all(have)
    begun = all(folder.is_dir() for folder in folders)
    first = all(read.ranks == len(folders) for folder in folders if (read := read_record(folder)))
    # With another number of ranks, or a drive that is not there, it is no first step.
    return not (begun and first and not any((folder / BEFORE).exists() for folder in folders))


def return_to_common_step(folder: Path, ranks: Ranks) -> None:
    """Take a commit back that not all ranks have come to; collective.

    A kill between the renamings of two ranks leaves one of them a step ahead. What the step before
    it has written is untouched, as nobody goes on before all have come to a step. Commits have
    numbers of their own, for that of a step is smaller behind a rewind.

    Args:
        folder: Of this rank.
        ranks: All of them.

    Raises:
        ValueError: If ranks have no step in common.
    """
    what = "the step that was committed"
    with ranks.together(what):
        record = read_record(folder)
    own = None if record is None else (record.step, record.ranks, record.number)
    everyone = ranks.of_all(what, own)
    steps = [each[0] for each in everyone if each is not None]
    counts = {each[1] for each in everyone if each is not None}
    if record is None or len(steps) < ranks.size or counts != {ranks.size}:
        raise ValueError(
            f"{WHERE}: {len(steps)} of {ranks.size} ranks have a step in {folder.parent}, which"
            f" {', '.join(map(str, counts))} rank(s) have committed. Go on with as many, or from a"
            " checkpoint, which any number of ranks can read. Nothing was touched there."
        )
    number, step = min((each[2], each[0]) for each in everyone if each is not None)
    with ranks.together(what):
        if record.number > number:
            before = read_record(folder, BEFORE)
            if before is None or before.number != number:
                raise ValueError(
                    f"{WHERE}: the ranks have committed steps {steps}, and in {folder} there is no"
                    f" step {step} any more. Go on from a checkpoint, with overwrite=True."
                )
            (folder / BEFORE).replace(folder / FILE)
            sync_path(folder)


# The end


def end_together(strategy: ZeROInfinityStrategy, error: BaseException) -> None:
    """Let other ranks know of an error here, and add to it what has failed before elsewhere.

    Args:
        strategy: Whose run ends.
        error: Why.
    """
    if strategy.ranks.size == 1:
        return
    module = strategy.lightning_module
    step = 0 if module is None or module._trainer is None else module.trainer.global_step
    place = f"rank {strategy.global_rank}, after step {step}"
    first = failure.first_failure(place, error)
    if first is not None:
        add_note(error, f"{WHERE}: {place} has lost its peer. The failure was at {first}")
    strategy.ranks.leave(error, _FAREWELL_S)
    strategy.ranks = Ranks()
