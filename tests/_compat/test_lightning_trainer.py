"""One test for each private API we touch: what we rely on, on the pinned versions."""

import inspect
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.compile import from_compiled
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_align._compat import lightning_trainer
from tests.helpers.resume import HandWritten, SequenceData


class Watch(pl.Callback):
    """Notes what the private APIs say after every batch."""

    def __init__(self) -> None:
        self.accumulating: list[bool] = []
        self.starts: list[int | None] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.accumulating.append(lightning_trainer.is_accumulating(trainer))
        self.starts.append(trainer.datamodule.train_sampler.start)
        if len(self.starts) == 2:
            lightning_trainer.restart_train_iteration(trainer)
            self.starts.append(trainer.datamodule.train_sampler.start)


def watched() -> Watch:
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=5,
        limit_val_batches=0,
        accumulate_grad_batches=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(HandWritten(), SequenceData())
    return watch


def test_is_accumulating_is_false_exactly_after_an_optimizer_step() -> None:
    assert watched().accumulating == [True, True, False, True, False]


def test_restart_train_iteration_makes_the_sampler_read_the_position_again() -> None:
    assert watched().starts[:3] == [0, 0, 2]


def test_an_average_leaves_out_the_step_to_come_and_takes_the_next() -> None:
    trainer, average = pl.Trainer(logger=False, enable_checkpointing=False), EMAWeightAveraging()
    trainer.callbacks.append(average)
    module, taken = torch.nn.Linear(1, 1), list[bool]()
    average._average_model = AveragedModel(module)
    lightning_trainer.leave_step_to_no_average(trainer)
    for step in (1, 2):
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.completed = step
        before = int(average._average_model.n_averaged)
        average.on_train_batch_end(trainer, module, None, None, 0)
        taken.append(int(average._average_model.n_averaged) > before)
    assert taken == [False, True]


def test_transferred_is_what_the_step_gets() -> None:
    class Doubling(HandWritten):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "doubled": batch["input_ids"] * 2}

    equal = []

    class Compare(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, module: Any, batch: Any, index: int
        ) -> None:
            ours = lightning_trainer.transferred(trainer, trainer.datamodule.one)
            equal.append(all(torch.equal(ours[name], batch[name]) for name in batch))

    class Data(SequenceData):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.one = {n: v for n, v in batch.items() if n != "doubled"}
            return batch

    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(
        max_steps=2, limit_val_batches=0, accelerator="cpu", callbacks=[Compare()], **options
    )
    trainer.fit(Doubling(), Data())
    assert equal == [True, True]


def test_built_by_cli_sees_the_context_of_lightning_cli() -> None:
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

    assert not lightning_trainer.built_by_cli()
    with _given_hyperparameters_context({"lr": 1.0}, "instantiator"):
        assert lightning_trainer.built_by_cli()


def test_lightning_puts_the_hyperparameters_of_a_checkpoint_over_the_configuration() -> None:
    """If that method is gone or renamed, ``AlignCLI`` overrides nothing."""
    from lightning.pytorch.cli import LightningCLI

    from lightning_align.cli.app import AlignCLI

    assert "hyper_parameters" in inspect.getsource(LightningCLI._parse_ckpt_path)
    assert AlignCLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path


class Layered(pl.LightningModule):
    """Two layers, of which one is frozen from the second batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.upper(self.lower(batch)).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WrapAgain(pl.Callback):
    """Freezes the lower layer, wraps again, and notes what becomes of both wrappers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            pl_module.lower.requires_grad_(False)
            pl_module.upper.weight.data += trainer.global_rank  # nothing may be sent to the others
            old = weakref.ref(trainer.strategy.model)
            lightning_trainer.wrap_in_ddp_again(trainer.strategy, pl_module)
            gone = old() is None  # and with it its buckets, which are as large as all gradients
            difference = float(trainer.strategy.reduce(pl_module.upper.weight.mean(), None, "sum"))
            theirs = 2 * float(pl_module.upper.weight.mean())
            note = {"gone": gone, "kept": abs(difference - theirs) > 0.9}
            (self.folder / f"rank.{trainer.global_rank}").write_text(json.dumps(note))
            assert trainer.strategy._ddp_kwargs == {}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        gradients = trainer.strategy.all_gather(pl_module.upper.weight.grad)
        assert torch.equal(gradients[0], gradients[1])  # reduced, before and after


def test_wrap_in_ddp_again_leaves_nothing_of_the_old_wrapper(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy="ddp_fork",
        devices=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[WrapAgain(tmp_path)],
    )
    trainer.fit(Layered(), DataLoader(torch.randn(12, 3), batch_size=2))
    notes = [json.loads((tmp_path / f"rank.{rank}").read_text()) for rank in range(2)]
    assert notes == [{"gone": True, "kept": True}] * 2


def test_has_comm_state_is_of_ddp_alone() -> None:
    assert not lightning_trainer.has_comm_state(SingleDeviceStrategy())
    assert not lightning_trainer.has_comm_state(DDPStrategy())
    assert lightning_trainer.has_comm_state(DDPStrategy(ddp_comm_state=object()))


def test_current_hook_is_the_one_that_runs(tmp_path: Path) -> None:
    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.at_the_end = lightning_trainer.current_hook(trainer)

        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            self.before_the_step = lightning_trainer.current_hook(trainer)

    asks, quiet = Asks(), {"logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", callbacks=[asks], enable_checkpointing=False, **quiet
    )
    trainer.fit(HandWritten(), SequenceData())
    assert asks.at_the_end == "on_train_batch_end"
    assert asks.before_the_step == "on_before_optimizer_step"


def test_a_value_that_the_step_has_logged_is_corrected(tmp_path: Path) -> None:
    """By ``configure_gradient_clipping``, which is the hook behind the one that has logged it."""

    class Corrects(Layered):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log("seen", torch.tensor(1.0 + self.global_step))

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            if self.global_step == 1:
                lightning_trainer.correct_step_value(self, "seen", torch.tensor(-1.0))
            lightning_trainer.correct_step_value(self, "never logged", torch.tensor(-1.0))

    logged = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            logged.append(trainer.callback_metrics["seen"].item())

    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", callbacks=[Notes()], **options)
    trainer.fit(Corrects(), DataLoader(torch.ones(3, 3)))
    assert logged == [1.0, -1.0, 3.0]


def test_which_optimizers_unscale_by_themselves() -> None:
    weight = [torch.nn.Parameter(torch.ones(1))]
    assert lightning_trainer.unscales(torch.optim.AdamW(weight, fused=True))
    assert not lightning_trainer.unscales(torch.optim.AdamW(weight))


def test_a_module_that_was_compiled_as_a_whole() -> None:
    module: Any = pl.LightningModule()
    assert not lightning_trainer.is_compiled_whole(module)
    # By its code: to compile takes seconds.
    assert "orig_module._compiler_ctx = {" in inspect.getsource(from_compiled)
    module._compiler_ctx = {"compiler": "dynamo"}
    assert lightning_trainer.is_compiled_whole(module)


class InContext(pl.Callback):
    """Has the second batch run in a context; notes when it was entered."""

    def __init__(self) -> None:
        self.happened: list[str] = []

    @contextmanager
    def _context(self) -> Iterator[None]:
        self.happened.append("enter")
        yield
        self.happened.append("leave")

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.happened.append("batch")
        if args[-1] == 1:
            self.undo = lightning_trainer.run_steps_in(trainer, self._context)

    def on_before_backward(self, *args: Any) -> None:
        self.happened.append("backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.happened.append("step")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if args[-1] == 1:
            self.undo()


def test_a_batch_runs_in_a_context_from_forward_to_update() -> None:
    seen = InContext()
    trainer = pl.Trainer(
        max_steps=3,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
    )
    trainer.fit(HandWritten(), SequenceData())
    plain = ["batch", "backward", "step"]
    assert seen.happened == [*plain, "batch", "enter", "backward", "step", "leave", *plain]


def test_fetches_are_watched_until_it_is_undone() -> None:
    seen: list[str] = []

    class Fetches(pl.Callback):
        undo: Any = None

        def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
            ends = (lambda: seen.append("begin"), lambda: seen.append("end"))
            self.undo = lightning_trainer.watch_fetches(trainer, *ends)

        def on_train_batch_start(self, *_: Any) -> None:
            seen.append("batch")

        def on_train_epoch_end(self, *_: Any) -> None:
            self.undo()

    trainer = pl.Trainer(
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Fetches()],
    )
    trainer.fit(HandWritten(), SequenceData())
    assert seen == ["begin", "end", "batch"] * 2 + ["batch"] * 2


def test_a_finder_knows_the_attribute_that_it_was_told() -> None:
    assert lightning_trainer.rate_attribute(LearningRateFinder(attr_name="mine")) == "mine"
    assert lightning_trainer.rate_attribute(LearningRateFinder()) == ""


def test_who_writes_one_file() -> None:
    for parts in (True, False):
        strategy = ModelParallelStrategy(save_distributed_checkpoint=parts)
        assert lightning_trainer.writes_one_file(strategy) is not parts
