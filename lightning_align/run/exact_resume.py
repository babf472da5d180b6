"""Make a resumed run bit-identical to one that never stopped, whatever writes the checkpoint."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_align._compat import lightning_resume
from lightning_align._compat.lightning_resume import validation_follows
from lightning_align._compat.lightning_trainer import restart_train_iteration
from lightning_align._errors import argument_error
from lightning_align.run.accumulation import (
    WINDOW_KEY,
    capture_accumulation,
    pending_plateau,
    restore_accumulation,
    validation_is_to_do,
)
from lightning_align.run.attributes import Attributes
from lightning_align.run.callbacks import callbacks_of, put_first
from lightning_align.run.epoch_means import capture_means, restore_means
from lightning_align.run.loader import PositionedLoader
from lightning_align.run.position import (
    Place,
    batches_consumed,
    begin_interrupted_epoch_anew,
    close_epoch,
    epoch_is_open,
    leave_validation_to_do,
    next_place,
)
from lightning_align.run.protocols import began_elsewhere, seed_of
from lightning_align.run.replicas import replica
from lightning_align.run.rng import reseed
from lightning_align.run.settings import (
    LeftOut,
    restore_settings,
    resume_averaging,
    settings_in_force,
)

_MEANS_KEY = "lightning_align.epoch_means"
_PLATEAU_KEY = "lightning_align.plateau"
_FOLLOWS_KEY = "lightning_align.follows"  # whether a batch had its end before it, when saved
_SETTINGS_KEY = "lightning_align.settings"
_ATTRIBUTES_KEY = "lightning_align.attributes"
_KEYS = (WINDOW_KEY, _MEANS_KEY, _PLATEAU_KEY, _FOLLOWS_KEY, _SETTINGS_KEY, _ATTRIBUTES_KEY)


class ExactResume(pl.Callback):
    """Tie data and randomness to the position of the run; keep what Lightning leaves out.

    Before every training batch Python's, NumPy's and torch's generators are seeded from (seed,
    batches consumed, rank), so dropout and every other draw are the same after a kill and
    ``fit(ckpt_path=...)``. The order in which a loader shuffles becomes a function of (seed,
    epoch), and a resumed epoch goes on with its next batch. The checkpoint also holds the gradients
    of an open accumulation window, the sums behind the epoch means of logged values, attributes
    that the run has changed, and what hooks of an epoch's beginning have set; docs/contract.md has
    the whole list. Our modules and ``AsyncCheckpoint`` bring this callback themselves; add it to
    the Trainer of a LightningModule of your own. Costs microseconds a step.

    Args:
        seed: Seed of the run; by default the datamodule's ``seed``, else the one of
            ``seed_everything``, else 0.

    Raises:
        ValueError: If ``seed`` is negative, a checkpoint was written with another explicit seed, or
            a step would be of batches that another ``accumulate_grad_batches`` has weighted.

    Example:
        >>> callback = ExactResume(seed=1)

    Note: a loader without ``state_dict`` is resumed by drawing and dropping the batches of the
    epoch that were consumed, which costs loading them once more; our datamodules and
    ``PositionSampler`` need neither. Persistent workers start anew with each epoch.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise argument_error("ExactResume", "seed", seed, "must not be negative")
        self.seed = seed
        self._effective_seed = seed or 0
        self._saved: dict[str, Any] = {}  # what of the checkpoint is yet to be restored
        self._attributes: Attributes | None = None  # of the latest fit
        self._start: dict[str, Any] = {}  # settings with which the fit began
        self._left_out = LeftOut()  # by DDP
        self._module_hook: Callable[[], None] = _nothing  # runs before a save, if not yet run
        self._epoch_is_open = False  # whether it goes on behind the last batch of an epoch
        self._resumed: Place | None = None  # where the checkpoint goes on, until training starts
        self._ended_early: Place | None = None  # the same, if the end of its epoch has been there

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.seed is None:
            ours = seed_of(trainer)
            self._effective_seed = int(
                ours if ours is not None else os.environ.get("PL_GLOBAL_SEED", 0)
            )
        # Lightning looks for a stateful loader; whatever it finds, we make it follow the position.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that")
        lightning_resume.wrap_train_loaders(trainer, partial(self._follow, trainer))
        # First in line, so that what other callbacks draw for a batch follows the position too.
        put_first(trainer, self)
        lightning_resume.call_before_saving(trainer, lambda: self._module_hook())

    def _follow(self, trainer: pl.Trainer, loaders: Any) -> PositionedLoader:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return PositionedLoader(
            loaders,
            seed=lambda: self._effective_seed,
            place=lambda: self._place(trainer),
            consumed=lambda: int(progress.processed),
            position=lambda: batches_consumed(trainer),
            replica=replica(trainer),
        )

    def _place(self, trainer: pl.Trainer) -> Place:
        """Where an epoch that begins now takes its first batch."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        return self._resumed or Place(int(progress.processed), 0)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = settings_in_force(trainer, pl_module)
        self._attributes = Attributes(trainer, pl_module)
        self._left_out.warn_of_thawed(trainer, pl_module)  # it has just been wrapped

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._attributes is not None
        self._attributes.note_sanity_check(begins=True)

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._attributes is not None
        self._attributes.note_sanity_check(begins=False)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lightning_resume.call_before_epochs(trainer, partial(self._go_on, trainer, pl_module))
        pending = lightning_resume.load_pending_loader_states(trainer)
        loaders = lightning_resume.train_loaders(trainer)
        if isinstance(loaders, PositionedLoader) and (
            pending or (self._resumed and loaders.started != self._resumed)
        ):
            restart_train_iteration(trainer)
        if self._ended_early is not None:
            _name_what_ran_early(trainer, self._ended_early)
        if self._resumed is None:
            begin_interrupted_epoch_anew(trainer)
        elif self._resumed.batch == 0 and not self._epoch_is_open:
            lightning_resume.begin_epoch(trainer)
        self._resumed = self._ended_early = None
        # Reading trainer.estimated_stepping_batches in configure_optimizers starts the loader
        # before Lightning has restored the position: workers would already hold the wrong batches.
        if began_elsewhere(trainer):
            restart_train_iteration(trainer)

    def _go_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put back what a checkpoint holds, once all hooks of the start have run."""
        assert self._attributes is not None
        self._attributes.begin()
        saved, self._saved = self._saved, {}
        windows = saved.get(WINDOW_KEY, [])
        if _SETTINGS_KEY in saved:
            before, then = saved[_SETTINGS_KEY]["start"], saved[_SETTINGS_KEY]["now"]
            restore_settings(
                trainer, pl_module, (before, then), self._start, window_is_open=bool(windows)
            )
        if saved:
            resume_averaging(trainer)
        self._attributes.restore(saved.get(_ATTRIBUTES_KEY, []))
        restore_accumulation(trainer, pl_module, windows)
        restore_means(trainer, pl_module, saved.get(_MEANS_KEY, []))
        interval = saved.get(_PLATEAU_KEY, "")
        validation_steps = saved.get(_FOLLOWS_KEY) and validation_follows(trainer)
        if interval and not (interval == "step" and validation_steps):
            lightning_resume.step_plateau_schedulers(trainer, interval)
        if self._epoch_is_open:
            lightning_resume.finish_epoch(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._epoch_is_open:
            self._epoch_is_open = False
            lightning_resume.begin_epoch(trainer)  # the one before had no batch to train
        reseed(self._effective_seed, batches_consumed(trainer), replica(trainer)[1], "epoch")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        reseed(self._effective_seed, batches_consumed(trainer), replica(trainer)[1], "train")
        self._left_out.warn_of_thawed(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reseed(self._effective_seed, batches_consumed(trainer), replica(trainer)[1], "validate")

    # Lightning calls the module's hooks behind those of callbacks that save, and on a resume not at
    # all: what they do for that batch, or that validation, would be lost.

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._module_hook = lightning_resume.offer_module_hook(
            trainer, "on_train_batch_end", outputs, batch, batch_idx
        )

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._module_hook = lightning_resume.offer_module_hook(trainer, "on_validation_end")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if windows := capture_accumulation(trainer, pl_module):
            checkpoint[WINDOW_KEY] = windows
        checkpoint[_MEANS_KEY] = capture_means(trainer, pl_module)
        checkpoint[_FOLLOWS_KEY] = validation_is_to_do(trainer)
        checkpoint[_PLATEAU_KEY] = pending_plateau(trainer)
        if self._attributes is None:
            return
        now = settings_in_force(trainer, pl_module)
        checkpoint[_SETTINGS_KEY] = {"start": self._start, "now": now}
        checkpoint[_ATTRIBUTES_KEY] = self._attributes.changed()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or "loops" not in checkpoint:
            return
        self._saved = {key: checkpoint[key] for key in _KEYS if key in checkpoint}
        loop = checkpoint["loops"]["fit_loop"]
        self._resumed = next_place(loop)
        self._ended_early = None
        if self._resumed.batch > 0 and not epoch_is_open(loop):
            self._ended_early = self._resumed
        at_last = loop["epoch_loop.batch_progress"]["is_last_batch"]
        self._epoch_is_open = at_last and _FOLLOWS_KEY in checkpoint and epoch_is_open(loop)
        if checkpoint.get(_FOLLOWS_KEY):
            leave_validation_to_do(loop)
        elif self._resumed.batch == 0 and at_last and not self._epoch_is_open:
            close_epoch(loop)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        lightning_resume.wrap_train_loaders(trainer, None)
        lightning_resume.call_before_saving(trainer, None)
        self._module_hook, self._saved, self._epoch_is_open = _nothing, {}, False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._effective_seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.seed is not None and self.seed != state_dict["seed"]:
            raise argument_error(
                "ExactResume",
                "seed",
                self.seed,
                f"the checkpoint was written with seed {state_dict['seed']}",
                "Leave seed out to continue that run, or start a new one without ckpt_path",
            )
        self._effective_seed = state_dict["seed"]


def _name_what_ran_early(trainer: pl.Trainer, place: Place) -> None:
    """Lightning ends an epoch where ``max_steps`` does, and once more when the run is prolonged."""
    module: Any = trainer.lightning_module
    names = [
        type(each).__name__
        for each in (module, *callbacks_of(trainer))
        if not type(each).__module__.startswith(("lightning.", "lightning_align."))
        and lightning_resume.has_own_hook(each, "on_train_epoch_end")
    ]
    if names:
        rank_zero_warn(
            f"ExactResume: max_steps had ended epoch {place.epoch} after {place.batch} batches, and"
            f" on_train_epoch_end of {names} was called; it will be called again at its end."
            " A run that had not been stopped comes to it only there."
        )


def _nothing() -> None:
    """No hook waits."""
