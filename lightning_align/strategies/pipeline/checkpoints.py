"""What a strategy whose ranks hold parts of a model saves and loads: one file, or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.offload import linked
from lightning_align.run.replicas import is_spread
from lightning_align.strategies import replacing
from lightning_align.strategies.distributed_folder import META_FILE, DistributedFolder, is_one
from lightning_align.strategies.pipeline import checkpoint_folder, whole_state
from lightning_align.strategies.pipeline.chain import WHERE
from lightning_align.strategies.pipeline.ownership import Ownership


class StageCheckpoints(ParallelStrategy):
    """Checkpoints of parts of a model, for the strategy that makes the parts.

    Attributes:
        save_distributed_checkpoint: Whether each rank saves its own part, into a folder.
    """

    save_distributed_checkpoint: bool
    _ownership: Ownership | None = None
    _folder: DistributedFolder | None = None  # what is resumed from, if it is a folder
    _restores_late: bool | None = None  # None: not asked yet

    @property
    def saves_whole_state(self) -> bool:
        """Whether rank 0 has the whole state when a checkpoint is written."""
        return not self.save_distributed_checkpoint

    def whole_state_dict(self) -> dict[str, Any]:
        """The module's state, complete on rank 0 and empty elsewhere; collective."""
        if self._ownership is None:  # saved by a callback, when the set-up has failed
            return super().lightning_module_state_dict()
        return whole_state.gather_module(self._ownership)

    # Saving.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All parameters under their names, on rank 0, or those of this rank; collective."""
        if self.save_distributed_checkpoint and self._ownership is not None:
            return checkpoint_folder.module_part(self._ownership)
        return self.whole_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State by number of parameter, on rank 0, or that of this rank by name; collective."""
        assert self._ownership is not None
        if self.save_distributed_checkpoint:
            return checkpoint_folder.optimizer_part(self._ownership, optimizer)
        return whole_state.gather_optimizer(self._ownership, optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        if not self.save_distributed_checkpoint or self._ownership is None:
            if self.is_global_zero:
                self._save_file(checkpoint, filepath, storage_options)
            return
        group, path = self._ownership.group, str(self.broadcast(filepath))
        checkpoint_folder.save(checkpoint, path, group, self.checkpoint_io.save_checkpoint)

    def _save_file(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any) -> None:
        place = Path(filepath)
        replacing.finish(place)
        if not is_one(place):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        file = replacing.unfinished(place)  # in the place of a folder
        self.checkpoint_io.save_checkpoint(checkpoint, file, storage_options)
        replacing.end(place)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if not is_one(Path(filepath)):
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            replacing.remove(Path(filepath))

    # In mid-fit, to go back to.

    def snapshot_state(self) -> dict[str, Any]:
        """This rank's stages and their optimizer state; nothing is gathered."""
        assert self._ownership is not None
        return {
            "state_dict": whole_state.own_module(self._ownership),
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Put back what this rank has taken.

        Args:
            state: From ``snapshot_state``.
        """
        assert self._ownership is not None
        whole_state.load_module(self._ownership.module, state["state_dict"], strict=True)
        states = zip(self.optimizers, state["optimizer_states"], strict=True)
        for optimizer, own in states:
            whole_state.load_optimizer(self._ownership, optimizer, own)

    # Loading.

    @override
    def connect(self, model: pl.LightningModule) -> None:
        self._folder = self._restores_late = None
        super().connect(model)

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        # A model without values can take only what this rank keeps. Lightning asks before and after
        # the set-up, which spreads a model or fills it: the answer is the first one.
        if self._restores_late is None:
            module = self.lightning_module
            self._restores_late = module is not None and is_spread(module)
        return self._restores_late

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        _refuse_to_begin_anew(self.lightning_module.trainer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        named = Path(self.broadcast(checkpoint_path))
        path = replacing.whereabouts(named)
        if path != named:
            rank_zero_warn(
                f"A run that was replacing {named} was killed; the newest whole one is {path.name}"
                " beside it, which is read. The next save puts it in its place."
            )
            checkpoint_path = path
        if linked.is_linked(path):  # of ZeROInfinityStrategy; each rank reads what it keeps
            return linked.read(path, WHERE, weights_only=weights_only)
        self._folder = DistributedFolder(path, WHERE) if path.is_dir() else None
        if self._folder is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        meta_file = str(path / META_FILE)
        others: Any = self.checkpoint_io.load_checkpoint(meta_file, weights_only=weights_only)
        return {**others, **self._folder.outline(self.global_rank)}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if self._folder is None:
            whole_state.load_module(module, checkpoint["state_dict"], strict)
            return
        self._folder.check(module, strict)
        if self._restores_late:
            self._load_values()

    def _load_values(self) -> None:
        """The module's values out of a folder, once it is known which are needed here."""
        module = self.lightning_module
        if self._folder is not None and module is not None:
            state = checkpoint_folder.module_state(self._folder, module)
            whole_state.load_module(module, state, module.strict_loading)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._ownership is not None
        states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        for number, (optimizer, saved) in enumerate(states):
            state = saved
            if self._folder is not None:
                groups = saved["param_groups"]
                state = checkpoint_folder.optimizer_state(
                    self._folder, number, groups, self._ownership, optimizer
                )
            whole_state.load_optimizer(self._ownership, optimizer, state)


def _refuse_to_begin_anew(trainer: pl.Trainer) -> None:
    """Where ``ckpt_path="last"`` finds nothing Lightning begins anew, and would overwrite it."""
    if trainer.ckpt_path:
        return
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    folders = [Path(each.dirpath) for each in callbacks if each.dirpath]
    for place in (place for folder in folders for place in replacing.empty_places(folder)):
        new = replacing.whereabouts(place)
        rule = f"a run was killed before it had renamed {new}, so that 'last' does not find it"
        way_out = f"Resume with ckpt_path={str(place)!r}, or delete it to begin anew"
        raise argument_error("Trainer.fit", "ckpt_path", None, rule, way_out)
