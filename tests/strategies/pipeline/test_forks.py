"""Processes that Lightning starts (``start_method``), and those that live on after a failure."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_align import PipelineStrategy
from tests.helpers.pipelines import Chained, Run
from tests.helpers.ranks import end_of_ranks
from tests.strategies.pipeline.test_failures import RaiseOn

pytestmark = pytest.mark.slow  # `make test-laws` runs them

ONE_F_ONE_B: dict[str, Any] = {"schedule": "1F1B", "num_microbatches": 4}
RUN = Run("chain", steps=4, data={"masked": False})

SPAWN = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_align import PipelineStrategy


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = (self.layers(batch) - 1).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def train(devices, **options):
    module = Regression()
    trainer = L.Trainer(accelerator="cpu", devices=devices, max_epochs=1, logger=False,
                        enable_progress_bar=False, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(torch.linspace(-1, 1, 128).view(32, 4), batch_size=8))
    return module, trainer.callback_metrics["train_loss"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    strategy = PipelineStrategy(schedule="1F1B", num_microbatches=4, start_method="spawn")
    ours, loss = train(2, strategy=strategy)
    theirs, expected = train(1)
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    print("the same")
"""


def run_script(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The end of a script, whose environment is its own.

    Runs in this process may have set a port that is in use, or a rank.
    """
    script = folder / "train.py"
    script.write_text(text)
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=150, check=False, env=environment
    )


def test_lightning_spawns_the_ranks_and_returns_the_weights(tmp_path: Any) -> None:
    done = run_script(SPAWN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same"


def test_a_failure_of_a_forked_rank_reaches_the_process_that_forked_it() -> None:
    def train(_: int) -> None:
        strategy = PipelineStrategy(**ONE_F_ONE_B, start_method="fork")
        options: Any = {"logger": False, "enable_checkpointing": False, "max_epochs": 1}
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[RaiseOn(1)],
            **options,
        )
        trainer.fit(Chained(), RUN.loader())

    (end,) = end_of_ranks(train, 1, timeout_s=60, group=False)
    assert not end.stuck
    assert "OSError: disk full" in end.error


@pytest.mark.parametrize("failing", [0, 1])
def test_a_script_that_goes_on_after_a_failure_waits_for_no_one(failing: int) -> None:
    """The others cannot come to its barrier: they wait in a step for what it never sends."""
    run = replace(RUN, strategy=ONE_F_ONE_B, callbacks=[lambda: RaiseOn(failing)])

    def train(rank: int) -> None:
        with run.setting(rank) as (trainer, _):
            try:
                trainer.fit(run.module(), run.loader())
            finally:
                trainer.strategy.barrier()

    ended = end_of_ranks(train, timeout_s=20)
    assert not any(end.stuck for end in ended)
    assert "OSError: disk full" in ended[failing].error
    assert f"The failure was at rank {failing}, between steps" in ended[1 - failing].error


END = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_align


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()

    def on_train_end(self):
        if self.trainer.global_rank == 1:
            raise OSError("disk full")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


trainer = L.Trainer(accelerator="cpu", devices=2, max_epochs=1, logger=False,
                    strategy="pipeline_1f1b", enable_progress_bar=False, enable_checkpointing=False)
trainer.fit(Regression(), DataLoader(torch.linspace(-1, 1, 128).view(32, 4), batch_size=8))
print("trained")
"""


def test_a_script_exits_with_an_error_when_a_rank_fails_at_the_end(tmp_path: Any) -> None:
    done = run_script(END, tmp_path)
    assert done.returncode != 0
    assert "trained" not in done.stdout
    assert "The failure was at rank 1, between steps: OSError: disk full" in done.stderr
