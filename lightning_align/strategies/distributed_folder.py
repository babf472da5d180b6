"""A folder that all ranks have written by torch.distributed.checkpoint, to be read in parts.

``PipelineStrategy`` writes it, under the names that Lightning's ModelParallelStrategy uses. Reading
is in two parts, for Lightning restores before a strategy is set up: first an outline, in which
tensors have shapes and no values, then the values of what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_align._compat import torch_dcp
from lightning_align._errors import argument_error
from lightning_align.run.accumulation import WINDOW_KEY

META_FILE = "meta.pt"
MODEL, OPTIMIZER = "model", "optimizer_"


def is_one(path: Path) -> bool:
    """Whether there is a checkpoint of all ranks, whole or damaged."""
    return (path / META_FILE).is_file() and (path / torch_dcp.INDEX_FILE).is_file()


class DistributedFolder:
    """A folder to read from.

    Args:
        path: The folder.
        where: Class that the user called, for error messages.

    Raises:
        ValueError: If it was not written to its end, or files are missing or cut off.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.path, self._where = path, where
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
        return argument_error(self._where, "ckpt_path", str(self.path), rule, way_out)

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
        model = {levels[1]: key for key, levels in names if levels[0] == MODEL}
        return {name: torch_dcp.on_meta(self._index, key) for name, key in model.items()}

    def _param_groups(self) -> list[list[dict[str, Any]]]:
        """Of each optimizer, with the names of the parameters."""
        found = self._read(
            lambda levels: levels[0].startswith(OPTIMIZER) and levels[1] == "param_groups"
        )
        return [found[f"{OPTIMIZER}{number}"]["param_groups"] for number in range(len(found))]

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

    @property
    def names(self) -> list[str]:
        """Names of the module's state."""
        return list(self._on_meta())

    def values(self, names: Collection[str]) -> dict[str, Any]:
        """Values of the module's state.

        Args:
            names: Which ones.
        """
        read = self._read(lambda levels: levels[0] == MODEL and levels[1] in names)
        found: dict[str, Any] = read.get(MODEL, {})
        return found

    def module_state(self, names: Collection[str]) -> dict[str, Any]:
        """Values of some names, and the rest on meta."""
        return {**self._on_meta(), **self.values(names)}

    def optimizer_state(
        self,
        number: int,
        groups: list[dict[str, Any]],
        optimizer: Optimizer,
        names: list[str],
        is_wanted: Callable[[str], bool],
    ) -> dict[str, Any]:
        """State of the parameters that are wanted, by their numbers in this run.

        Args:
            number: Place of the optimizer in what ``configure_optimizers`` returned.
            groups: Its settings, from the outline.
            optimizer: That of this run, whose groups it must fit.
            names: Of its parameters, by their numbers.
            is_wanted: Whether to read the state that is under a name.

        Raises:
            ValueError: If its groups hold other parameters than those that were saved.
        """
        first = f"{OPTIMIZER}{number}"
        ours = optimizer.state_dict()["param_groups"]
        theirs = self._param_groups()[number]
        saved = [set(group["params"]) for group in theirs]
        if [{names[n] for n in group["params"]} for group in ours] != saved:
            rule = "its optimizer has other groups of parameters"
            raise self._error(rule, f"Build the {type(optimizer).__name__} as that run did")
        read = self._read(lambda levels: levels[:2] == [first, "state"] and is_wanted(levels[2]))
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
