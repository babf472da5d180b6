"""LightningModules that know nothing of us, each with one habit that people have.

Adding a member is a class and a row in ``ZOO`` (zoo_rows.py): the laws of test_zoo.py then run over
it. More members are in zoo_parts.py (optimizers, layers, loaders) and zoo_tokens.py (models that
read tokens).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
)
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanMetric

ROWS, BATCH_SIZE = 40, 6  # 7 batches an epoch, the last one smaller


class Verdict(NamedTuple):
    """What a law must find: ``exact``, ``equal``, ``refuses`` or ``warns``, and its text."""

    word: str
    text: str = ""


EXACT, EQUAL = Verdict("exact"), Verdict("equal")


def refuses(text: str) -> Verdict:
    """Raises before the first weight changes, on all ranks, with this text."""
    return Verdict("refuses", text)


def warns(text: str) -> Verdict:
    """Trains otherwise than plain Lightning by construction, and says so with this text."""
    return Verdict("warns", text)


@dataclass(frozen=True, eq=False)
class Row:
    """One module of the zoo.

    Args:
        name: As docs/composition.md prints it.
        module: Its class.
        trainer: Arguments of its Trainer that differ.
        draws: Whether its steps draw random numbers: plain Lightning is then seeded as we seed.
        draws_order: Whether the order of its rows is drawn, which ExactResume does by the epoch.
        tokens: Whether its batches are of tokens, which TokenSchedule counts.
        unused: Whether DDP must look for parameters that a step leaves out.
        drifts: Whether plain Lightning lets the weights of DDP's ranks drift apart, so that no
            checkpoint holds those of all.
        ddp: Against plain Lightning on two ranks.
        pipeline: Two stages against plain Lightning in one process.
        zero: ZeRO-Infinity on one rank against plain Lightning in one process.
    """

    name: str
    module: type[pl.LightningModule]
    trainer: dict[str, Any] = field(default_factory=dict)
    draws: bool = False
    draws_order: bool = False
    tokens: bool = False
    unused: bool = False
    drifts: bool = False
    ddp: Verdict = EXACT
    pipeline: Verdict = EQUAL
    zero: Verdict = EXACT

    def __str__(self) -> str:
        return self.name


class Regression(pl.LightningModule):
    """An ordinary regression, and the members' common part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
        )

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> Any:
        return DataLoader(rows(), batch_size=BATCH_SIZE)

    def val_dataloader(self) -> Any:
        return DataLoader(rows(12), batch_size=BATCH_SIZE)


def rows(count: int = ROWS) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, 8, generator=generator)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())


# State


class Counter(Regression):
    """Counts rows in an attribute, which weighs its loss."""

    seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += len(batch[0])
        return super().training_step(batch, batch_idx) * (1 + self.seen / 100)


class CounterInValidation(Regression):
    """Counts right answers in an attribute and logs the share."""

    right = total = 0

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.right += int((self.net(batch[0]).sign() == batch[1].sign()).sum())
        self.total += len(batch[0])

    def on_validation_epoch_end(self) -> None:
        self.log("accuracy", self.right / self.total)
        self.right = self.total = 0


class Outputs(Regression):
    """Collects outputs in a list and logs what it needs all of."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.outputs.append(self.net(batch[0]))

    def on_validation_epoch_end(self) -> None:
        self.log("val_median", torch.cat(self.outputs).median())
        self.outputs.clear()


class TrainingOutputs(Regression):
    """Collects the losses of an epoch, and logs their sum at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("total", torch.stack(self.losses).sum())
        self.losses.clear()


class MetricObject(Regression):
    """Logs a torchmetrics object in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanAbsoluteError()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.error.update(self.net(batch[0]), batch[1])
        self.log("val_error", self.error)


class MetricInTraining(Regression):
    """Logs a torchmetrics object per step and per epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


class Buffers(Regression):
    """Standardises inputs by running means that its step keeps in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.lerp_(batch[0].mean(0), 0.1)
        return super().training_step(batch, batch_idx)

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] - self.mean, batch[1]))


class AverageInDict(Regression):
    """Keeps a moving average of its weights in a dict, and validates how far it is."""

    def on_fit_start(self) -> None:
        if not hasattr(self, "average"):
            self.average = {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for name, parameter in self.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)

    def on_validation_epoch_end(self) -> None:
        far = [(p - self.average[name]).square().sum() for name, p in self.named_parameters()]
        self.log("distance", torch.stack(far).sum())


class Recurrent(Regression):
    """Carries the hidden state of an LSTM from batch to batch in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 1))
        self.hidden: Any = None

    def loss(self, batch: Any) -> Tensor:
        output, hidden = self.net[0](batch[0], self.hidden)
        self.hidden = tuple(part.detach() for part in hidden)
        return F.mse_loss(self.net[1](output), batch[1])


# Hooks


class CountsInHook(Regression):
    """Counts batches where one ends, which weighs its loss."""

    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * (1 + self.batches / 10)


class LossByEpoch(Regression):
    """Draws a factor of its loss when an epoch begins."""

    factor = 1.0

    def on_train_epoch_start(self) -> None:
        self.factor = 1 + self.current_epoch + float(torch.rand(()))

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * self.factor


class ThawByEpoch(Regression):
    """Freezes its first layer for an epoch."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch > 0)


class AccumulateByEpoch(Regression):
    """Accumulates two batches from the beginning, and one from the second epoch on."""

    def configure_callbacks(self) -> Any:
        return GradientAccumulationScheduler({0: 2, 1: 3})


class Unfreeze(BaseFinetuning):
    """Lightning's callback, with a layer that joins the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


class Finetuned(Regression):
    """Trains its head first."""

    def configure_callbacks(self) -> Any:
        return Unfreeze()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-3)


class Averaged(Regression):
    """Averages its weights by Lightning's callback."""

    def configure_callbacks(self) -> Any:
        return EMAWeightAveraging(decay=0.8)


class OwnClipping(Regression):
    """Clips its gradients itself, by a norm that shrinks with the steps."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        value = 1 / (1 + self.global_step)
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm="norm")


class ClipsByTorch(Regression):
    """Clips with torch's function and logs the norm that it returns."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.log("norm", nn.utils.clip_grad_norm_(self.parameters(), 0.1))


class LogsNorms(Regression):
    """Logs the norms of its gradients as Lightning's documentation shows."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self.net, norm_type=2))


class OwnBackward(Regression):
    """Propagates back twice the loss."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(2 * loss, *args, **kwargs)


class OwnStep(Regression):
    """Warms the learning rate up where the optimizer steps."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for group in self.optimizers().param_groups:
            group["lr"] = 3e-3 * min(1.0, (self.trainer.global_step + 1) / 5)


class AugmentsOnDevice(Regression):
    """Changes a batch once it is on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]
