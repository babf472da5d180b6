"""The run of a check ends where training would begin, and others see no end of training."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_align.cli import check_report
from lightning_align.cli.check_run import SetUp, SetUpBehindCheckpoints


class Watching(pl.Callback):
    """Notes which hooks it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_start(self, *args: Any) -> None:
        self.seen.append("start")

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen.append("batch")

    def on_train_end(self, *args: Any) -> None:
        self.seen.append("end")

    def teardown(self, *args: Any, **options: Any) -> None:
        self.seen.append("teardown")


@pytest.mark.parametrize("kind", [SetUp, SetUpBehindCheckpoints])
def test_it_ends_after_set_up_and_lets_others_end_what_they_began(
    kind: type[SetUp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Any] = []
    monkeypatch.setattr(check_report, "tell", lambda cli, batch: batches.append(batch))
    first, last = Watching(), Watching()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[first, kind(None), last],  # type: ignore[arg-type]
        enable_checkpointing=kind is not SetUp,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        logger=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(BoringModel())
    assert [tuple(batch.shape) for batch in batches] == [(1, 32)]
    assert trainer.global_step == 0
    assert first.seen == ["start", "teardown"]
    assert last.seen[-1] == "teardown"
    assert "end" not in last.seen
    assert "batch" not in last.seen
    assert not list(tmp_path.rglob("*.ckpt"))
