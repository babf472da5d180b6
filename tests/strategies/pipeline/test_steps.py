"""What a user sees of a step under a pipeline: logs, evaluation, randomness, precision."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_align import PipelineStrategy, StableAdamW
from lightning_align.pipelining import simulate
from lightning_align.strategies.pipeline import steps
from tests.helpers.pipelines import Batches, Chained, Run, one_process, pipeline
from tests.helpers.ranks import run_ranks
from tests.helpers.sequential import Sequential, pairs

ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
INTERLEAVED = {"schedule": "Interleaved1F1B", "num_microbatches": 4}
GPIPE = {"schedule": "GPipe", "num_microbatches": 4}
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


def test_dropout_is_drawn_by_layer_and_alike_under_every_schedule_and_cut() -> None:
    """Stages of one rank or of two, cut anywhere, in any order of micro-batches: the same masks."""
    cuts = [(GPIPE, [3, 3]), (ONE_F_ONE_B, [3, 3]), (ONE_F_ONE_B, [2, 4])]
    cuts.append((INTERLEAVED, [2, 2, 1, 1]))
    runs = [
        replace(RUN, strategy={**how, "partition_method": cut}, overrides={"dropout": 0.5})
        for how, cut in cuts
    ]

    def train(run: Run) -> Callable[[int], list[float]]:
        def fit(rank: int) -> list[float]:
            pl.seed_everything(3, verbose=False)
            losses: list[float] = run.fit(rank)["losses"]
            return losses

        return fit

    first, *others = (run_ranks(train(run))[0] for run in runs)
    assert others == [first] * 3


def masks(rank: int) -> list[list[float]]:
    """The first dropout mask that each rank draws."""

    class Masks(nn.Dropout):
        seen: list[list[float]]

        def forward(self, hidden: Tensor) -> Tensor:
            dropped = super().forward(torch.ones(16))
            if torch.is_grad_enabled():
                self.__dict__.setdefault("seen", []).append(dropped.tolist())
            return hidden

    with RUN.setting(rank) as (trainer, _):
        pl.seed_everything(3, verbose=False)
        module: Any = Chained()
        for number, block in enumerate(module.blocks):
            module.blocks[number] = nn.Sequential(block, Masks(0.5))
        trainer.fit(module, RUN.loader())
        found = [mask for block in module.blocks for mask in vars(block[1]).get("seen", [])]
        after = torch.rand(2).tolist()
    return [*found, after]


def test_stages_and_microbatches_draw_other_masks_and_leave_the_generators_alone() -> None:
    first, second = run_ranks(masks)
    assert first[-1] == second[-1], "a shuffle would differ between ranks"
    drawn = [tuple(mask) for mask in first[:-1] + second[:-1]]
    assert len(drawn) == 4 * 4 * 4
    assert len(set(drawn)) == len(drawn)


def test_noise_before_the_chain_is_the_noise_that_the_loss_sees() -> None:
    class Denoising(Sequential):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            noise = torch.randn(len(batch[0]), 8)
            self.log("noise", noise.sum())
            return F.mse_loss(self.net(noise), noise[:, :4])

    def train(rank: int) -> list[float]:
        run = replace(RUN, strategy={**GPIPE, "partition_method": [1, 2]})
        with run.setting(rank) as (trainer, _):
            pl.seed_everything(1, verbose=False)
            module: Any = Denoising()
            # The chain is the identity, so only the same noise gives a loss of 0.
            module.net = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 4))
            with torch.no_grad():
                for layer in (module.net[0], module.net[2]):
                    layer.weight.copy_(torch.eye(*layer.weight.shape))
                    layer.bias.zero_()
            module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
            losses = []
            trainer.callbacks.append(Losses(losses))
            trainer.fit(module, pairs())
        return losses

    class Losses(pl.Callback):
        def __init__(self, losses: list[float]) -> None:
            self.losses = losses

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    assert run_ranks(train)[0] == [0.0] * 5


def test_shuffled_loaders_agree_without_a_seed() -> None:
    def train(rank: int) -> list[float]:
        torch.manual_seed(100 + rank)
        with RUN.setting(rank) as (trainer, seen):
            loader = DataLoader(Batches(4, masked=False), batch_size=None, shuffle=True)
            trainer.fit(Chained(), loader)
        return seen.losses

    first, second = run_ranks(train)
    assert first == second


@pytest.mark.parametrize("model", ["chain", "llama"])
def test_bf16_mixed(model: str) -> None:
    run = replace(RUN, model=model, data={"masked": model != "chain"})
    run = replace(run, trainer={"precision": "bf16-mixed"})
    theirs, ours = one_process(run), pipeline(run)
    assert ours[0]["losses"] == ours[1]["losses"]
    assert ours[0]["losses"] == pytest.approx(theirs["losses"], rel=3e-3)  # 8 bits of mantissa


class Overflow(pl.Callback):
    """Puts inf into a gradient of one rank, in one step."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank
        self.weights: list[float] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 1:
            layers = pl_module.embedding, pl_module.head  # of the first stage and of the last
            layers[self.rank].weight.grad.flatten()[0] = torch.inf

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        here = [p for p in pl_module.parameters() if not p.is_meta]
        self.weights.append(float(sum(p.detach().double().sum() for p in here)))


@pytest.mark.parametrize("failing", [0, 1])
def test_an_overflow_on_one_stage_skips_the_step_on_all(failing: int) -> None:
    def train(rank: int) -> tuple[list[float], float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        overflow = Overflow(failing)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        run = replace(RUN, trainer={"plugins": [plugin]}, callbacks=[lambda: overflow])
        run.fit(rank)
        return overflow.weights, scaler.get_scale()

    for weights, scale in run_ranks(train):
        assert weights[1] == weights[0], "the step was not skipped"
        assert weights[2] != weights[1]
        assert scale == 32.0


@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_our_optimizer_skips_on_one_stage_is_skipped_on_all(failing: int) -> None:
    def train(rank: int) -> list[float]:
        overflow = Overflow(failing)
        replace(RUN, optimizer=partial(StableAdamW, lr=1e-2), callbacks=[lambda: overflow]).fit(
            rank
        )
        return overflow.weights

    for weights in run_ranks(train):
        assert weights[1] == weights[0], "the step was not skipped"
        assert weights[2] != weights[1]


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
        command += ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
