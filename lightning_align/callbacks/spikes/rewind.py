"""Back to a snapshot in host memory, past the batches that led to a spike (PaLM, arXiv:2204.02311).

``SpikeGuard`` decides when; here is what it takes. A snapshot is ``run.capture``'s state, copied
into memory that is allocated once, every so many optimizer steps: a number and never a time, so
that two equal runs go back to the same place. A rewind restores the newest one that is old enough,
and names the batches to leave out.

What is left out stays so, and for how long the learning rate is lowered belongs to the guard and
not to the run: neither goes back. Both are in a checkpoint; snapshots are not.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor

from lightning_align._compat.lightning_trainer import is_accumulating
from lightning_align._errors import (
    argument_error,
    check_choice,
    check_least,
    check_whole,
    finite_number,
)
from lightning_align.callbacks.checkpoint_withdrawal import SavedSteps, Withdrawn
from lightning_align.callbacks.spikes.memory import MEMORY, check_room
from lightning_align.checkpointing import SnapshotEngine
from lightning_align.run.callbacks import bring
from lightning_align.run.capture import RunState, capture, check_goes_back, restore
from lightning_align.run.exact_resume import ExactResume
from lightning_align.run.protocols import FollowsFreezing
from lightning_align.run.skipping import add_skipped, check_begins_anew, stream_position

_WHERE = "SpikeGuard"  # whose arguments these are

Range = tuple[int, int]  # of batches in the unskipped stream: the first one, and one past the last


class Rewound(NamedTuple):
    """What a rewind has done.

    Args:
        from_step: Optimizer steps that were complete, the one that was alarmed about included.
        to_step: Optimizer steps that are part of the weights now.
        left_out: Batches that are passed over, by their number in the unskipped stream.
        checkpoints: What had been saved of the stretch.
    """

    from_step: int
    to_step: int
    left_out: Range
    checkpoints: Withdrawn


class SpikeRewind:
    """Snapshots of a run, and the way back to one of them.

    Args:
        rewind_steps: Optimizer steps to go back, at least.
        snapshot_every_n_steps: Optimizer steps from one snapshot to the next.
        skip_batches: Batches to leave out beyond the one of the alarm.
        lr_factor: What the learning rate is multiplied by after a rewind; None leaves it.
        lr_steps: For how many optimizer steps it is.
        moments: Whether a rewind "keep"s the optimizer's state, or "reset"s it for all parameters
            (SPAM, arXiv:2501.06842); here step counts and all else that it has go with the moments.
        snapshots: Snapshots to keep in memory; None takes as many as ``rewind_steps`` needs.

    Raises:
        ValueError: If a value is out of range, or snapshots do not reach back so far.
    """

    def __init__(
        self,
        rewind_steps: int,
        snapshot_every_n_steps: int,
        skip_batches: int = 0,
        *,
        lr_factor: float | None = None,
        lr_steps: int = 0,
        moments: str = "keep",
        snapshots: int | None = None,
    ) -> None:
        counts = {"rewind_steps": rewind_steps, "skip_batches": skip_batches}
        check_whole(_WHERE, **counts, snapshot_every_n_steps=snapshot_every_n_steps)
        check_least(_WHERE, 0, **counts)
        check_least(_WHERE, 1, snapshot_every_n_steps=snapshot_every_n_steps)
        check_choice(_WHERE, "moments", moments, ("keep", "reset"))
        _check_lr(lr_factor, lr_steps)
        # One that is old enough, at any step: those that are younger may be as many.
        enough = -(-rewind_steps // snapshot_every_n_steps) + 1
        if snapshots is not None and snapshots < enough:
            rule = f"{snapshots} snapshot(s), one every {snapshot_every_n_steps} steps, reach"
            rule += f" {(snapshots - 1) * snapshot_every_n_steps} steps back at any time"
            way_out = f"Keep {enough}, or raise snapshot_every_n_steps"
            raise argument_error(_WHERE, "rewind_steps", rewind_steps, rule, way_out)
        self.rewind_steps, self.skip_batches = rewind_steps, skip_batches
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.lr_factor, self.lr_steps, self.moments = lr_factor, lr_steps, moments
        self.snapshots = snapshots or enough
        self._engine: SnapshotEngine | None = None
        self._foreseen = 0  # bytes of a snapshot in memory
        self._fit: object = None  # whose the snapshots are
        self._positions: dict[int, int] = {}  # step of a snapshot -> the batch that comes next
        self._lr_until = 0  # step from which on the learning rate is the schedule's
        self._scheduled: list[Any] = []  # learning rates of the groups, while they are lowered
        self._goes_back = False
        self._saved = SavedSteps()

    # The run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot go back, and bring what it needs to.

        Args:
            trainer: Who is being set up.
            pl_module: What it is to train.
            stage: Of the set-up.

        Raises:
            ValueError: If the strategy or a callback cannot, or the run is shorter than a rewind.
        """
        check_goes_back(trainer, _WHERE)
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every:
            rule = "Trainer(reload_dataloaders_every_n_epochs) makes new loaders, and a rewind into"
            rule += " an epoch before needs those that it had"
            way_out = "Leave that out, or 'rewind' out of the actions"
            raise argument_error(_WHERE, "rewind_steps", self.rewind_steps, rule, way_out)
        steps = trainer.max_steps
        if 0 < steps <= self.rewind_steps:
            rule = f"the run has {steps} steps, and no step is so far behind another"
            raise argument_error(_WHERE, "rewind_steps", self.rewind_steps, rule, "Lower it")
        bring(ExactResume, trainer, pl_module, stage)

    def start(self, trainer: pl.Trainer) -> None:
        """Begin to keep snapshots; to be called in ``on_train_start``.

        Raises:
            ValueError: If there is no room for them, or a loader cannot be begun anew.
        """
        check_begins_anew(trainer, _WHERE)
        self.stop(trainer)
        self._foreseen = check_room(trainer, _WHERE, self.snapshots).get(MEMORY, 0)
        self._engine = SnapshotEngine(persist=False, keep_last=self.snapshots)
        strategy = trainer.strategy
        step = strategy.optimizer_step

        def stepped(*args: Any, **options: Any) -> Any:
            try:
                return step(*args, **options)
            finally:
                self._end_lower_lr(trainer)

        # Behind it come the schedulers, and who logs: they see their own learning rate.
        vars(strategy)["optimizer_step"] = stepped

    def stop(self, trainer: pl.Trainer) -> None:
        """Give the memory back, and leave the strategy alone."""
        if self._engine is not None:
            vars(trainer.strategy).pop("optimizer_step", None)
            self._engine.close()
        self._engine, self._fit = None, None
        self._positions = {}

    # A step

    def before_step(self, trainer: pl.Trainer) -> None:
        """Lower the learning rate of this step, if it is one after a rewind.

        To be called behind all that may set one, and before the optimizer: where gradients are
        clipped.
        """
        if self.lr_factor is None or trainer.global_step >= self._lr_until or self._scheduled:
            return
        for group in _groups(trainer):
            lr = group["lr"]
            if isinstance(lr, Tensor):  # an optimizer may hold it
                self._scheduled.append(lr.clone())
                lr.mul_(self.lr_factor)
            else:
                self._scheduled.append(lr)
                group["lr"] = lr * self.lr_factor

    def _end_lower_lr(self, trainer: pl.Trainer) -> None:
        if not self._scheduled:
            return
        for group, lr in zip(_groups(trainer), self._scheduled, strict=True):
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr
        self._scheduled = []

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Take a snapshot where one is due; to be called in ``on_train_batch_end``.

        Raises:
            ValueError: If it is larger than foreseen, and there is no room for the others.
        """
        self._saved.note(trainer)
        step = trainer.global_step
        due = step > 0 and step % self.snapshot_every_n_steps == 0 and not is_accumulating(trainer)
        if not due or step in self._positions:
            return
        assert self._engine is not None
        state = dict(vars(capture(trainer, copy=False)))  # it is copied here, into reused memory
        self._fit = state.pop("fit")
        copied = self._engine.save(state, f"step-{step}", step).copied_bytes
        if copied > self._foreseen:  # an optimizer with more than AdamW, or large attributes
            left = self.snapshots - len(self._positions)
            is_news = copied > 1.1 * self._foreseen  # and not a few counters more at each snapshot
            check_room(trainer, _WHERE, left, {MEMORY: copied}, says=is_news)
            self._foreseen = copied
        self._positions[step] = stream_position(trainer)
        self._positions = {kept: self._positions[kept] for kept in self._engine.steps}

    # The way back

    def reaches(self, trainer: pl.Trainer) -> bool:
        """Whether there is a snapshot old enough for an alarm before this optimizer step.

        There is none early in a run, and for as long after a resume: snapshots are not saved.
        """
        return self._target(trainer.global_step) is not None

    def rewind(self, trainer: pl.Trainer) -> Rewound:
        """Go on from the newest snapshot that is old enough, without the batches up to here.

        To be called in ``on_train_batch_end`` of the batch whose optimizer step was alarmed about,
        and skipped. All callbacks go back with the run, the caller included.

        Args:
            trainer: Who fits.

        Raises:
            RuntimeError: If there is no snapshot, which ``reaches`` says.
        """
        before = trainer.global_step
        target = self._target(before - 1)
        if target is None or self._engine is None:
            raise RuntimeError(f"{_WHERE}: no snapshot is {self.rewind_steps} steps old.")
        left_out = self._positions[target], stream_position(trainer) + self.skip_batches
        state = RunState(**self._engine.restore(target), fit=self._fit)
        self._goes_back = True
        try:
            skip = partial(add_skipped, trainer, [left_out])
            restore(trainer, state, copy=False, before_loader=skip)
        finally:
            self._goes_back = False
        self._engine.forget(after=target)  # of a stretch that is no part of the run any more
        self._positions = {kept: self._positions[kept] for kept in self._engine.steps}
        if self.moments == "reset":
            forget_moments(trainer)
        self._lr_until = target + self.lr_steps
        return Rewound(before, target, left_out, self._saved.go_back(trainer))

    def _target(self, complete: int) -> int | None:
        """Step of the snapshot to go back to, when so many steps are complete."""
        old = [step for step in self._positions if step <= complete - self.rewind_steps]
        return max(old, default=None)

    # A checkpoint

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"lr_until": self._lr_until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up; in a rewind it stays as it is."""
        if not self._goes_back:
            self._lr_until = state["lr_until"]


def forget_moments(trainer: pl.Trainer) -> None:
    """Let optimizers begin anew for all parameters, with moments of zero and no step counted."""
    parameters = [p for group in _groups(trainer) for p in group["params"]]
    if isinstance(trainer.strategy, FollowsFreezing):
        trainer.strategy.follow_freezing(parameters)
        return
    for optimizer in trainer.optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def _groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _check_lr(lr_factor: float | None, lr_steps: int) -> None:
    check_whole(_WHERE, lr_steps=lr_steps)
    check_least(_WHERE, 0, lr_steps=lr_steps)
    if lr_factor is None:
        return
    number = finite_number(lr_factor)
    if number is None or not 0 < number <= 1:
        raise argument_error(_WHERE, "lr_factor", lr_factor, "must be a number in (0, 1]")
    if not lr_steps:
        rule = "says for how many steps after a rewind lr_factor holds, and must be at least 1"
        raise argument_error(_WHERE, "lr_steps", lr_steps, rule)
