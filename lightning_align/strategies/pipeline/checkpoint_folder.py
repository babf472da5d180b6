"""A checkpoint as a folder: every rank writes its own stages, and reads no more than it needs.

What Lightning's ModelParallelStrategy writes, by torch.distributed.checkpoint: tensors under the
names of parameters, so that any number of stages can read them, and ``meta.pt`` with the rest of
the checkpoint. Names of the first level are those that Lightning's ``consolidate_checkpoint`` makes
one file of. ``strategies/distributed_folder.py`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.optim import Optimizer

from lightning_align._errors import argument_error
from lightning_align.run.accumulation import WINDOW_KEY
from lightning_align.strategies import replacing
from lightning_align.strategies.distributed_folder import (
    META_FILE,
    MODEL,
    OPTIMIZER,
    DistributedFolder,
)
from lightning_align.strategies.pipeline.chain import WHERE
from lightning_align.strategies.pipeline.ownership import Ownership
from lightning_align.strategies.pipeline.whole_state import names_of


def module_part(ownership: Ownership) -> dict[str, Any]:
    """What this rank writes of the module's state; of what several ranks have, the first one."""
    state = ownership.module.state_dict()
    name_of = ownership.name_of
    return {key: value for key, value in state.items() if _writes(ownership, name_of(key))}


def optimizer_part(ownership: Ownership, optimizer: Optimizer) -> dict[str, Any]:
    """What this rank writes of the optimizer's state, by name of parameter."""
    state, names = optimizer.state_dict(), names_of(ownership, optimizer)
    named = {names[key] if isinstance(key, int) else key: v for key, v in state["state"].items()}
    mine = {name: entry for name, entry in named.items() if _writes(ownership, name)}
    part: dict[str, Any] = {"state": mine}
    if ownership.rank == 0:
        part["param_groups"] = [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in state["param_groups"]
        ]
    return part


def _writes(ownership: Ownership, name: str) -> bool:
    return ownership.ranks.get(name, [0])[0] == ownership.rank


def save(checkpoint: dict[str, Any], filepath: str, group: Any, write: Callable[..., Any]) -> None:
    """Write the parts of all ranks; collective. An older checkpoint goes once the new one is whole.

    Args:
        checkpoint: Lightning's, with the parts of this rank.
        filepath: The folder, on a file system that all ranks share.
        group: All ranks that hold a part, rank 0 among them.
        write: Called on rank 0 with what torch.distributed.checkpoint does not write, and a path.

    Raises:
        ValueError: If ``filepath`` is a URL, or a folder of something else.
    """
    path, rank = Path(filepath), distributed.get_rank(group)
    if "://" in filepath:
        rule = "a checkpoint of all ranks goes to a folder that they share, not to a URL"
        raise argument_error(WHERE, "filepath", filepath, rule, "Give a path")
    if path.is_dir() and not (path / META_FILE).is_file() and any(path.iterdir()):
        rule = "the folder is in use, and not by a checkpoint that could be replaced"
        raise argument_error(WHERE, "filepath", filepath, rule, "Save under another name")
    parts = {MODEL: checkpoint.pop("state_dict")}
    for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
        parts[f"{OPTIMIZER}{number}"] = state
    if windows := checkpoint.pop(WINDOW_KEY, []):
        parts[WINDOW_KEY] = {str(rank): windows[rank]}
    unfinished = replacing.begin(path) if rank == 0 else replacing.unfinished(path)
    distributed.barrier(group)
    state_dict_saver.save(parts, checkpoint_id=unfinished, process_group=group)
    if rank == 0:
        write(checkpoint, unfinished / META_FILE)
        replacing.end(path)


# Reading


def module_state(folder: DistributedFolder, module: nn.Module) -> dict[str, Any]:
    """Values of what is on this rank, and the rest on meta."""
    state = module.state_dict()
    here = {name for name, value in state.items() if not getattr(value, "is_meta", False)}
    return folder.module_state(here)


def optimizer_state(
    folder: DistributedFolder,
    number: int,
    groups: list[dict[str, Any]],
    ownership: Ownership,
    optimizer: Optimizer,
) -> dict[str, Any]:
    """State of the parameters that are on this rank, by their numbers in this run.

    Args:
        folder: To read from.
        number: Place of the optimizer in what ``configure_optimizers`` returned.
        groups: Its settings, from the outline.
        ownership: Whose parameters are whose.
        optimizer: That of this run, whose groups it must fit.

    Raises:
        ValueError: If its groups hold other parameters than those that were saved.
    """

    def is_wanted(name: str) -> bool:
        return name not in ownership.ranks or ownership.is_here(name)

    return folder.optimizer_state(
        number, groups, optimizer, names_of(ownership, optimizer), is_wanted
    )
