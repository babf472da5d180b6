"""Checkpoints of a stretch that a run has gone back behind: taken back, or at least named.

``AsyncCheckpoint`` withdraws its own. ``ModelCheckpoint`` ranks and names its files by itself, and
does not say of which step each is: that is noted while it saves them.
"""

import weakref
from typing import NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align._compat.lightning_resume import save_step_again, saved_by
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.protocols import WithdrawsCheckpoints


class Withdrawn(NamedTuple):
    """What a run had saved of a stretch that it has gone back behind.

    Args:
        withdrawn: Paths that are never the last or the best again, on rank zero.
        named: Paths of other callbacks, which keep them and may resume from them.
    """

    withdrawn: list[str]
    named: list[str]

    @property
    def notes(self) -> list[str]:
        """The same in words."""
        notes = []
        if self.withdrawn:
            notes.append(f"Withdrawn, and deleted after the next save: {', '.join(self.withdrawn)}")
        if self.named:
            notes.append(f"Saved of the stretch that was left, and kept: {', '.join(self.named)}")
        return notes


class SavedSteps:
    """The steps of the files of a Trainer's ModelCheckpoints."""

    def __init__(self) -> None:
        self._steps: weakref.WeakKeyDictionary[ModelCheckpoint, dict[str, int]]
        self._steps = weakref.WeakKeyDictionary()

    def note(self, trainer: pl.Trainer) -> None:
        """Take down what was saved since the last call; to be called at the end of each step."""
        for callback in _others(trainer):
            known = self._steps.setdefault(callback, {})
            step, paths = saved_by(callback)
            if step != known.get("", -1):  # the empty path stands for the latest save
                new = paths - known.keys() | {callback.last_model_path} - {""}
                kept = {path: at for path, at in known.items() if path in paths}
                self._steps[callback] = {**kept, **dict.fromkeys(new, step), "": step}

    def go_back(self, trainer: pl.Trainer) -> Withdrawn:
        """Take back what was saved behind the step that the run has just gone back to.

        To be called in ``on_train_batch_end`` on every rank. What is named may be saved once more.

        Args:
            trainer: Whose run it is.
        """
        self.note(trainer)
        withdrawn, named = [], []
        for callback in callbacks_of(trainer):
            if isinstance(callback, WithdrawsCheckpoints):
                withdrawn += callback.withdraw(trainer)
        for callback in _others(trainer):
            steps = self._steps[callback]
            named += [path for path, at in steps.items() if path and at > trainer.global_step]
            if steps[""] > trainer.global_step:
                save_step_again(callback)
                steps[""] = 0
        return Withdrawn(withdrawn, sorted(named))


def _others(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """ModelCheckpoints that take nothing back."""
    return [
        callback
        for callback in callbacks_of(trainer)
        if isinstance(callback, ModelCheckpoint) and not isinstance(callback, WithdrawsCheckpoints)
    ]
