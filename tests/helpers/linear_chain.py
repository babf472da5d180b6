"""Modules of a few linear layers that know nothing of us but the name of their chain."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.pipelines import Batches, Run

LINEAR = Run("", {"schedule": "1F1B", "num_microbatches": 4})
# Not AdamW, which moves a weight whose gradient is 0 but for rounding as far as any other.
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
WIDTH = 8


def rows() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(24, WIDTH, generator=generator) for _ in range(2))
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


def tokens() -> DataLoader[Any]:
    return DataLoader(Batches(3, masked=False), batch_size=None)


class Foreign(pl.LightningModule):
    """Four linear layers that ``self.model`` calls; a case changes what it needs to."""

    loader = staticmethod(rows)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.make()

    def make(self) -> None:
        self.model = Net()

    def pipeline_layers(self) -> list[nn.Module]:
        return [self.model.first, self.model.second, self.model.third, self.model.last]

    def output(self, inputs: Tensor) -> Any:
        return self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.mse_loss(self.output(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self.output(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        output: Tensor = self.output(batch[0])
        return output

    def configure_optimizers(self) -> Any:
        return SGD(p for p in self.parameters() if p.requires_grad)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.last(self.third(self.second(self.first(inputs))))
        return output


class InPlace(Foreign):
    """Without a change in place, the first layer of the second stage would be another."""

    def make(self) -> None:
        linear = partial(nn.Linear, WIDTH, WIDTH)
        self.net = nn.Sequential(linear(), nn.ReLU(inplace=True), linear(), nn.ReLU(inplace=True))

    pipeline_layers = None  # type: ignore[assignment]

    def output(self, inputs: Tensor) -> Any:
        return self.net(inputs)


class Trains(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        raise AssertionError("nothing must be trained")
