"""One test for each private API that resuming and checkpoints touch, on the pinned versions."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_align._compat import lightning_resume
from tests.helpers.foreign import Resumable, Stranger
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.tiny_models import TINY_MODELS


class At(pl.Callback):
    """Calls a function after every batch and notes what it returns."""

    def __init__(self, function: Any) -> None:
        self.function, self.returned = function, []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.returned.append(self.function(trainer))


def watched(function: Any, module: Any = None, **options: Any) -> tuple[list[Any], pl.Trainer]:
    at = At(function)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[at],
        **quiet,
        **options,
    )
    trainer.fit(module or Stranger())
    return at.returned, trainer


def test_replace_sigterm_notice_leaves_the_handlers_of_others() -> None:
    told = []

    def at_the_first(trainer: pl.Trainer) -> None:
        if trainer.global_step == 1:
            lightning_resume.replace_sigterm_notice(trainer, lambda *_: told.append("ours"))
            os.kill(os.getpid(), signal.SIGTERM)
            assert not trainer.received_sigterm

    before = signal.signal(signal.SIGTERM, lambda *_: told.append("the user's"))
    try:
        watched(at_the_first)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == ["ours", "the user's"]


def test_receive_sigterm_stops_after_the_batch() -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    seen = []

    def at_the_first(trainer: pl.Trainer) -> None:
        seen.append(trainer.global_step)
        assert not trainer.received_sigterm
        lightning_resume.receive_sigterm(trainer)
        assert trainer.received_sigterm

    with pytest.raises(SIGTERMException):
        watched(at_the_first)
    assert seen == [1]


def test_validation_follows_the_batches_it_is_due_after() -> None:
    follows, _ = watched(lightning_resume.validation_follows, val_check_interval=2)
    assert follows == [False, True, False, True, False, True]
    assert not any(watched(lightning_resume.validation_follows, limit_val_batches=0)[0])


def test_a_validation_has_run_once_it_came_to_a_batch() -> None:
    has_run, _ = watched(lightning_resume.validation_has_run, val_check_interval=3)
    assert has_run[:3] == [False, False, False]
    assert all(has_run[3:])
    assert not any(watched(lightning_resume.validation_has_run, limit_val_batches=0)[0])


def test_wrapped_loaders_are_what_lightning_iterates_over() -> None:
    seen: list[Any] = []

    class Wrapping(Stranger):
        def setup(self, stage: str) -> None:
            lightning_resume.wrap_train_loaders(self.trainer, self.wrap)

        def wrap(self, loaders: Any) -> CombinedLoader:
            seen.append(loaders)
            return CombinedLoader([loaders], "min_size")

    _, trainer = watched(lightning_resume.train_loaders, Wrapping())
    assert isinstance(seen[0], DataLoader)
    wrapped = lightning_resume.train_loaders(trainer)
    assert lightning_resume.combined_mode(wrapped) == "min_size"
    lightning_resume.wrap_train_loaders(trainer, None)
    assert isinstance(trainer.fit_loop._data_source.dataloader(), DataLoader)


def test_forgotten_train_loaders_are_asked_for_once_more() -> None:
    _, trainer = watched(lambda trainer: None)
    before = lightning_resume.train_loaders(trainer)
    trainer.fit_loop.setup_data()
    assert lightning_resume.train_loaders(trainer) is before
    lightning_resume.forget_train_loaders(trainer)
    trainer.fit_loop.setup_data()
    assert lightning_resume.train_loaders(trainer) not in (before, None)


def test_call_before_epochs_is_behind_the_start_and_before_an_epoch() -> None:
    order: list[str] = []

    class Starts(Stranger):
        def on_train_start(self) -> None:
            lightning_resume.call_before_epochs(self.trainer, lambda: order.append("called"))
            order.append("start")

        def on_train_epoch_start(self) -> None:
            order.append("epoch")

    _, trainer = watched(lambda trainer: None, Starts())
    assert order == ["start", "called", "epoch"]
    assert "on_advance_start" not in vars(trainer.fit_loop)


class Ends(Stranger):
    """Notes when its hook runs; at batch 2 it saves in it."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.order.append(f"module {batch_idx} {self._current_fx_name}")
        if batch_idx == 2:
            lightning_resume.dump_checkpoint(self.trainer, weights_only=False)


class Early(pl.Callback):
    """Asks for the module's hook at batch 0, and offers it always."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *arguments: Any) -> None:
        early = lightning_resume.offer_module_hook(trainer, "on_train_batch_end", *arguments)
        lightning_resume.call_before_saving(trainer, early)
        lightning_resume.offer_module_hook(trainer, "on_validation_end")()  # it has none
        if arguments[-1] == 0:
            lightning_resume.dump_checkpoint(trainer, weights_only=False)
            lightning_resume.dump_checkpoint(trainer, weights_only=False)
        module.order.append("callback")


def test_a_hook_of_the_module_is_called_once_and_before_a_save() -> None:
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[Early()],
    )
    module = Ends()
    trainer.fit(module)
    hook = "on_train_batch_end"
    first, others = [f"module 0 {hook}", "callback"], [f"module {n} {hook}" for n in (1, 2)]
    assert module.order == [*first, "callback", others[0], "callback", others[1]]
    assert hook not in vars(module)
    lightning_resume.call_before_saving(trainer, None)
    assert "dump_checkpoint" not in vars(trainer._checkpoint_connector)


def test_own_attributes_are_those_a_user_has_not_written() -> None:
    def written(module: torch.nn.Module) -> set[str]:
        return vars(module).keys() - lightning_resume.own_attributes(module)

    class Written(pl.LightningModule):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.count, self.layer = 0, torch.nn.Linear(1, 1)

    toggled = "_param_requires_grad_state"
    assert written(Written(0.1)) == {"count", "_hparams", toggled}
    _, trainer = watched(lambda trainer: None)
    names = {"loader_name", "reads_stepping_batches", "plateau", "_hparams", toggled}
    assert written(trainer.lightning_module) == names
    assert written(torch.nn.Linear(1, 2)) == {"in_features", "out_features"}
    assert not {"mean_value", "_update_count", "_computed"} & written(MeanMetric())


def test_hooks_of_transformers_are_no_attribute_of_the_users() -> None:
    """A model that was said to have them, and has none, gives no hidden states and no error."""
    model = TINY_MODELS["llama"]()
    before = set(vars(model.model))
    model(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    marks = vars(model.model).keys() - before
    assert marks == {"_output_capturing_hooks_installed"}
    assert marks <= lightning_resume.own_attributes(model.model)


def test_lightning_optimizers_are_what_a_module_gets() -> None:
    _, trainer = watched(lambda trainer: None)
    assert lightning_resume.lightning_optimizers(trainer) == [trainer.lightning_module.optimizers()]


def test_training_modes_are_told_during_a_validation_too() -> None:
    modes: list[dict[str, bool]] = []

    class Rests(Stranger):
        def on_validation_end(self) -> None:
            assert not self.body.training
            modes.append(lightning_resume.training_modes(self.trainer))

        def on_train_start(self) -> None:
            self.body[2].eval()

    found, _ = watched(lightning_resume.training_modes, Rests())
    assert found[0] == modes[0]
    assert [name for name, training in found[0].items() if not training] == ["body.2"]


def test_sync_of_buffers_is_ddps_and_off_after_a_batch_without() -> None:
    def on(rank: int) -> list[bool]:
        options = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        options |= {"accumulate_grad_batches": 2, "limit_val_batches": 0}
        found, trainer = watched(lightning_resume.sync_of_buffers, **options)
        return [*found, lightning_resume.sync_of_buffers(trainer, True)]

    assert run_ranks(on)[0][:2] == [False, True]
    assert all(watched(lightning_resume.sync_of_buffers)[0])


def test_averaging_of_a_checkpoint_goes_on_without_new_learning_rates() -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    module = Stranger()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[averaging],
    )
    trainer.fit(module)
    assert not lightning_resume.averaging_in_checkpoint(trainer)
    averaging._scheduler_state = averaging.state_dict()["scheduler_state"]
    assert lightning_resume.averaging_in_checkpoint(trainer) == [averaging]
    averaging._initialized, trainer.fit_loop.epoch_progress.current.completed = False, 1
    groups = trainer.optimizers[0].param_groups
    groups[0]["lr"] = 0.125
    lightning_resume.resume_averaging(trainer, averaging)
    assert averaging._initialized
    assert groups[0]["lr"] == 0.125


@pytest.mark.parametrize("due", [True, False])
def test_finish_epoch_leaves_the_loop_with_what_is_left(due: bool) -> None:
    _, trainer = watched(lambda trainer: None, limit_val_batches=int(due))
    trainer.fit(Stranger())  # its loaders are those of a run
    loop = trainer.fit_loop
    loop._data_fetcher = SimpleNamespace()
    loop.epoch_loop.val_loop._has_run, loop._restarting = False, True
    loop.epoch_loop.batch_progress.current.ready = trainer.num_training_batches
    stepped = loop.epoch_loop._batches_that_stepped
    lightning_resume.finish_epoch(trainer)
    assert not loop.restarting
    assert loop.epoch_loop.val_loop._has_run is not due
    assert loop.epoch_loop._batches_that_stepped == stepped + (not due)


def test_begin_epoch_takes_back_that_the_loop_restarts() -> None:
    _, trainer = watched(lambda trainer: None)
    trainer.fit_loop.epoch_loop.restarting = True
    lightning_resume.begin_epoch(trainer)
    assert not trainer.fit_loop.epoch_loop.restarting


def test_pending_states_of_loaders_are_loaded_once() -> None:
    _, trainer = watched(lambda trainer: None, Stranger("stateful"))
    loop = trainer.fit_loop
    loop._combined_loader_states_to_load = [{"next": 8, "order": list(range(22))}]
    loop.epoch_progress.current.started += 1  # in mid-epoch, or nothing is pending
    loop.restarting = True
    assert lightning_resume.load_pending_loader_states(trainer)
    assert not lightning_resume.load_pending_loader_states(trainer)
    loader = lightning_resume.train_loaders(trainer).flattened[0]
    assert isinstance(loader, Resumable)
    assert loader.next == 8


def test_shut_down_workers_lets_the_next_iteration_start_new_ones() -> None:
    loader = DataLoader(
        list(range(4)), num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    before = iter(loader)
    list(before)
    lightning_resume.shut_down_workers(loader)
    assert iter(loader) is not before
    lightning_resume.shut_down_workers(loader)


def test_checkpoint_dir_and_contents_are_model_checkpoints(tmp_path: Path) -> None:
    _, trainer = watched(lambda trainer: None, default_root_dir=str(tmp_path))
    folder = lightning_resume.resolve_checkpoint_dir(ModelCheckpoint(), trainer)
    assert folder == str(tmp_path / "checkpoints")
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    theirs = torch.load(tmp_path / "theirs.ckpt", weights_only=True)
    ours = lightning_resume.dump_checkpoint(trainer, weights_only=False)
    assert ours.keys() == theirs.keys()
    assert "optimizer_states" not in lightning_resume.dump_checkpoint(trainer, weights_only=True)


def test_what_async_checkpoint_inherits_is_there() -> None:
    callback = ModelCheckpoint(every_n_train_steps=3)
    assert callback._every_n_train_steps == 3
    assert callback._every_n_epochs == 0
    assert callback._train_time_interval is None
    assert callback._last_global_step_saved == 0
    inherited = ("_monitor_candidates", "_should_save_on_train_epoch_end", "_find_last_checkpoints")
    for name in (*inherited, "_should_save_on_exception"):
        assert callable(getattr(callback, name))


def test_wandb_logger_without_an_id_goes_on_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    new, chosen = WandbLogger(offline=True), WandbLogger(offline=True, id="chosen")
    trainer = pl.Trainer(accelerator="cpu", logger=[new, chosen], enable_checkpointing=False)
    lightning_resume.continue_wandb_run(trainer, "before")
    assert new._wandb_init["id"] == new.version == "before"
    assert new._wandb_init["resume"] == "allow"
    assert chosen._wandb_init["id"] == "chosen"
    assert lightning_resume.wandb_run_id(trainer) == "before"
    monkeypatch.setitem(os.environ, "WANDB_RUN_ID", "of the environment")
    other = WandbLogger(offline=True)
    trainer.loggers = [other]
    lightning_resume.continue_wandb_run(trainer, "before")
    assert other._wandb_init["id"] is None


def test_restore_in_fit_puts_back_lightnings_part_and_loops_do_not_restart() -> None:
    dumped: dict[str, Any] = {}

    def back_from_the_fourth(trainer: pl.Trainer) -> tuple[int, int, bool]:
        loop = trainer.fit_loop
        if trainer.global_step == 2 and not dumped:
            dumped.update(lightning_resume.dump_checkpoint(trainer, weights_only=False))
        if trainer.global_step == 4 and dumped["global_step"]:
            states = lightning_resume.restore_in_fit(trainer, dumped)
            lightning_resume.restart_in_epoch(trainer, states)
            dumped["global_step"] = 0
        fetched: int = loop._data_fetcher.fetched  # type: ignore[union-attr]
        return trainer.global_step, fetched, loop.restarting or loop.epoch_loop.restarting

    returned, _ = watched(back_from_the_fourth)
    steps = [1, 2, 3, 2, 3, 4, 5, 6]
    assert returned == [(step, step, False) for step in steps]


def test_only_callbacks_decides_whose_state_is_dumped() -> None:
    class Stateful(pl.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

    trainer = pl.Trainer(callbacks=[Stateful()], logger=False, enable_checkpointing=False)
    everyone = trainer.callbacks
    with lightning_resume.only_callbacks(trainer, []):
        assert trainer.callbacks == []
    assert trainer.callbacks is everyone


def test_state_in_parts_is_taken_and_put_by_others_and_nobody_is_left_behind() -> None:
    put: list[Any] = []

    def dumped(trainer: pl.Trainer) -> list[Any]:
        (optimizer,) = trainer.optimizers
        own = {"state_dict": {"a": 1}, "optimizer_states": [{"b": 2}]}
        strategy = trainer.strategy
        before = set(vars(strategy))
        with lightning_resume.state_in_parts(strategy, lambda: own, put.append):
            checkpoint = lightning_resume.dump_checkpoint(trainer, weights_only=False)
            strategy.load_model_state_dict(checkpoint, strict=True)
            strategy.load_optimizer_state_dict(checkpoint)
        assert set(vars(strategy)) == before
        assert put.pop() is checkpoint
        assert optimizer.state_dict()["param_groups"]
        return [checkpoint["state_dict"], checkpoint["optimizer_states"]]

    returned, _ = watched(dumped)
    assert returned[0] == [{"a": 1}, [{"b": 2}]]


def test_the_number_that_loggers_count_by_does_not_go_back() -> None:
    dumped: dict[str, Any] = {}
    lines: list[int] = []

    def back_from_the_fourth(trainer: pl.Trainer) -> None:
        lines.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
        if trainer.global_step == 2 and not dumped:
            dumped.update(lightning_resume.dump_checkpoint(trainer, weights_only=False))
        if trainer.global_step == 4 and len(lines) == 4:
            states = lightning_resume.restore_in_fit(trainer, dumped)
            lightning_resume.restart_in_epoch(trainer, states)

    watched(back_from_the_fourth)
    assert lines == list(range(8))
