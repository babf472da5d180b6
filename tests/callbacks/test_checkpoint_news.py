"""What is said of checkpoints: by loggers, by warnings, and with verbose by every commit."""

import logging
from pathlib import Path

import pytest

from lightning_align import AsyncCheckpoint
from tests.callbacks.test_async_checkpoint import Noting, Slow, fit, names


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


def test_loggers_hear_of_a_checkpoint_after_its_commit_and_of_its_times(
    tmp_path: Path, slow: Slow
) -> None:
    slow.seconds = 0.05
    logger = Noting()
    callback = AsyncCheckpoint(tmp_path, every_n_train_steps=4)
    fit(callback, folder=tmp_path, logger=logger)
    assert len(logger.told) == 3
    assert min(logger.values("checkpoint/persist_s")) >= 0.0
    assert len(logger.values("checkpoint/persist_s")) == 3
    assert 0 < max(logger.values("checkpoint/stall_s")) < 10
    assert min(logger.values("checkpoint/bytes")) > 1000


def test_failed_writes_are_told_training_goes_on_and_the_old_one_stays(
    tmp_path: Path, slow: Slow
) -> None:
    slow.failing = lambda name: "step=4" not in name
    callback = AsyncCheckpoint(tmp_path, every_n_train_steps=4)
    with pytest.warns(UserWarning, match="Last complete checkpoint") as told:
        made = fit(callback, folder=tmp_path)
    assert made.global_step == 12
    text = "\n".join(str(warning.message) for warning in told)
    assert "'epoch=1-step=8' (step 8) was not written" in text
    assert "No space left on device" in text
    assert "2 of 3 checkpoints of this run were not written. Last complete checkpoint: " in text
    assert names(tmp_path) == {"epoch=0-step=4"}
    assert Path(callback.best_model_path).stem == "epoch=0-step=4"


def test_verbose_tells_of_each_commit_and_of_what_was_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = AsyncCheckpoint(
        tmp_path, "{step}", "loss", mode="max", every_n_train_steps=1, verbose=True
    )
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(callback, folder=tmp_path)
    text = "\n".join(caplog.messages)
    best = f"'loss' reached {float(callback.best_model_score):.5f}"
    assert f"{best} (best " in text
    assert f"saved {callback.best_model_path!r}" in text
    assert "not in top 1" in text
