"""Make a resumed run bit-identical to one that never stopped, whatever writes the checkpoint."""

import os
import warnings
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_align._compat import restart_train_iteration
from lightning_align._errors import argument_error
from lightning_align.run.position import batches_consumed
from lightning_align.run.rng import reseed
from lightning_align.run.state import capture_accumulation, restore_accumulation

_WINDOW_KEY = "lightning_align.accumulation"


class ExactResume(pl.Callback):
    """Tie randomness to the position of the run and keep gradients of an open accumulation window.

    Before every training batch Python's, NumPy's and torch's generators are seeded from (seed,
    batches consumed, rank), so dropout and every other draw are the same after a kill and
    ``fit(ckpt_path=...)``. Our modules bring this callback themselves; add it to the Trainer of a
    LightningModule of your own. Costs microseconds a step and nothing in the checkpoint but the
    seed.

    Args:
        seed: Seed of the run; by default the datamodule's ``seed``, else the one of
            ``seed_everything``, else 0.

    Raises:
        ValueError: If ``seed`` is negative, or a checkpoint was written with another explicit seed.

    Example:
        >>> callback = ExactResume(seed=1)

    Note: the order of the data must follow the position too: use our datamodules, or a DataLoader
    with ``lightning_align.data.PositionSampler``. Epoch means of logged values are outside the
    contract.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise argument_error("ExactResume", "seed", seed, "must not be negative")
        self.seed = seed
        self._effective_seed = seed or 0
        self._windows: list[Any] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.seed is None:
            ours = getattr(getattr(trainer, "datamodule", None), "seed", None)
            self._effective_seed = int(
                ours if ours is not None else os.environ.get("PL_GLOBAL_SEED", 0)
            )
        if hasattr(getattr(trainer, "datamodule", None), "position"):
            # Lightning looks for a stateful loader; ours follows the position instead.
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that")
        # First in line, so that what other callbacks draw for a batch follows the position too.
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]  # type: ignore[attr-defined]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restore_accumulation(trainer, pl_module, self._windows)
        self._windows = []
        # Reading trainer.estimated_stepping_batches in configure_optimizers starts the loader
        # before Lightning has restored the position: workers would already hold the wrong batches.
        data = getattr(trainer, "datamodule", None)
        start = getattr(getattr(data, "train_sampler", None), "start", None)
        if start is not None and start != getattr(data, "position", start):
            restart_train_iteration(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        reseed(self._effective_seed, batches_consumed(trainer), trainer.global_rank, "train")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reseed(self._effective_seed, batches_consumed(trainer), trainer.global_rank, "validate")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if windows := capture_accumulation(trainer, pl_module):
            checkpoint[_WINDOW_KEY] = windows

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._windows = checkpoint.get(_WINDOW_KEY, [])

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
