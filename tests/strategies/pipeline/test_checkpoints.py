"""Checkpoints of a pipeline: one file, as one device would write it, and exact resumes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_align import ExactResume, PretrainModule
from tests.helpers.pipelines import PositionedBatches, Run
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow  # `make test-laws` runs them

ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
INTERLEAVED = {"schedule": "Interleaved1F1B", "num_microbatches": 4}
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
GPT2 = Run("gpt2", ONE_F_ONE_B, clip=0.5, steps=8, overrides=DROPOUT)
CHAIN = Run("chain", ONE_F_ONE_B, steps=8, overrides={"dropout": 0.1}, callbacks=[ExactResume])


class SaveAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.step:
            trainer.save_checkpoint(self.path)


def fit(run: Run, folder: Path, rank: int | None, ranks: int = 2, **options: Any) -> list[float]:
    """Train, with checkpoints after step 5 and at the end; returns the losses."""
    with run.setting(rank, ranks) as (trainer, seen):
        if "ckpt_path" not in options:
            trainer.callbacks.append(SaveAt(5, folder / "middle.ckpt"))
        trainer.fit(
            run.module(),
            datamodule=PositionedBatches(run.steps, masked=run.model != "chain"),
            **options,
        )
        name = "resumed" if "ckpt_path" in options else "end"
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return seen.losses


def state_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("run", [GPT2, CHAIN], ids=lambda run: run.model)
def test_resume_is_exact(run: Run, accumulate: int, tmp_path: Path) -> None:
    """With dropout; at ``accumulate=2`` in the middle of a window."""
    run = Run(**{**vars(run), "accumulate": accumulate})
    whole = run_ranks(lambda rank: fit(run, tmp_path, rank))[0]
    middle = str(tmp_path / "middle.ckpt")
    rest = run_ranks(lambda rank: fit(run, tmp_path, rank, ckpt_path=middle))[0]
    assert rest == whole[5:]
    end, resumed = state_of(tmp_path / "end.ckpt"), state_of(tmp_path / "resumed.ckpt")
    assert equal(end["state_dict"], resumed["state_dict"])
    assert equal(end["optimizer_states"], resumed["optimizer_states"])


@pytest.mark.parametrize("tied", [False, True])
def test_one_file_continues_on_one_device_and_on_other_stages(tied: bool, tmp_path: Path) -> None:
    overrides = {"tie_word_embeddings": tied}
    run = Run("llama", INTERLEAVED, clip=0.5, steps=8, overrides=overrides)
    whole = run_ranks(lambda rank: fit(run, tmp_path, rank))[0]
    options = {"ckpt_path": str(tmp_path / "middle.ckpt")}
    alone = fit(run, tmp_path, None, **options)
    # nats over a batch of some 45 tokens, and summation order
    assert alone == pytest.approx(whole[5:], rel=2e-5)
    four = Run(**{**vars(run), "strategy": {"schedule": "GPipe", "num_microbatches": 2}})
    spread = run_ranks(lambda rank: fit(four, tmp_path, rank, ranks=4, **options), 4)[0]
    assert spread == pytest.approx(whole[5:], rel=2e-5)


def test_a_checkpoint_has_the_names_of_one_device_and_exports(tmp_path: Path) -> None:
    run = Run("gpt2", ONE_F_ONE_B, steps=8, overrides=DROPOUT)
    run_ranks(lambda rank: fit(run, tmp_path, rank))
    checkpoint = state_of(tmp_path / "end.ckpt")
    alone = run.module()
    assert checkpoint["state_dict"].keys() == alone.state_dict().keys()
    numbers = checkpoint["optimizer_states"][0]["state"]
    assert sorted(numbers) == list(range(len(list(alone.parameters()))))
    shared = [
        checkpoint["state_dict"][f"model.{name}"]
        for name in ("transformer.wte.weight", "lm_head.weight")
    ]
    assert shared[0].data_ptr() == shared[1].data_ptr()

    alone.load_state_dict(checkpoint["state_dict"])
    assert isinstance(alone, PretrainModule)
    alone.save_pretrained(str(tmp_path / "model"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(exported.lm_head.weight, shared[1])
