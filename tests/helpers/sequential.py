"""A module whose parameters are in one nn.Sequential, and runs of it."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.pipelines import Run


class Sequential(pl.LightningModule):
    """All its parameters are in one nn.Sequential, which its step calls."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            norms = [nn.BatchNorm1d(16)] if norm else []
            self.net = nn.Sequential(nn.Linear(8, 16), *norms, nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(self.net(inputs.float() / 2), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def pairs() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(40, width, generator=generator) for width in (8, 4))
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


def fit_sequential(rank: int | None, strategy: dict[str, Any], norm: bool = False) -> Any:
    with Run(strategy=strategy).setting(rank) as (trainer, seen):
        module = Sequential(norm)
        trainer.fit(module, pairs())
        buffers = {name: value.tolist() for name, value in module.named_buffers()}
    return seen.losses, buffers
