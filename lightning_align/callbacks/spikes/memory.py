"""What copies of a run's state take on each rank, and whether it is there: asked before they do."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_align._errors import argument_error
from lightning_align.layers.sharding import own_part
from lightning_align.run.protocols import SaysWhatStateTakes

MEMORY = ""  # in the place of a folder
_MOMENTS = 2  # tensors of AdamW's state for each parameter; no optimizer here has more


def check_room(
    trainer: pl.Trainer,
    where: str,
    count: int,
    sizes: Mapping[str, int] | None = None,
    *,
    says: bool = True,
) -> Mapping[str, int]:
    """Say what so many copies of the state take, and refuse them where there is no room.

    Args:
        trainer: Who fits; its optimizers are there.
        where: Who asks, as the message begins.
        count: How many are to be made; a restore takes one more.
        sizes: Bytes of one by folder, where they are known; otherwise they are foreseen.
        says: Whether to say them; where there is no room, the error does.

    Returns:
        Bytes of one.

    Raises:
        ValueError: If memory or disk is smaller, by the bytes.
    """
    ranks = trainer.num_devices  # of this machine, which share both
    sizes = state_nbytes(trainer) if sizes is None else sizes
    for place, nbytes in sizes.items():
        on = "host memory" if place == MEMORY else f"{place} once its weights have changed"
        if says:
            rank_zero_info(
                f"{where}: {count} snapshot(s) are kept, each of about {nbytes:,} bytes of {on} on"
                " each rank."
            )
        left = available_memory() if place == MEMORY else shutil.disk_usage(place).free
        needed = (count + 1) * nbytes * ranks
        if left is not None and needed > left:
            rule = f"{count} snapshot(s) and a restore take {needed:,} bytes of {on}, of {ranks}"
            rule += f" rank(s), and {left:,} are left"
            way_out = "Raise snapshot_every_n_steps, lower rewind_steps, or leave 'rewind' out"
            raise argument_error(where, "snapshots", count, rule, way_out)
    return sizes


def state_nbytes(trainer: pl.Trainer) -> Mapping[str, int]:
    """Bytes of one state on this rank, by folder; ``MEMORY`` is host memory.

    Attributes of the module are left out, and parameters that are not initialized, which only a
    snapshot shows; an optimizer that has not stepped yet is taken for AdamW.
    """
    if isinstance(trainer.strategy, SaysWhatStateTakes):
        return trainer.strategy.state_nbytes()
    module = trainer.lightning_module
    nbytes = _nbytes([*module.parameters(), *module.buffers()])
    for optimizer in trainer.optimizers:
        held = [x for state in optimizer.state.values() for x in _tensors(state)]
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        nbytes += _nbytes(held) if held else _MOMENTS * _nbytes(stepped)
    return {MEMORY: nbytes}


def available_memory() -> int | None:
    """Bytes that this machine, or the control group of this process, has left; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # there may be no limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
        found.append(limit - used + int(statistics["inactive_file"]))
    return min(found, default=None)


def _tensors(state: object) -> list[Tensor]:
    values = state.values() if isinstance(state, Mapping) else []
    return [value for value in values if isinstance(value, Tensor)]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """What they take in memory, those that are tied once, those of other ranks nothing."""
    own = [own_part(x) for x in tensors if _is_plain(x)]
    storages = [x.untyped_storage() for x in own if not x.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _is_plain(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.layout is torch.strided
