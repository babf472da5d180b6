"""Whoever answers what rooms ask each other."""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn

import lightning_align as la
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.pipelines import Chained
from tests.helpers.tiny_models import TINY_MODELS


class Everything(Chained):
    """A module of one's own that answers all questions of a pipeline."""

    loss_reduction = "sum"
    pipeline_refusal = ""

    def pipeline_inputs(self, batch: Any) -> Any:
        return batch["input_ids"]

    def pipeline_microbatch_weight(self, batch: Any) -> Tensor:
        return torch.tensor(len(batch))


class Answers(SingleDeviceStrategy):
    """A strategy that is not Lightning's and says how it is."""

    one_rank_runs_model = False
    keeps_shapes = False
    saves_whole_state = False

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[Collection[nn.Parameter]] = []

    def total_grad_norm(self) -> Tensor:
        return torch.tensor(7.0)

    def whole_state_dict(self) -> dict[str, Any]:
        return {"weight": 1}

    def follow_freezing(self, dropped: Collection[nn.Parameter]) -> None:
        self.dropped.append(dropped)


def dpo() -> pl.LightningModule:
    return la.DPOModule(TINY_MODELS["llama"]())


def text() -> pl.LightningDataModule:
    return la.TextDataModule(["x.txt"], ByteTokenizer(), block_size=8)


def trainer_of(strategy: Strategy | None = None, datamodule: Any = None) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        strategy=strategy or "auto",
    )
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    return trainer
