"""What decides the next step of a run: taken as one state, and put back in one order.

==============================================  ============================================
what                                            who takes it and puts it back
==============================================  ============================================
parameters, buffers, optimizers, schedulers,    Lightning, in any checkpoint
scaler, counters of the loops, callbacks,
datamodule, loaders that have a state
what hooks of an epoch's beginning have set     settings.py
attributes that the run has changed             attributes.py
gradients that wait, with their sums            accumulation.py
sums behind epoch means, metrics, monitors      epoch_means.py
randomness and the order of the data            nobody: functions of the position (rng.py,
                                                loader.py), which is one of the counters
==============================================  ============================================

There are two pairs. ``Keeper.write`` adds what Lightning leaves out to a checkpoint, as parts of
all ranks, and a resumed run takes it up by ``read`` (before Lightning takes up its part), ``load``
(when training starts) and ``put_back`` (before the first epoch). ``capture`` and ``restore`` do the
same in memory and in mid-fit, each rank with what it holds. All of them go through the same parts.

The order in which parts are put back:

1.  The module's own hook of the batch runs first. It is a part of the batch, and Lightning comes to
    it only behind those of the callbacks, of which one may save, capture or restore.
2.  Lightning's part, counters included: all that follows reads them. On a resume they are edited
    before, for Lightning leaves out what a saved batch still had before it (position.py), and the
    loader is begun anew, for the hooks of the first epoch.
3.  Settings. They can refuse a window, and so far nothing of ours has changed. On a resume the
    hooks of the start of training have run, which set them anew, and attributes too.
4.  Attributes. One may be the dictionary that the sums of a window are in.
5.  The window, into gradients and sums that are the final objects now.
6.  Means, and what monitors see.
7.  On a resume: the schedulers that had yet to be stepped. They read what monitors see.
8.  In mid-fit: the loader, last, since its workers are copies of this process.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_align._compat import lightning_resume
from lightning_align._compat.lightning_resume import validation_follows
from lightning_align._compat.lightning_trainer import (
    current_hook,
    has_comm_state,
    restart_train_iteration,
)
from lightning_align._compat.torch_modules import outside_of_modes
from lightning_align._errors import argument_error
from lightning_align.checkpointing.structure import Copier
from lightning_align.mapped import source_of
from lightning_align.run import accumulation, epoch_means, own_parts, position, settings
from lightning_align.run.accumulation import WINDOW_KEY
from lightning_align.run.attributes import Attributes, Plain
from lightning_align.run.callbacks import callbacks_of
from lightning_align.run.loader import PositionedLoader
from lightning_align.run.position import Place, batches_consumed, epoch_is_open, next_place
from lightning_align.run.protocols import (
    SnapshotsOwnPart,
    began_elsewhere,
    leaves_sharding,
    restores_in_fit,
)
from lightning_align.run.settings import Settings, restore_settings, settings_in_force
from lightning_align.run.skipping import begin_anew_in_epoch, keep_skipping

_MEANS_KEY = "lightning_align.epoch_means"
_PLATEAU_KEY = "lightning_align.plateau"
_FOLLOWS_KEY = "lightning_align.follows"  # whether a batch had its end before it, when saved
_SETTINGS_KEY = "lightning_align.settings"
_ATTRIBUTES_KEY = "lightning_align.attributes"
_KEYS = (WINDOW_KEY, _MEANS_KEY, _PLATEAU_KEY, _FOLLOWS_KEY, _SETTINGS_KEY, _ATTRIBUTES_KEY)


def _nothing() -> None:
    """Nothing waits."""


class Keeper:
    """What ExactResume keeps of a fit: how it began, and what of a checkpoint is to be put back.

    Attributes:
        attributes: How the module's attributes began; None before the first fit.
        module_hook: Runs the module's hook of this batch, unless it has run.
        place: Where the next batch comes from, where it is not the beginning of an epoch.
        epoch_is_open: Whether an epoch goes on behind its last batch.
    """

    def __init__(self) -> None:
        self.attributes: Attributes | None = None
        self.module_hook: Callable[[], None] = _nothing
        self.place: Place | None = None
        self.epoch_is_open = False
        self._start: Settings = {}  # settings with which the fit began
        self._saved: dict[str, Any] = {}  # what of the checkpoint is yet to be put back
        self._ended_early: Place | None = None  # its place, if the end of its epoch has been there

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how a fit begins, before any hook of the start of training."""
        self._start = settings_in_force(trainer, pl_module)
        self.attributes = Attributes(trainer, pl_module)

    def end(self) -> None:
        """Forget what belongs to a fit, but for how it began."""
        self.module_hook, self._saved, self.epoch_is_open = _nothing, {}, False

    def write(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out to a checkpoint, of all ranks. Collective."""
        module = trainer.lightning_module
        if windows := accumulation.capture_accumulation(trainer, module):
            checkpoint[WINDOW_KEY] = windows
        checkpoint[_MEANS_KEY] = epoch_means.capture_means(trainer, module)
        checkpoint[_FOLLOWS_KEY] = accumulation.validation_is_to_do(trainer)
        checkpoint[_PLATEAU_KEY] = accumulation.pending_plateau(trainer)
        if self.attributes is None:
            return
        now = settings_in_force(trainer, module)
        checkpoint[_SETTINGS_KEY] = {"start": self._start, "now": now}
        checkpoint[_ATTRIBUTES_KEY] = self.attributes.changed()

    def read(self, checkpoint: dict[str, Any]) -> None:
        """Take up a checkpoint, and let Lightning's counters say what is left of its batch."""
        self._saved = {key: checkpoint[key] for key in _KEYS if key in checkpoint}
        loop = checkpoint["loops"]["fit_loop"]
        self.place = next_place(loop)
        self._ended_early = None
        if self.place.batch > 0 and not epoch_is_open(loop):
            self._ended_early = self.place
        at_last = loop["epoch_loop.batch_progress"]["is_last_batch"]
        self.epoch_is_open = at_last and _FOLLOWS_KEY in checkpoint and epoch_is_open(loop)
        if checkpoint.get(_FOLLOWS_KEY):
            position.leave_validation_to_do(loop)
        elif self.place.batch == 0 and at_last and not self.epoch_is_open:
            position.close_epoch(loop)

    def load(self, trainer: pl.Trainer) -> None:
        """Let the loader begin where the checkpoint goes on, and loops without one at a start."""
        pending = lightning_resume.load_pending_loader_states(trainer)
        loaders = lightning_resume.train_loaders(trainer)
        if isinstance(loaders, PositionedLoader) and (
            pending or (self.place and loaders.started != self.place)
        ):
            restart_train_iteration(trainer)
        if self._ended_early is not None:
            _name_what_ran_early(trainer, self._ended_early)
        if self.place is None:
            position.begin_interrupted_epoch_anew(trainer)
        elif self.place.batch == 0 and not self.epoch_is_open:
            lightning_resume.begin_epoch(trainer)
        self.place = self._ended_early = None
        # Reading trainer.estimated_stepping_batches in configure_optimizers starts the loader
        # before Lightning has restored the position: workers would already hold the wrong batches.
        if began_elsewhere(trainer):
            restart_train_iteration(trainer)

    def put_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put back what a checkpoint holds, once all hooks of the start have run."""
        assert self.attributes is not None
        self.attributes.begin()
        saved, self._saved = self._saved, {}
        windows = saved.get(WINDOW_KEY, [])
        if _SETTINGS_KEY in saved:
            before, then = saved[_SETTINGS_KEY]["start"], saved[_SETTINGS_KEY]["now"]
            restore_settings(
                trainer, pl_module, (before, then), self._start, window_is_open=bool(windows)
            )
        if saved:
            settings.resume_averaging(trainer)
        self.attributes.restore(saved.get(_ATTRIBUTES_KEY, []))
        accumulation.restore_accumulation(trainer, pl_module, windows)
        epoch_means.restore_means(trainer, pl_module, saved.get(_MEANS_KEY, []))
        interval = saved.get(_PLATEAU_KEY, "")
        validation_steps = saved.get(_FOLLOWS_KEY) and validation_follows(trainer)
        if interval and not (interval == "step" and validation_steps):
            lightning_resume.step_plateau_schedulers(trainer, interval)
        if self.epoch_is_open:
            lightning_resume.finish_epoch(trainer)


@dataclass(frozen=True)
class RunState:
    """A state of a run in host memory, on this rank.

    Args:
        position: Training batches that are part of it.
        checkpoint: Lightning's part, as in a checkpoint.
        settings: What hooks of an epoch's beginning had set.
        attributes: Of the module, as plain data.
        window: Gradients that waited for their optimizer step.
        means: Sums behind epoch means, and what monitors saw.
        should_stop: Whether something had asked the trainer to stop.
        fit: What is the same object within a fit.
    """

    position: int
    checkpoint: dict[str, Any]
    settings: Settings
    attributes: Plain
    window: accumulation.Window
    means: epoch_means.Means
    should_stop: bool
    fit: object


def capture(trainer: pl.Trainer, *, copy: bool = True) -> RunState:
    """Everything that decides the next step, copied to host memory.

    What ``ZeROInfinityStrategy`` has on disk stays there, and takes no memory: the state holds its
    files, so that each block which is updated from then on takes the disk of one more file, 12
    bytes a parameter with AdamW in fp32, until the state is dropped.

    To be called on each rank in ``on_train_batch_end``, of a callback or of the module: there a
    batch is part of the weights and the next one has not begun. What callbacks behind the one that
    calls it do in that hook is no part of the state.

    Args:
        trainer: Who fits. It must have ``ExactResume``, which our modules bring themselves.
        copy: Whether to copy; otherwise the state shows what training is about to change, for
            whoever copies it before the hook ends.

    Raises:
        ValueError: If it is called elsewhere, if ranks hold parts that their strategy cannot put
            back, or if a callback cannot go back.
    """
    keeper, attributes = _keeper(trainer, "capture")
    module, copied = trainer.lightning_module, _copied if copy else _as_it_is
    keeper.module_hook()
    with _own_part(trainer.strategy):
        with _only_those_that_go_back(trainer):
            checkpoint = lightning_resume.dump_checkpoint(trainer, weights_only=False)
        return RunState(
            position=batches_consumed(trainer),
            checkpoint=copied(checkpoint),
            settings=settings_in_force(trainer, module),
            attributes=copied(attributes.now()),
            window=accumulation.own_window(trainer, module),
            means=epoch_means.own_means(trainer, module),
            should_stop=trainer.should_stop,
            fit=attributes,
        )


def restore(
    trainer: pl.Trainer,
    state: RunState,
    *,
    copy: bool = True,
    before_loader: Callable[[], Any] = _nothing,
) -> None:
    """Go on from a state of this fit as if nothing had come after it.

    To be called on each rank, by what has called ``capture`` and in the same hook. The next batch
    is the one that followed the state, with the same draws; a validation that followed it follows
    again. The state may be of an earlier epoch, and stays as it is for another ``restore``.

    What has gone out stays: lines of loggers and files, and what ``ModelCheckpoint`` and
    ``AsyncCheckpoint`` know of their files. The number that loggers count their lines by goes on,
    for some drop a line that goes back.

    Args:
        trainer: Who fits.
        state: From ``capture``, on this rank.
        copy: Whether the state stays as it is; otherwise it is used up, and takes no more memory.
        before_loader: Called when all but the training loader is back, which then begins anew.

    Raises:
        ValueError: If it is called where ``capture`` must not be, or if the state is of another fit
            or of loaders that ``reload_dataloaders_every_n_epochs`` has replaced since.
    """
    keeper, attributes = _keeper(trainer, "restore")
    _check_state(trainer, state, attributes)
    module = trainer.lightning_module
    place = next_place(state.checkpoint["loops"]["fit_loop"])
    keeper.module_hook()
    checkpoint = _copied(state.checkpoint) if copy else state.checkpoint
    with _own_part(trainer.strategy):
        with keep_skipping(trainer), _only_those_that_go_back(trainer):
            loaders = lightning_resume.restore_in_fit(trainer, checkpoint)
        trainer.should_stop = state.should_stop
        same = (state.settings, state.settings)  # a fit begins once: every setting goes back
        restore_settings(trainer, module, same, state.settings, window_is_open=bool(state.window))
        attributes.replace(state.attributes)
        accumulation.replace_window(trainer, module, state.window)
        epoch_means.replace_means(trainer, module, state.means)
    before_loader()
    if place.batch > 0:  # or the epoch is at its end, and the next one begins the loader
        keeper.place = place
        begin_anew_in_epoch(trainer, loaders)
        keeper.place = None


def _keeper(trainer: pl.Trainer, function: str) -> tuple[Keeper, Attributes]:
    """What ExactResume keeps of this fit.

    Raises:
        ValueError: If the state is not whole here and now.
    """
    if (hook := current_hook(trainer)) != "on_train_batch_end":
        rule = "a state is whole at the end of a training batch only"
        way_out = "Call it in on_train_batch_end. Before an optimizer step that is not to be, set"
        way_out += " parameter.grad = None, and restore at the end of that batch"
        raise argument_error(function, "hook", hook, rule, way_out)
    check_goes_back(trainer, function)
    callbacks = callbacks_of(trainer)
    keeper = next(filter(None, map(_kept, callbacks)), None)
    if keeper is None or keeper.attributes is None:
        rule = "without ExactResume data and randomness do not follow the position"
        names = [type(callback).__name__ for callback in callbacks]
        raise argument_error(function, "callbacks", names, rule, "Add ExactResume()")
    return keeper, keeper.attributes


def check_goes_back(trainer: pl.Trainer, where: str) -> None:
    """Refuse a run that cannot go back to an earlier batch, as far as is known at set-up.

    Args:
        trainer: Who fits.
        where: Who asks, as the message begins.

    Raises:
        ValueError: If ranks hold parts of the state, or a callback cannot go back.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging):
            name = type(callback).__name__
            rule = "it takes up its averages where a fit begins, and not in it"
            raise argument_error(where, "callbacks", name, rule, "Use EMAWeightAveraging")
    if has_comm_state(trainer.strategy):
        name = type(trainer.strategy).__name__
        rule = "the state of its communication hook would stay as it is"
        raise argument_error(where, "strategy", name, rule, "Leave ddp_comm_state out")
    if not restores_in_fit(trainer.strategy):
        name = type(trainer.strategy).__name__
        rule = "its ranks hold parts of the model, and a state is whole on each rank"
        way_out = "Train in one process or with strategy='ddp', or save checkpoints and resume"
        raise argument_error(where, "strategy", name, rule, way_out)
    for optimizer in trainer.optimizers if trainer.world_size > 1 else ():
        if hasattr(optimizer, "consolidate_state_dict"):  # as ZeroRedundancyOptimizer has
            name, rule = type(optimizer).__name__, "each rank holds a part of its state"
            raise argument_error(where, "optimizer", name, rule, "Take one that is not sharded")


def _check_state(trainer: pl.Trainer, state: RunState, attributes: Attributes) -> None:
    """Refuse a state that this fit cannot go back to.

    Raises:
        ValueError: If it cannot.
    """
    if state.fit is not attributes:
        rule = "it is of another fit"
        way_out = "Capture anew in on_train_batch_end, or resume from a checkpoint"
        raise argument_error("restore", "state", f"position {state.position}", rule, way_out)
    every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if every and state.checkpoint["epoch"] != trainer.current_epoch:
        rule = f"the loaders may be others than those of epoch {state.checkpoint['epoch']}"
        way_out = "Leave it out, or go back within an epoch only"
        raise argument_error("restore", "reload_dataloaders_every_n_epochs", every, rule, way_out)


def _that_go_back(trainer: pl.Trainer) -> list[pl.Callback]:
    """Callbacks whose state is the run's; that of those which write files is the files'."""
    return [c for c in callbacks_of(trainer) if not (isinstance(c, Checkpoint) or _kept(c))]


def _only_those_that_go_back(trainer: pl.Trainer) -> AbstractContextManager[None]:
    return lightning_resume.only_callbacks(trainer, _that_go_back(trainer))


@contextmanager
def _own_part(strategy: Strategy) -> Iterator[None]:
    """Let each rank put together, and take up, what is its own of model and optimizer."""
    take: Callable[[], dict[str, Any]]
    put: Callable[[Mapping[str, Any]], None]
    if isinstance(strategy, SnapshotsOwnPart):
        take, put = strategy.snapshot_state, strategy.restore_state
    elif leaves_sharding(strategy):
        take = partial(own_parts.snapshot_state, strategy)
        put = partial(own_parts.restore_state, strategy)
    else:
        yield
        return
    # A hook of the user may run in a mode that shows him values of all ranks.
    with lightning_resume.state_in_parts(strategy, take, put), outside_of_modes():
        yield


def _kept(callback: pl.Callback) -> Keeper | None:
    """What a callback keeps, if it is ExactResume."""
    keeper = getattr(callback, "keeper", None)
    return keeper if isinstance(keeper, Keeper) else None


def _copied(state: Any) -> Any:
    """A copy on the host that shares nothing with the run; files go on showing what they show."""
    return Copier({}, {Tensor: _copied_tensor}).copy(state)


def _as_it_is(state: Any) -> Any:
    return state


def _copied_tensor(tensor: Tensor) -> Tensor:
    if tensor.is_meta or source_of(tensor) is not None:
        return tensor
    return tensor.detach().to("cpu", copy=True)


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
