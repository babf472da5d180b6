"""Make a resumed run bit-identical to one that never stopped, whatever writes the checkpoint."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_align._compat import lightning_quiet, lightning_resume, torch_dcp
from lightning_align._declared import declared
from lightning_align._errors import argument_error
from lightning_align.offload import linked
from lightning_align.run.callbacks import put_first
from lightning_align.run.capture import Keeper
from lightning_align.run.loader import PositionedLoader
from lightning_align.run.position import Place, batches_consumed
from lightning_align.run.protocols import batch_cutter, seed_of
from lightning_align.run.replicas import replica
from lightning_align.run.rng import reseed
from lightning_align.run.settings import LeftOut, refuse_short_schedule
from lightning_align.run.sharded_optimizers import making_no_state, taking_up_what_was_saved
from lightning_align.run.skipping import Skipping


@declared
class ExactResume(Callback):
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
        self.keeper = Keeper()  # of the latest fit
        self.skipping = Skipping()
        self._left_out = LeftOut()  # by DDP

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lightning_quiet.begin()
        if self.seed is None:
            ours = seed_of(trainer)
            seed = ours if ours is not None else os.environ.get("PL_GLOBAL_SEED", 0)
            self._effective_seed = int(seed)
        self.skipping.follow(trainer)
        lightning_resume.widen_before_restoring(trainer, pl_module)
        # Lightning looks for a stateful loader; whatever it finds, we make it follow the position.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that")
        lightning_resume.wrap_train_loaders(trainer, partial(self._follow, trainer))
        # First in line, so that what other callbacks draw for a batch follows the position too.
        put_first(trainer, self)
        lightning_resume.call_before_saving(trainer, lambda: self.keeper.module_hook())
        lightning_resume.read_checkpoints(trainer, _read_linked)
        lightning_resume.around_sharded_optimizers(
            trainer, taking_up_what_was_saved, making_no_state, torch_dcp.by_name
        )

    def _follow(self, trainer: Trainer, loaders: Any) -> PositionedLoader:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        return PositionedLoader(
            loaders,
            seed=lambda: self._effective_seed,
            place=lambda: self._place(trainer),
            consumed=lambda: int(progress.processed),
            position=lambda: batches_consumed(trainer),
            replica=replica(trainer),
            skipped=lambda: self.skipping.ranges,
            ended=self.skipping.ended,
            cut=batch_cutter(trainer),
        )

    def _place(self, trainer: Trainer) -> Place:
        """Where an epoch that begins now takes its first batch."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        return self.keeper.place or Place(int(progress.processed), 0)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keeper.begin(trainer, pl_module)
        self._left_out.warn_of_thawed(trainer, pl_module)  # it has just been wrapped

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.keeper.attributes is not None
        self.keeper.attributes.note_sanity_check(begins=True)

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.keeper.attributes is not None
        self.keeper.attributes.note_sanity_check(begins=False)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        back = partial(self.keeper.put_back, trainer, pl_module)
        lightning_resume.call_before_epochs(trainer, back)
        self.keeper.load(trainer)
        refuse_short_schedule(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.keeper.epoch_is_open:
            self.keeper.epoch_is_open = False
            lightning_resume.begin_epoch(trainer)  # the one before had no batch to train
        self._reseed(trainer, "epoch")

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._reseed(trainer, "train")
        self._left_out.warn_of_thawed(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reseed(trainer, "validate")

    def _reseed(self, trainer: Trainer, stage: str) -> None:
        position = self.skipping.ranges.position_of(batches_consumed(trainer))
        reseed(self._effective_seed, position, replica(trainer)[1], stage)

    # Lightning calls the module's hooks behind those of callbacks that save, and on a resume not at
    # all: what they do for that batch, or that validation, would be lost.

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        hook, given = "on_train_batch_end", (outputs, batch, batch_idx)
        self.keeper.module_hook = lightning_resume.offer_module_hook(trainer, hook, *given)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            hook = lightning_resume.offer_module_hook(trainer, "on_validation_end")
            self.keeper.module_hook = hook

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.keeper.write(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and "loops" in checkpoint:
            self.keeper.read(checkpoint)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        lightning_resume.wrap_train_loaders(trainer, None)
        lightning_resume.call_before_saving(trainer, None)
        lightning_resume.read_checkpoints(trainer, None)
        self.keeper.end()
        lightning_quiet.end()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        lightning_quiet.end()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._effective_seed, **self.skipping.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.seed is not None and self.seed != state_dict["seed"]:
            rule = f"the checkpoint was written with seed {state_dict['seed']}"
            way_out = "Leave seed out to continue that run, or start a new one without ckpt_path"
            raise argument_error("ExactResume", "seed", self.seed, rule, way_out)
        self._effective_seed = state_dict["seed"]
        self.skipping.load_state_dict(state_dict)


def _read_linked(path: Any, weights_only: bool | None) -> dict[str, Any] | None:
    """A folder that ZeROInfinityStrategy has saved."""
    if not linked.is_linked(Path(path)):
        return None
    return linked.read(Path(path), "ExactResume", weights_only=weights_only)
