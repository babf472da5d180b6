"""What a user sees of a step under a pipeline: logs, evaluation, randomness, precision."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_align import PipelineStrategy
from lightning_align.pipelining import simulate
from lightning_align.strategies.pipeline import steps
from tests.helpers.covers import with_slow
from tests.helpers.pipelines import Batches, Chained, Run, one_process, pipeline
from tests.helpers.ranks import run_ranks

ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
INTERLEAVED = {"schedule": "Interleaved1F1B", "num_microbatches": 4}
RUN = Run("chain", ONE_F_ONE_B, steps=4, data={"masked": False})


def test_epoch_means_and_callbacks_see_one_value_on_every_rank(tmp_path: Path) -> None:
    def train(rank: int) -> Any:
        stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
        best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{val_loss:.4f}")
        options = {"max_epochs": 9, "enable_checkpointing": True}
        run = replace(RUN, trainer=options, callbacks=[lambda: stop, lambda: best])
        metrics = run.fit(rank)["metrics"]
        return stop.stopped_epoch, best.best_model_path, metrics

    first, second = run_ranks(train)
    assert first == second
    assert first[0] == 1
    assert Path(first[1]).exists()
    alone = replace(RUN, trainer={"max_epochs": 2}).fit()["metrics"]
    assert first[2]["train_loss_epoch"] == pytest.approx(alone["train_loss_epoch"], abs=1e-5)


def evaluate(rank: int | None) -> Any:
    run = replace(RUN, strategy=INTERLEAVED)
    with run.setting(rank) as (trainer, _):
        loader = DataLoader(Batches(3, ragged=True, masked=False), batch_size=None)
        module = Chained()
        module.test_step = module.validation_step  # type: ignore[method-assign]
        values = trainer.validate(module, loader, verbose=False)[0]
        values |= {"test": trainer.test(module, loader, verbose=False)[0]["val_loss"]}
        predictions = trainer.predict(module, loader)
    return values, [prediction.tolist() for prediction in predictions]


def test_validate_test_and_predict_without_fit() -> None:
    theirs = evaluate(None)
    ours = run_ranks(evaluate)
    assert ours[0] == ours[1]
    assert ours[0][1] == theirs[1]
    assert ours[0][0] == pytest.approx(theirs[0], rel=2e-5)


@pytest.mark.parametrize("model", with_slow(["chain", "llama"], ["llama"]))
def test_bf16_mixed(model: str) -> None:
    run = replace(RUN, model=model, data={"masked": model != "chain"})
    run = replace(run, trainer={"precision": "bf16-mixed"})
    theirs, ours = one_process(run), pipeline(run)
    assert ours[0]["losses"] == ours[1]["losses"]
    assert ours[0]["losses"] == pytest.approx(theirs["losses"], rel=3e-3)  # 8 bits of mantissa


def test_the_clock_that_is_drawn_is_that_of_the_schedule() -> None:
    drawn = [line.split()[2:] for line in str(steps.__doc__).splitlines() if "rank " in line[:25]]
    drawn = [row for row in drawn if "B0" in row]
    simulated = simulate(
        "1F1B", pp=2, num_microbatches=4, num_stages_per_rank=1, forward_cost=1, backward_cost=1
    )
    clock = [["."] * 10 for _ in range(2)]
    for event in simulated.events:
        clock[event.rank][int(event.start_s)] = f"{event.action}{event.microbatch_index}"
    assert drawn == clock


def test_one_rank_gives_the_bits_of_no_pipeline() -> None:
    run = replace(RUN, strategy={"schedule": "1F1B"}, overrides={"dropout": 0.3})

    def train(strategy: bool) -> Callable[[int], Any]:
        def fit(rank: int) -> Any:
            pl.seed_everything(5, verbose=False)
            return run.fit(rank if strategy else None, ranks=1)["losses"]

        return fit

    assert run_ranks(train(True), 1) == run_ranks(train(False), 1)


def test_lightning_forks_the_ranks_and_returns_the_weights(tmp_path: Path) -> None:
    trained = replace(RUN, strategy=None)

    def train(rank: int) -> Any:
        module = Chained()
        before = module.head.weight.detach().clone()
        strategy = PipelineStrategy(**ONE_F_ONE_B, start_method="fork")  # type: ignore[arg-type]
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, trained.loader())
        assert not module.head.weight.equal(before)
        return trainer.callback_metrics["train_loss"].item()

    (loss,) = run_ranks(train, 1, group=False)
    assert loss == pytest.approx(trained.fit()["metrics"]["train_loss"], abs=1e-5)


SCRIPT = """
import sys
import lightning as L, lightning_align, torch
from tests.helpers.pipelines import Chained, Batches
from torch.utils.data import DataLoader
torch.set_num_threads(1)
trainer = L.Trainer(strategy="pipeline_1f1b", devices=2, accelerator="cpu", max_epochs=1,
                    logger=False, enable_progress_bar=False, enable_checkpointing=False)
trainer.fit(Chained(), DataLoader(Batches(3, masked=False), batch_size=None))
with open(f"{sys.argv[1]}/{trainer.global_rank}.txt", "w") as file:
    file.write(str(float(trainer.callback_metrics["train_loss"])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_script_runs_under_lightning_and_under_torchrun(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environment,  # not what runs in this process have set: a port in use, a rank
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
