"""A run whose steps do next to nothing, so that what is added to one shows."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "max_epochs": 1,
}


class OneNumber(pl.LightningModule):
    """A step of next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.number * 1.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Steps(pl.Callback):
    """CPU seconds of each step, from the end of one to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.thread_time()
        self.seconds.append(now - self.began)
        self.began = now
