"""A user's script that stands on AlignCLI, with a module and data of its own."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_align import AlignCLI

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Line(pl.LightningModule):
    """A line through points.

    Args:
        width: Numbers of an input.
        lr: Learning rate.
    """

    def __init__(self, width: int = 3, lr: float = 0.1) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("a line needs a point")
        self.save_hyperparameters()
        self.layer, self.lr = torch.nn.Linear(width, 1), lr

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Steep(Line):
    """Another one."""


class Points(pl.LightningDataModule):
    """Random points.

    Args:
        number: How many.
        width: Numbers of each.
    """

    def __init__(self, number: int = 8, width: int = 3) -> None:
        super().__init__()
        self.points = torch.randn(number, width)

    def train_dataloader(self) -> Any:
        return DataLoader(self.points, batch_size=4)


class OwnCLI(AlignCLI):
    """With an option and a link of its own, and what it does around a run."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--note", default="none", help="A note.")
        parser.link_arguments("model.width", "data.width")

    def before_fit(self) -> None:
        print("before", self.config.fit.note, tuple(self.datamodule.points.shape))  # noqa: T201

    def after_fit(self) -> None:
        print("after", self.trainer.global_step, self.model.hparams.width)  # noqa: T201


if __name__ == "__main__":
    OwnCLI(Line, Points, trainer_defaults={"max_epochs": 2, **QUIET})
