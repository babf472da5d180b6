"""AsyncCheckpoint where ranks hold parts of each parameter, and rank 0 gathers them to save.

tests/laws/test_fully_sharded.py trains our module with it, killed and resumed by other files.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_align import AsyncCheckpoint
from tests.callbacks.test_lisa_sharded import ShardedByHand, gathered
from tests.helpers.lisa import BATCHES, build
from tests.helpers.ranks import ForkedRanks, end_of_ranks, run_ranks
from tests.strategies.pipeline.test_checkpoints import equal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EVERY_SECOND: dict[str, Any] = {"every_n_train_steps": 2, "save_top_k": -1}


class KillAt(pl.Callback):
    """Each rank by itself, once one checkpoint is there; the newest may still be written."""

    def __init__(self, batch: int, folder: Path) -> None:
        self.batch = batch
        self.folder = folder

    def on_train_batch_start(self, *args: Any) -> None:
        if args[-1] == self.batch:
            while AsyncCheckpoint.latest(self.folder) is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    rank: int, name: str, *callbacks: pl.Callback, parts: bool = False, **options: Any
) -> Any:
    """Six steps of two batches, of each of which a rank has one row."""
    module = ShardedByHand() if name == "hand-written" else build(name)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        plugins=[ForkedRanks(rank, 2)],
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=parts),
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    rows = [{key: part[rank : rank + 1] for key, part in batch.items()} for batch in BATCHES]
    trainer.fit(module, DataLoader(rows, batch_size=None), **options)
    return module


def weights(rank: int, *arguments: Any, **options: Any) -> dict[str, Tensor]:
    return gathered(train(rank, *arguments, **options))


@pytest.mark.parametrize("name", ["gpt2", "hand-written"])
def test_it_writes_what_model_checkpoint_does(name: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"

    def both(rank: int) -> None:
        callbacks = ModelCheckpoint(theirs, **EVERY_SECOND), AsyncCheckpoint(ours, **EVERY_SECOND)
        train(rank, name, *callbacks)

    run_ranks(both, timeout_s=120)
    names = [f"epoch=0-step={step}.ckpt" for step in (2, 4, 6)]
    assert sorted(path.name for path in ours.glob("*.ckpt")) == names
    for each in names:
        their, our = (torch.load(f / each, weights_only=True) for f in (theirs, ours))
        assert equal(our["state_dict"], their["state_dict"])
        assert equal(our["optimizer_states"], their["optimizer_states"])


@pytest.mark.parametrize("name", ["gpt2", "hand-written"])
def test_killed_ranks_go_on_from_what_is_whole(name: str, tmp_path: Path) -> None:
    def killed(rank: int) -> None:
        folder = tmp_path / "killed"
        train(rank, name, AsyncCheckpoint(folder, **EVERY_SECOND), KillAt(11, folder))

    whole = run_ranks(
        lambda rank: weights(rank, name, AsyncCheckpoint(tmp_path / "whole", **EVERY_SECOND)),
        timeout_s=120,
    )
    ended = end_of_ranks(killed, timeout_s=120)
    assert [rank.exit_code for rank in ended] == [-signal.SIGKILL] * 2
    newest = AsyncCheckpoint.latest(tmp_path / "killed")
    assert newest is not None
    assert newest.endswith(("step=2.ckpt", "step=4.ckpt"))

    def resumed(rank: int) -> dict[str, Tensor]:
        checkpoint = AsyncCheckpoint(tmp_path / "killed", **EVERY_SECOND)
        return weights(rank, name, checkpoint, ckpt_path="last")

    for ours, expected in zip(run_ranks(resumed, timeout_s=120), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_ranks_that_write_their_parts_are_refused(tmp_path: Path) -> None:
    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match="its ranks save parts of the state") as caught:
            train(rank, "gpt2", AsyncCheckpoint(tmp_path), parts=True)
        return str(caught.value)

    for message in run_ranks(refused, timeout_s=120):
        assert "AsyncCheckpoint(strategy='ModelParallelStrategy')" in message
        assert "ModelParallelStrategy or PipelineStrategy(save_distributed_ch" in message
