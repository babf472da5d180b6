"""Callbacks that need the whole model, of which each rank has a part: they work, or are refused."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import AutoModelForCausalLM

from lightning_align import AsyncCheckpoint, GenerateSamples, PretrainModule, SavePretrained
from tests.helpers.pipelines import ADAMW, PositionedBatches, Run
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.pipeline.test_checkpoints import DROPOUT, equal, state_of

pytestmark = pytest.mark.slow  # `make test-laws` runs them

ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
GPT2 = Run("gpt2", ONE_F_ONE_B, clip=0.5, steps=6, overrides=DROPOUT)


def train(run: Run, rank: int | None, *callbacks: Any, **options: Any) -> list[float]:
    with run.setting(rank) as (trainer, seen):
        trainer.callbacks.extend(callbacks)
        trainer.fit(
            run.module(),
            datamodule=PositionedBatches(run.steps, masked=run.model != "chain"),
            **options,
        )
    losses: list[float] = seen.losses
    return losses


def test_async_checkpoint_writes_what_model_checkpoint_does(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"

    def both(rank: int) -> list[float]:
        options: Any = {"every_n_train_steps": 2, "save_top_k": -1}
        callbacks = ModelCheckpoint(theirs, **options), AsyncCheckpoint(ours, **options)
        return train(GPT2, rank, *callbacks)

    run_ranks(both)
    names = [f"epoch=0-step={step}.ckpt" for step in (2, 4, 6)]
    assert sorted(path.name for path in ours.glob("*.ckpt")) == names
    for name in names:
        their, our = state_of(theirs / name), state_of(ours / name)
        assert equal(their["state_dict"], our["state_dict"])
        assert equal(their["optimizer_states"], our["optimizer_states"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_goes_on_exactly_from_an_async_checkpoint(accumulate: int, tmp_path: Path) -> None:
    """Under ``accumulate=2`` at an optimizer step: that is where steps are counted."""
    run = Run(**{**vars(GPT2), "accumulate": accumulate, "steps": 8})
    options: Any = {"every_n_train_steps": 2, "save_top_k": -1}
    whole = run_ranks(lambda rank: train(run, rank, AsyncCheckpoint(tmp_path, **options)))
    for path in tmp_path.iterdir():
        if not path.name.startswith("epoch=0-step=2."):
            path.unlink()
    rest = run_ranks(
        lambda rank: train(run, rank, AsyncCheckpoint(tmp_path, **options), ckpt_path="last")
    )
    assert rest[0] == whole[0][2 * accumulate :]
    assert rest[0] == rest[1]


def test_a_model_without_memory_goes_on_in_the_folder_of_its_run(tmp_path: Path) -> None:
    """It is loaded late: what run it continues is known only when training starts."""
    TINY_MODELS["gpt2"]().save_pretrained(tmp_path / "model")
    folder, run = tmp_path / "run", Run("gpt2", ONE_F_ONE_B, steps=8)

    def fit(rank: int, **options: Any) -> list[float]:
        with run.setting(rank) as (trainer, seen):
            checkpoint = AsyncCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
            trainer.callbacks.append(checkpoint)
            with trainer.init_module(empty_init=True):
                module = PretrainModule(str(tmp_path / "model"), optimizer=ADAMW)
            trainer.fit(module, datamodule=PositionedBatches(run.steps), **options)
        losses: list[float] = seen.losses
        return losses

    whole = run_ranks(fit)[0]
    for path in folder.iterdir():
        if not path.name.startswith("epoch=0-step=4."):
            path.unlink()
    assert run_ranks(lambda rank: fit(rank, ckpt_path="last"))[0] == whole[4:]
    names = {path.name for path in folder.iterdir()}
    assert names >= {f"epoch=0-step={step}.ckpt" for step in (4, 6, 8)}
    assert "version_1" not in names


def test_async_checkpoint_is_refused_where_each_rank_saves_its_part(tmp_path: Path) -> None:
    run = Run(**{**vars(GPT2), "strategy": {**ONE_F_ONE_B, "save_distributed_checkpoint": True}})

    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match="its ranks save parts of the state") as caught:
            train(run, rank, AsyncCheckpoint(tmp_path))
        return str(caught.value)

    for message in run_ranks(refused):
        assert "AsyncCheckpoint(strategy='PipelineStrategy')" in message
        assert message.endswith("PipelineStrategy(save_distributed_checkpoint=False).")


def fail() -> None:
    raise OSError("disk full")


class NothingToCollect(pl.Callback):
    """After the strategy is down there may be nothing to send with: NCCL takes no CPU tensors."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        vars(trainer.strategy)["whole_state_dict"] = fail


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_exported_folder_is_that_of_the_checkpoint_and_of_one_process(
    model: str, distributed: bool, tmp_path: Path
) -> None:
    strategy = {**ONE_F_ONE_B, "save_distributed_checkpoint": distributed}
    # Adam would blow up the rounding of gradients that are zero, such as those of GPT-2's key bias.
    sgd = partial(torch.optim.SGD, lr=0.1)
    run = Run(model, strategy, sgd, steps=4)
    folder, file = tmp_path / "model", tmp_path / "end.ckpt"

    def export(rank: int) -> None:
        train(run, rank, SavePretrained(str(folder)), NothingToCollect())
        whole = Run(model, ONE_F_ONE_B, sgd, steps=4)
        with whole.setting(rank) as (trainer, _):
            trainer.fit(whole.module(), datamodule=PositionedBatches(4))
            trainer.save_checkpoint(file)

    run_ranks(export)
    module = run.module()
    assert isinstance(module, PretrainModule)
    module.load_state_dict(state_of(file)["state_dict"])
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert equal(dict(exported.state_dict()), dict(module.model.state_dict()))
    # and that of one process, but for the order of sums
    alone = tmp_path / "alone"
    train(Run(model, None, sgd, steps=4), None, SavePretrained(str(alone)))
    theirs = AutoModelForCausalLM.from_pretrained(alone)
    for name, value in exported.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=2e-5, atol=2e-6)


def test_a_run_with_nothing_left_to_train_exports_what_it_was_given(tmp_path: Path) -> None:
    run = Run("llama", ONE_F_ONE_B, trainer={"max_epochs": 0})
    run_ranks(lambda rank: train(run, rank, SavePretrained(str(tmp_path))))
    module = run.module()
    assert isinstance(module, PretrainModule)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert equal(dict(exported.state_dict()), dict(module.model.state_dict()))


@pytest.mark.parametrize(
    "callback",
    [
        lambda path: ModelCheckpoint(path, save_on_exception=True),
        lambda path: OnExceptionCheckpoint(path),
    ],
)
def test_saving_on_the_rank_that_fails_is_refused(callback: Any, tmp_path: Path) -> None:
    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match="it saves when a rank fails") as caught:
            train(GPT2, rank, callback(tmp_path))
        return str(caught.value)

    name = type(callback(tmp_path)).__name__
    for message in run_ranks(refused):
        assert message.startswith(f"PipelineStrategy(callbacks={name!r}): ")
    train(GPT2, None, callback(tmp_path))  # one process can


class Stop(pl.Callback):
    """Something happens on a rank after the third batch."""

    def __init__(self, rank: int, happen: Callable[[], None]) -> None:
        self.rank, self.happen = rank, happen

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2 and trainer.global_rank == self.rank:
            self.happen()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [0, 1])
def test_async_checkpoint_saves_when_a_rank_is_terminated(number: int, tmp_path: Path) -> None:
    def stop(rank: int) -> None:
        callback = AsyncCheckpoint(tmp_path, save_on_exception=True)
        with pytest.raises(SIGTERMException):
            train(GPT2, rank, Stop(number, terminate), callback)

    run_ranks(stop)
    whole = run_ranks(lambda rank: train(GPT2, rank))[0]
    (path,) = tmp_path.glob("*.ckpt")
    assert run_ranks(lambda rank: train(GPT2, rank, ckpt_path=path))[0] == whole[3:]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_beside_async_checkpoint_ends_all(failing: int, tmp_path: Path) -> None:
    def train_on(rank: int) -> None:
        callback = AsyncCheckpoint(tmp_path, save_on_exception=True, every_n_train_steps=2)
        train(GPT2, rank, callback, Stop(failing, fail))

    ended = end_of_ranks(train_on, timeout_s=60)
    assert not any(end.stuck for end in ended)
    assert "OSError: disk full" in ended[failing].error
    assert f"The failure was at rank {failing}" in ended[1 - failing].error
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=0-step=2.ckpt"]


def test_generate_samples_is_refused() -> None:
    def refused(rank: int) -> str:
        with pytest.raises(ValueError, match="GenerateSamples") as caught:
            train(GPT2, rank, GenerateSamples(["It is"]))
        return str(caught.value)

    for message in run_ranks(refused):
        assert "under PipelineStrategy rank zero may not hold the whole model" in message
        assert message.endswith("or generate from a checkpoint.")
