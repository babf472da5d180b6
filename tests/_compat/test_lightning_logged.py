"""What we rely on in Lightning's records of what is logged, on the pinned version."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torchmetrics import MeanMetric

from lightning_align._compat import lightning_logged
from tests._compat.test_lightning_resume import watched
from tests.helpers.foreign import Stranger


def test_logged_sums_go_over_to_another_trainer_as_plain_data(tmp_path: Path) -> None:
    captured, _ = watched(lightning_logged.capture_logged_sums, limit_train_batches=3)
    torch.save(captured[1], tmp_path / "sums")
    plain = torch.load(tmp_path / "sums", weights_only=True)

    class Continued(Stranger):
        def on_train_start(self) -> None:
            lightning_logged.restore_logged_sums(self.trainer, plain)

    sums, trainer = watched(
        lightning_logged.capture_logged_sums, Continued(), limit_train_batches=1
    )
    key = "training_step.loss"
    assert plain[key]["sums"]["cumulated_batch_size"] == 8
    assert sums[0][key]["sums"]["cumulated_batch_size"] == 12
    assert "seldom" in trainer.callback_metrics, "logged in the second batch only"


def test_metrics_of_the_epoch_and_their_state() -> None:
    found, _ = watched(lightning_logged.logged_metrics_of_epoch)
    assert isinstance(found[0][0], MeanMetric)
    assert not watched(lightning_logged.logged_metrics_of_validation)[0][0], "none runs now"
    ours, theirs = MeanMetric(), MeanMetric()
    theirs.update(torch.tensor([1.0, 2.0]))
    theirs.update(torch.tensor([9.0]))
    lightning_logged.restore_metric(ours, lightning_logged.capture_metric(theirs))
    assert ours.compute() == theirs.compute() == 4.0
    assert ours.update_called


def test_metrics_of_the_validation_that_runs() -> None:
    found: list[Any] = []

    class Measures(Stranger):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.mean_loss.update(1.0)
            self.log("val_metric", self.mean_loss)

        def on_validation_end(self) -> None:
            found.extend(lightning_logged.logged_metrics_of_validation(self.trainer))

    module = Measures()
    watched(lambda trainer: None, module)
    assert found == [module.mean_loss]


def test_what_training_logged_is_told_from_what_validation_logged() -> None:
    metrics = {"loss": torch.tensor(1.0), "val_loss": torch.tensor(2.0)}
    found, _ = watched(lambda trainer: lightning_logged.logged_in_training(trainer, metrics))
    assert list(found[-1]) == ["loss"]


def test_latest_metrics_are_what_monitors_see() -> None:
    _, trainer = watched(lambda trainer: None)
    lightning_logged.latest_metrics(trainer)["planted"] = torch.tensor(3.0)
    assert trainer.callback_metrics["planted"] == 3.0


def test_forgotten_is_all_that_was_logged_in_training() -> None:
    def forget(trainer: Any) -> tuple[int, int]:
        before = len(trainer.fit_loop.epoch_loop._results)
        lightning_logged.forget_logged(trainer)
        return before, len(lightning_logged.capture_logged_sums(trainer))

    counts, _ = watched(forget, limit_train_batches=3)
    assert [after for _, after in counts] == [0, 0, 0]
    assert all(before > 0 for before, _ in counts)


def test_lines_are_numbered_by_steps_and_where_a_run_goes_back_higher() -> None:
    lines: list[tuple[int, int]] = []

    def number(trainer: pl.Trainer) -> None:
        lines.append((lightning_logged.lightnings_line(trainer), trainer.global_step))
        assert lightning_logged.line_number(trainer) == max(lines[-1])
        if trainer.global_step == 4:
            trainer.fit_loop.epoch_loop._batches_that_stepped = 9

    watched(number)
    assert lines == [(0, 1), (1, 2), (2, 3), (3, 4), (10, 5), (11, 6)]


def test_what_is_logged_apart_is_seen_by_nobody() -> None:
    class Twice(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                with lightning_logged.logging_apart(self.trainer):
                    self.log("hidden", 1.0)
                    self.log("loss", 100.0, on_step=True, on_epoch=True, batch_size=4)
                    assert "hidden" in self.trainer.callback_metrics
                assert "hidden" not in self.trainer.callback_metrics
            return super().training_step(batch, batch_idx)

    def seen(kind: type[Stranger]) -> Any:
        pl.seed_everything(1, verbose=False)
        module = kind()
        sums, trainer = watched(lightning_logged.capture_logged_sums, module, limit_train_batches=3)
        return sums, {name: float(value) for name, value in trainer.callback_metrics.items()}

    ours, theirs = seen(Twice), seen(Stranger)
    assert ours[1] == theirs[1]
    assert str(ours[0]) == str(theirs[0])
