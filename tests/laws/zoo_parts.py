"""Members of the zoo with layers, optimizers and loaders of every kind."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from tests.laws.zoo import BATCH_SIZE, ROWS, CounterInValidation, Regression, rows

# Optimization


class Manual(Regression):
    """Optimizes by hand, and steps at every second batch."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class Adversarial(Regression):
    """Two networks with an optimizer each, which take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        turn = batch_idx % 2
        optimizer: Any = self.optimizers()[turn]  # type: ignore[index]
        fake = self.critic(torch.cat([inputs, self.net(inputs)], 1))
        real = self.critic(torch.cat([inputs, targets], 1))
        loss = (F.softplus(fake) + F.softplus(-real) if turn else F.softplus(-fake)).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log(f"loss_{turn}", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), 3e-3) for part in (self.net, self.critic)]


class Schedulers(Regression):
    """Two schedulers on one optimizer, one per step and one per epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        by_step = {"scheduler": ExponentialLR(optimizer, 0.95), "interval": "step"}
        return [optimizer], [by_step, StepLR(optimizer, 1, gamma=0.5)]


class Plateau(CounterInValidation):
    """Halves the learning rate by a metric that validation counts itself."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = ReduceLROnPlateau(optimizer, mode="min", factor=0.5, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "accuracy"},
        }


class Groups(Regression):
    """Decays weights and not biases."""

    def configure_optimizers(self) -> Any:
        parameters = dict(self.named_parameters())
        weights = [p for name, p in parameters.items() if name.endswith("weight")]
        biases = [p for name, p in parameters.items() if name.endswith("bias")]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=3e-3)


class Frozen(Regression):
    """Never trains its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


class Penalty(Regression):
    """Adds the squares of its weights to the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return super().training_step(batch, batch_idx) + 1e-2 * penalty


class SumLoss(Regression):
    """Its loss is a sum over rows."""

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1], reduction="sum")


class SkipsSteps(Regression):
    """Returns None where it does not want to learn."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx % 3 else None


class ReturnsDict(Regression):
    """Returns what its hook wants to see beside the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "rows": len(batch[0])}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("rows", float(outputs["rows"]))


# Layers


class InPlace(Regression):
    """Its activations overwrite what they are given."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.net = nn.Sequential(
            nn.Linear(8, 16), relu, nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 1)
        )


class SharedLayer(Regression):
    """One layer stands twice in its chain."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(16, 16)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(16, 1)
        )


class Norms(Regression):
    """BatchNorm between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 1)
        )


class SpectralNorm(Regression):
    """A weight divided by its largest singular value, which each call estimates better."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = spectral_norm(self.net[2])


class Detach(nn.Module):
    """Passes half of its input on without a gradient."""

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden + hidden.detach()) / 2


class Detached(Regression):
    """Stops a part of the gradient in its chain."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(2, Detach())


class Checkpointed(Regression):
    """Computes its activations again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2] = Recomputed(self.net[2])


class Recomputed(nn.Module):
    """A layer under activation checkpointing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.layer, hidden, use_reentrant=False)


class DropPath(Regression):
    """Drops its middle at random, and adds noise to its inputs."""

    def loss(self, batch: Any) -> Tensor:
        inputs = batch[0] + 0.1 * torch.randn_like(batch[0]) if self.training else batch[0]
        hidden = F.dropout(self.net(inputs), 0.2, self.training)
        return F.mse_loss(hidden, batch[1])


# Logs and loaders


class Reductions(Regression):
    """Logs a maximum, a minimum and a sum of an epoch, and how many rows there were."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for name in ("max", "min", "sum"):
            self.log(f"loss_{name}", loss, on_step=False, on_epoch=True, reduce_fx=name)
        self.log("rows", float(len(batch[0])), on_step=True, on_epoch=True, reduce_fx="sum")
        return loss


class TwoValidations(Regression):
    """Validates on two loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch))

    def val_dataloader(self) -> Any:
        return [DataLoader(rows(count), batch_size=BATCH_SIZE) for count in (12, 18)]


class TwoLoaders(Regression):
    """Trains on two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss([torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True)])
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=BATCH_SIZE)
        return loss

    def train_dataloader(self) -> Any:
        return {
            name: DataLoader(rows(count), batch_size=BATCH_SIZE)
            for name, count in (("a", 36), ("b", 72))
        }


class Predicts(Regression):
    """Predicts, too."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"value": self.net(batch[0]), "row": batch[0].sum(1)}


class Stream(IterableDataset):
    """Rows without a length, each rank its own."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        yield from list(rows(ROWS))[rank:]


class Streams(Regression):
    """Trains on a stream of rows."""

    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=BATCH_SIZE)


class Shuffles(Regression):
    """Draws the order of its rows, as most do."""

    def train_dataloader(self) -> Any:
        return DataLoader(rows(), batch_size=BATCH_SIZE, shuffle=True)
