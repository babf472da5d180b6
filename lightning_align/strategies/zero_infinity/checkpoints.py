"""What a strategy whose blocks are on disk saves and loads, and shows of whole values."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.checkpointing.streamed import pieces, save_streamed
from lightning_align.durable import sync_path
from lightning_align.offload import linked
from lightning_align.offload.engine import OffloadEngine
from lightning_align.offload.ranks import Ranks
from lightning_align.offload.record import FILE
from lightning_align.offload.store import ShardStore
from lightning_align.offload.tiles import (
    Tiled,
    in_tiles,
    tiled_optimizer_state,
    whole_optimizer_state,
    whole_values,
)
from lightning_align.strategies import replacing
from lightning_align.strategies.distributed_folder import META_FILE, DistributedFolder
from lightning_align.strategies.zero_infinity.blocks import WHERE
from lightning_align.strategies.zero_infinity.budget import held_nbytes
from lightning_align.strategies.zero_infinity.commits import Payload, load_payload
from lightning_align.strategies.zero_infinity.ranks import return_to_common_step
from lightning_align.strategies.zero_infinity.set_up import own_record

_CLASS = "class"  # key of an optimizer's state in a commit record
_PARTS = "parts"  # key of an optimizer's state in mid-fit: parts of parameters, by name
_PART_BYTES = 64 << 20  # of a folder that is read in parts


class BlockCheckpoints(ParallelStrategy):
    """Checkpoints of blocks on disk, for the strategy that puts them there.

    Attributes:
        save_distributed_checkpoint: Whether a checkpoint is a folder of links, and not a file.
    """

    save_distributed_checkpoint: bool
    _engine: OffloadEngine | None = None
    _record: dict[str, Any] | None = None  # what is resumed from, if it is a commit
    _folder: DistributedFolder | None = None  # what is resumed from, if ranks wrote it in parts
    _is_committing = False
    _is_saving = False
    ranks: Ranks
    _tiled: Sequence[Tiled] = ()  # weights that are cut into tiles

    # Whole values

    @contextmanager
    def gathered(
        self, parameters: Collection[str | nn.Parameter] | None = None, *, modify: bool = False
    ) -> Iterator[None]:
        """Parameters in memory for a while, to be read or edited.

        Args:
            parameters: They or their names; None means all.
            modify: Whether what was edited is stored.

        Raises:
            ValueError: If nothing is stored.
        """
        if self._engine is None:
            rule = "no model is stored"
            raise argument_error(f"{WHERE}.gathered", "parameters", "...", rule, "Call fit first")
        parts = None if parameters is None else in_tiles(parameters, self._tiled)
        with self._engine.whole.gathered(parts, modify=modify):
            yield

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state, of which blocks are shown by their files and take no memory.

        What was returned stays as it is: the next step of a block that is looked at is written to a
        new file. In a commit, names and shapes stand in the place of parameters.
        """
        module = self.lightning_module
        assert module is not None
        if self._engine is None:
            return super().lightning_module_state_dict()
        copies = {} if self._is_committing else self._values(self._engine)
        if not copies and not self._is_committing:  # the first rank has it
            return {}
        values = {
            name: _stored(value, copies) if isinstance(value, nn.Parameter) else value
            for name, value in module.state_dict(keep_vars=True).items()
        }
        return whole_values(values, self._tiled, self._engine.store.set_aside)

    def _values(self, engine: OffloadEngine) -> dict[nn.Parameter, Tensor]:
        return engine.whole.outlines() if self._links_parts(engine) else engine.whole.values()

    def _links_parts(self, engine: OffloadEngine) -> bool:
        """Whether each rank of several is about to link what it has."""
        return self.ranks.size > 1 and self._saves_links(engine.store)

    def whole_state_dict(self) -> dict[str, Any]:
        """The module's state with the values of all blocks; files show those that are away."""
        return self.lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self._engine is not None
        if self._is_committing:  # what is large is in the blocks' files
            state = getattr(optimizer, "_optimizer", optimizer).state_dict()
            return {**state, _CLASS: type(self.optimizers[0]).__name__}
        if self._links_parts(self._engine):
            return self._engine.updates.outlined_state()
        state = self._engine.updates.state()
        if self.ranks.rank:
            return state
        aside = self._engine.store.set_aside
        return whole_optimizer_state(state, self.optimizers[0], self._tiled, aside)

    def state_nbytes(self) -> Mapping[str, int]:
        """Most bytes that a state takes that is held in mid-fit, by folder; "" is memory."""
        assert self._engine is not None
        engine = self._engine
        return held_nbytes(engine.blocks, engine.store.folders, self.ranks.size)

    # In mid-fit, to go back to

    def snapshot_state(self) -> dict[str, Any]:
        """What this rank has of blocks and of their optimizer state, as files show it; no copy.

        Names and shapes stand in the place of parameters that it has in part: hooks look at them.
        """
        assert self._engine is not None
        assert self.lightning_module is not None
        own = self._engine.whole.own()
        values = dict(self.lightning_module.state_dict(keep_vars=True))
        parameters = {n: value for n, value in values.items() if isinstance(value, nn.Parameter)}
        parts = {name: own[p] for name, p in parameters.items() if p in own}
        for name, parameter in parameters.items():
            is_whole = name in parts and parts[name].shape == parameter.shape
            values[name] = parts.pop(name) if is_whole else _stored(parameter, {})
        state = {**self._engine.updates.own_state(), _PARTS: parts}
        return {"state_dict": values, "optimizer_states": [state]}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Put back what this rank has taken; collective.

        Args:
            state: From ``snapshot_state``.
        """
        assert self._engine is not None
        assert self.lightning_module is not None
        optimizer = dict(state["optimizer_states"][0])
        given = {**state["state_dict"], **optimizer.pop(_PARTS)}
        values = {name: value for name, value in given.items() if not _is_outline(value)}
        parameters = {
            value: values.pop(name)
            for name, value in self.lightning_module.state_dict(keep_vars=True).items()
            if isinstance(value, nn.Parameter) and name in values
        }
        with self.ranks.together("a state that is put back"):
            self.lightning_module.load_state_dict(values, strict=False)
            self._engine.updates.take_back(parameters, optimizer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        path = Path(checkpoint_path)
        if path.name == FILE:
            if self.ranks.size > 1:  # the path is that of some rank
                strategy: Any = self
                path = own_record(strategy, path)
                return_to_common_step(path.parent, self.ranks)
            self._record = load_payload(path.parent, weights_only=bool(weights_only))
            return self._record
        path = replacing.whereabouts(path)
        if linked.is_linked(path):
            return linked.read(path, WHERE, weights_only=weights_only, may_be_fixed=True)
        if path.is_dir():
            self._folder = DistributedFolder(path, WHERE)
            meta_file = str(path / META_FILE)
            others: Any = self.checkpoint_io.load_checkpoint(meta_file, weights_only=weights_only)
            return {**others, **self._folder.outline(self.global_rank)}
        if zipfile.is_zipfile(path) and type(self.checkpoint_io) is TorchCheckpointIO:
            return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        state = checkpoint["state_dict"]
        if self._record is not None:
            self._check_same(module, checkpoint)
            values = {name: value for name, value in state.items() if not _is_outline(value)}
            module.load_state_dict(values, strict=False)
            return
        context: Any = nullcontext() if self._engine is None else self._engine.whole.put()
        with context:
            if self._folder is None:
                super().load_model_state_dict(checkpoint, strict)
                return
            self._folder.check(module, strict)
            for names in _in_parts(state):
                module.load_state_dict(self._folder.values(names), strict=False)

    def _check_same(self, module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a committed step of another model.

        Raises:
            ValueError: If it is one.
        """
        state = checkpoint["state_dict"]
        ours = module.state_dict(keep_vars=True)
        other = [n for n in state if n not in ours or ours[n].shape != state[n].shape]
        other += [name for name in ours if name not in state]
        if other:
            rule = f"the committed step {checkpoint['global_step']} is of another model: it differs"
            rule += f" in {', '.join(map(repr, sorted(set(other))[:3]))}. Nothing was touched there"
            way_out = "Go on with that model, or set another nvme_path or overwrite=True"
            raise argument_error(WHERE, "model", type(module).__name__, rule, way_out)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._engine is not None
        optimizer, state = self.optimizers[0], checkpoint["optimizer_states"][0]
        written = state.get(_CLASS, type(optimizer).__name__)
        if written != type(optimizer).__name__:
            rule = f"the committed step is of {written}"
            way_out = "Go on with that, or begin anew with overwrite=True"
            raise argument_error(WHERE, "optimizer", type(optimizer).__name__, rule, way_out)
        if self._folder is not None and self._tiled:
            rule = "weights are cut into tiles, and a folder of another strategy has whole ones"
            tool = "python -m lightning.pytorch.utilities.consolidate_checkpoint"
            way_out = f"Make one file of it: {tool} {self._folder.path}"
            raise argument_error(WHERE, "ckpt_path", str(self._folder.path), rule, way_out)
        if self._folder is not None:
            self._load_in_parts(self._folder, optimizer, state["param_groups"])
            return
        state = {key: value for key, value in state.items() if key != _CLASS}
        if self._record is not None:
            self._engine.updates.resume(state)
            return
        self._engine.updates.load(tiled_optimizer_state(state, optimizer, self._tiled))

    def _load_in_parts(
        self, folder: DistributedFolder, optimizer: Optimizer, groups: list[dict[str, Any]]
    ) -> None:
        """Read and store the optimizer's state of one block after the other."""
        assert self._engine is not None
        assert self.lightning_module is not None
        every = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        names = [every[p] for group in optimizer.param_groups for p in group["params"]]
        small: dict[Any, Any] = {}  # what stays in memory of those before
        for block in self._engine.blocks:
            mine = {every[parameter] for parameter in block.parameters.values()}
            state = folder.optimizer_state(0, groups, optimizer, names, mine.__contains__)
            self._engine.updates.load(state, [block])
            small.update(optimizer.state)
        optimizer.state.update(small)

    # Saving

    @property
    def saves_whole_state(self) -> bool:
        """Whether rank 0 has the whole state when a checkpoint is written."""
        return True

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        place = Path(filepath)
        if self._engine is not None and self._engine.gradients.are_used:
            whole = self._committed_checkpoint(self._engine)
            if whole is None:
                rank_zero_warn(
                    f"{WHERE}: {place} is not saved: a step was interrupted while blocks were"
                    " updated, and no step is committed that it could be of."
                )
                return
            checkpoint = whole
        if type(self.checkpoint_io) is not TorchCheckpointIO or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        elif self._engine is not None and self._saves_links(self._engine.store):
            self._save_links(checkpoint, place)
        elif self.is_global_zero:
            replacing.finish(place)
            if linked.is_linked(place):
                save_streamed(checkpoint, replacing.unfinished(place))
                replacing.end(place)
            else:
                save_streamed(checkpoint, filepath)

    def _committed_checkpoint(self, engine: OffloadEngine) -> dict[str, Any] | None:
        """Of a run that ends in the middle of an update: the step before, if there is one."""
        store = engine.store
        if self.ranks.size > 1 or not store.atomic_step or store.recover() is None:
            return None
        checkpoint = load_payload(store.folder, weights_only=False)
        values = self.lightning_module_state_dict()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: values[name] if _is_outline(value) else value for name, value in state.items()
        }
        (small,) = checkpoint["optimizer_states"]
        large = self.optimizer_state(self.optimizers[0])["state"]
        small["state"] = {n: {**large.get(n, {}), **entry} for n, entry in small["state"].items()}
        del small[_CLASS]
        return checkpoint

    def _saves_links(self, store: ShardStore) -> bool:
        if not self.save_distributed_checkpoint or self.ranks.size == 1:
            return self.save_distributed_checkpoint and store.is_on_drive
        # Otherwise the first of several ranks has copies of what others store.
        return self._is_saving and store.commits and not self._tiled

    def _save_links(self, checkpoint: dict[str, Any], place: Path) -> None:
        assert self._engine is not None
        store, ranks, is_first = self._engine.store, self.ranks, self.ranks.rank == 0
        with ranks.together(f"the beginning of {place}"):
            if is_first:
                _check_place(place)
                replacing.begin(place)
        unfinished = replacing.unfinished(place)
        with ranks.together(f"links in {place}"):
            store.make_durable()
            rest = linked.link(checkpoint, unfinished, ranks.rank, store.current, ranks.size)
        with ranks.together(f"the end of {place}"):
            if is_first:
                with (unfinished / linked.META_FILE).open("wb") as file:
                    file.writelines(pieces(rest))
                linked.make_durable(unfinished)
                replacing.end(place)
                sync_path(place.parent)

    def know_of_saving(self, trainer: pl.Trainer) -> None:
        """Let what Lightning puts together be outlines, where ``save_checkpoint`` links parts."""
        save = type(trainer).save_checkpoint

        def save_checkpoint(*args: Any, **options: Any) -> None:
            self._is_saving = True
            try:
                save(trainer, *args, **options)
            finally:
                self._is_saving = False

        vars(trainer)["save_checkpoint"] = save_checkpoint

    def commit(self, trainer: pl.Trainer, dump: Callable[[], dict[str, Any]]) -> None:
        """Make the present step the one that a kill leaves, when all of its updates are done."""
        assert self._engine is not None
        engine, store = self._engine, self._engine.store
        with engine.threads.traffic.commits():
            self._is_committing = True
            try:
                payload = Payload(dump())
            finally:
                self._is_committing = False
            engine.whole.store_edits()
        step, optimizer = trainer.global_step, self.optimizers[0]

        def commit() -> None:
            with engine.threads.traffic.commits():
                store.commit(step, payload.with_state(optimizer.state_dict()["state"]))

        engine.updates.late.then(commit)


def _check_place(place: Path) -> None:
    """Refuse a place that a folder of links cannot take.

    Raises:
        ValueError: If it is a URL, or a folder of something else.
    """
    if "://" in str(place) or ":/" in str(place):
        rule = "a folder of links goes to a local path, not to a URL"
        way_out = "Give a path, save with AsyncCheckpoint, or set save_distributed_checkpoint=False"
        raise argument_error(WHERE, "filepath", str(place), rule, way_out)
    if place.is_dir() and not linked.is_linked(place) and any(place.iterdir()):
        rule = "the folder is in use, and not by a checkpoint that could be replaced"
        raise argument_error(WHERE, "filepath", str(place), rule, "Save under another name")


def _stored(parameter: nn.Parameter, copies: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """A parameter's value; without one, its shape and dtype on the meta device."""
    return copies[parameter] if copies else torch.empty_like(parameter, device="meta")


def _is_outline(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _in_parts(state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors to be in memory together."""
    names: list[str] = []
    size = 0
    for name, value in state.items():
        if names and size + value.nbytes > _PART_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += value.nbytes
    yield names
