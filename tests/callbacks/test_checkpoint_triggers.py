"""When a save is due, and when it is made."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_align import AsyncCheckpoint
from lightning_align.callbacks import checkpoint_triggers
from lightning_align.callbacks.checkpoint_triggers import SaveTriggers, may_save_after
from tests.callbacks.test_async_checkpoint import fit


def rank(broadcast: Any = None, **values: Any) -> Any:
    """As much of a trainer as tells what is due."""
    strategy = SimpleNamespace(broadcast=broadcast)
    return SimpleNamespace(world_size=2 if broadcast else 1, strategy=strategy, **values)


def test_a_step_or_an_epoch_is_due_by_its_number() -> None:
    steps, epochs = SaveTriggers(3, None, 0), SaveTriggers(0, None, 2)
    due = [steps.after_batch(rank(global_step=step)) for step in range(1, 7)]
    assert due == [False, False, True, False, False, True]
    for counts in (True, False):
        ends = [rank(current_epoch=epoch) for epoch in range(4)]
        due = [epochs.after_validation_or_epoch(end, counts) for end in ends]
        assert due == [False, counts, False, counts]
    assert not epochs.after_batch(rank(global_step=6))


def test_time_counts_from_the_start_and_from_the_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 200.0, 205.0, 210.0, 215.0, 221.0))
    stopped = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(checkpoint_triggers, "time", stopped)
    triggers = SaveTriggers(0, timedelta(seconds=10), 0)
    triggers.start()
    due = [triggers.after_batch(rank(global_step=1)) for _ in range(4)]
    assert due == [False, True, False, True]


@pytest.mark.parametrize("answer", [True, False])
def test_the_clock_of_rank_zero_is_that_of_all(answer: bool) -> None:
    triggers = SaveTriggers(0, timedelta(days=1), 0)
    assert triggers.after_batch(rank(lambda ours: answer, global_step=1)) is answer


def test_an_exception_saves_where_all_ranks_have_stopped_between_two_batches() -> None:
    def trainer(ready: int, ranks: int) -> Any:
        current = SimpleNamespace(ready=ready, processed=3)
        epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(current=current))
        return SimpleNamespace(world_size=ranks, fit_loop=SimpleNamespace(epoch_loop=epoch_loop))

    error = ArithmeticError()
    assert may_save_after(trainer(3, 1), error, stopped_together=False)
    assert may_save_after(trainer(3, 2), error, stopped_together=True)
    assert not may_save_after(trainer(3, 2), error, stopped_together=False)
    with pytest.warns(UserWarning, match="ArithmeticError came in the middle of a batch"):
        assert not may_save_after(trainer(4, 1), error, stopped_together=True)


def test_saves_are_deferred_to_safe_points(tmp_path: Path) -> None:
    """At the last batch of an epoch the validation and the end of the epoch come first."""
    order: list[str] = []

    class Order(pl.Callback):
        def on_validation_end(self, *args: Any) -> None:
            order.append("validation")

        def on_train_epoch_end(self, *args: Any) -> None:
            order.append("epoch end")

        def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
            order.append(f"save {trainer.global_step}")

    callback = AsyncCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(Order(), callback, folder=tmp_path, max_epochs=1, val_check_interval=3)
    assert order == ["validation", "save 3", "validation", "epoch end", "save 6"]
