"""A checkpoint as a folder: every rank writes its own stages, and reads no more than it needs.

What Lightning's ModelParallelStrategy writes, by torch.distributed.checkpoint: tensors under the
names of parameters, so that any number of stages can read them, and ``meta.pt`` with the rest of
the checkpoint. Names of the first level are those that Lightning's ``consolidate_checkpoint`` makes
one file of. Reading is in two parts, for Lightning restores before a strategy is set up: first an
outline, in which tensors have shapes and no values, then the values of what has come to this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.optim import Optimizer

from lightning_align._compat import torch_dcp
from lightning_align._errors import argument_error
from lightning_align.run.accumulation import WINDOW_KEY
from lightning_align.strategies import replacing
from lightning_align.strategies.pipeline.chain import WHERE
from lightning_align.strategies.pipeline.ownership import Ownership
from lightning_align.strategies.pipeline.whole_state import names_of

META_FILE = "meta.pt"
_MODEL, _OPTIMIZER = "model", "optimizer_"


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
    parts = {_MODEL: checkpoint.pop("state_dict")}
    for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
        parts[f"{_OPTIMIZER}{number}"] = state
    if windows := checkpoint.pop(WINDOW_KEY, []):
        parts[WINDOW_KEY] = {str(rank): windows[rank]}
    unfinished = replacing.begin(path) if rank == 0 else replacing.unfinished(path)
    distributed.barrier(group)
    state_dict_saver.save(parts, checkpoint_id=unfinished, process_group=group)
    if rank == 0:
        write(checkpoint, unfinished / META_FILE)
        replacing.end(path)


def is_one(path: Path) -> bool:
    """Whether there is a checkpoint of all ranks, whole or damaged."""
    return (path / META_FILE).is_file() and (path / torch_dcp.INDEX_FILE).is_file()


class DistributedCheckpoint:
    """A folder to read from.

    Args:
        path: The folder, as it was given to ``save``.

    Raises:
        ValueError: If it was not written to its end, or files are missing or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in (META_FILE, torch_dcp.INDEX_FILE):
            if not (path / name).is_file():
                rule = f"the folder is no checkpoint that was written to its end: no {name} in it"
                raise self._error(rule, "Give a file, or a folder that a run has saved")
        try:
            self._index = torch_dcp.read_index(path)
        except torch_dcp.UnreadableError as error:
            raise self._unreadable_error(error) from None
        files = [(path / name, size) for name, size in torch_dcp.files(self._index).items()]
        damaged = [f.name for f, size in files if not f.is_file() or f.stat().st_size < size]
        if damaged:
            rule = f"{len(damaged)} of its files are missing or cut off, first {min(damaged)}"
            raise self._error(rule, "Copy the whole folder to where all ranks see it")

    def _error(self, rule: str, way_out: str) -> ValueError:
        return argument_error(WHERE, "ckpt_path", str(self.path), rule, way_out)

    def _unreadable_error(self, error: Exception) -> ValueError:
        rule = f"its files cannot be read as plain data ({error})"
        return self._error(rule, "Give another checkpoint")

    def _read(self, wanted: Callable[[list[Any]], bool]) -> dict[str, Any]:
        """Nested values whose names, from the first level on, are wanted."""
        names = torch_dcp.names(self._index)
        keys = [key for key, levels in names.items() if wanted(list(levels))]
        try:
            return torch_dcp.read(self.path, self._index, keys)
        except torch_dcp.UnreadableError as error:
            raise self._unreadable_error(error) from None

    # Before the set-up.

    def outline(self, rank: int) -> dict[str, Any]:
        """Entries of Lightning's checkpoint: tensors on meta, and optimizers without their state.

        Args:
            rank: Whose open accumulation window is read; those of others are empty.
        """
        entries: dict[str, Any] = {"state_dict": self._on_meta()}
        if optimizers := self._param_groups():
            entries["optimizer_states"] = [
                {"state": {}, "param_groups": _numbered(groups)} for groups in optimizers
            ]
        mine = self._read(lambda levels: levels[:2] == [WINDOW_KEY, str(rank)])
        every = torch_dcp.names(self._index).values()
        ranks = {levels[1] for levels in every if levels[0] == WINDOW_KEY}
        nothing: dict[str, Any] = {"gradients": {}, "sums": {}}
        windows = {str(rank): nothing, **mine.get(WINDOW_KEY, {})}
        each = [windows.get(str(number), {}) for number in range(len(ranks))]
        entries[WINDOW_KEY] = [{**nothing, **window} for window in each]
        return entries

    def _on_meta(self) -> dict[str, Any]:
        names = torch_dcp.names(self._index).items()
        model = {levels[1]: key for key, levels in names if levels[0] == _MODEL}
        return {name: torch_dcp.on_meta(self._index, key) for name, key in model.items()}

    def _param_groups(self) -> list[list[dict[str, Any]]]:
        """Of each optimizer, with the names of the parameters."""
        found = self._read(
            lambda levels: levels[0].startswith(_OPTIMIZER) and levels[1] == "param_groups"
        )
        return [found[f"{_OPTIMIZER}{number}"]["param_groups"] for number in range(len(found))]

    def check(self, module: pl.LightningModule, strict: bool) -> None:
        """Refuse a checkpoint of another model.

        Args:
            module: What it is loaded into; what other ranks keep is on the meta device.
            strict: Whether the names must be the same; the shapes must be in any case.

        Raises:
            ValueError: If it is one.
        """
        theirs, ours = map(_shapes, (self._on_meta(), module.state_dict()))
        names = theirs.keys() | ours.keys() if strict else theirs.keys() & ours.keys()
        different = sorted(n for n in names if theirs.get(n, "none") != ours.get(n, "none"))
        if different:
            name = different[0]
            shapes = f"shape {ours.get(name, 'none')} here and {theirs.get(name, 'none')} there"
            rule = f"it is of another model: {len(different)} parameter(s) differ, first {name!r}"
            rule += f" with {shapes}"
            raise self._error(rule, f"Resume the {type(module).__name__} that wrote it")

    # After it.

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        """Values of what is on this rank, and the rest on meta."""
        state = module.state_dict()
        here = {name for name, value in state.items() if not getattr(value, "is_meta", False)}
        read = self._read(lambda levels: levels[0] == _MODEL and levels[1] in here)
        return {**self._on_meta(), **read.get(_MODEL, {})}

    def optimizer_state(
        self,
        number: int,
        groups: list[dict[str, Any]],
        ownership: Ownership,
        optimizer: Optimizer,
    ) -> dict[str, Any]:
        """State of the parameters that are on this rank, by their numbers in this run.

        Args:
            number: Place of the optimizer in what ``configure_optimizers`` returned.
            groups: Its settings, from the outline.
            ownership: Whose parameters are whose.
            optimizer: That of this run, whose groups it must fit.

        Raises:
            ValueError: If its groups hold other parameters than those that were saved.
        """
        first = f"{_OPTIMIZER}{number}"
        names = names_of(ownership, optimizer)
        ours = optimizer.state_dict()["param_groups"]
        theirs = self._param_groups()[number]
        saved = [set(group["params"]) for group in theirs]
        if [{names[n] for n in group["params"]} for group in ours] != saved:
            rule = "its optimizer has other groups of parameters"
            raise self._error(rule, f"Build the {type(optimizer).__name__} as that run did")
        read = self._read(
            lambda levels: (
                levels[:2] == [first, "state"]
                and (levels[2] not in ownership.ranks or ownership.is_here(levels[2]))
            )
        )
        numbers = {name: n for n, name in enumerate(names)}
        entries = read.get(first, {}).get("state", {})
        state = {numbers.get(name, name): entry for name, entry in entries.items()}
        both = zip(groups, ours, strict=True)
        settings = [{**group, "params": own["params"]} for group, own in both]
        return {"state": state, "param_groups": settings}


def _numbered(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with the numbers of parameters, as a checkpoint of one file has them."""
    numbered, count = [], 0
    for group in groups:
        end = count + len(group["params"])
        numbered.append({**group, "params": list(range(count, end))})
        count = end
    return numbered


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
