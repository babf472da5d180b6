"""What a step logs and keeps on the last stage is told to all ranks and done again on each."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from tests.helpers.classifier import CLASSES, RUN, Classifier, rows, same_as_one_process
from tests.helpers.ranks import run_ranks


class KeepsEverything(Classifier):
    """Counters, sums, lists, buffers, metric objects; read by hooks and a scheduler."""

    def made(self) -> None:
        self.kept_rows = self.kept_steps = 0
        self.kept_best = -1.0
        self.kept_losses: list[Tensor] = []
        self.register_buffer("classes", torch.zeros(CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.mean = MeanMetric()
        self.several = MetricCollection([MulticlassAUROC(CLASSES), MulticlassAccuracy(CLASSES, 2)])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.kept_rows += len(batch[1])
        self.kept_steps += 1
        self.kept_best = max(self.kept_best, float(batch[0].max()))
        self.classes += torch.bincount(batch[1], minlength=CLASSES)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.outputs: list[Any] = []
        self.correct = self.count = 0

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.outputs.append({"logits": logits, "targets": batch[1], "loss": loss})
        self.correct += int((logits.argmax(-1) == batch[1]).sum())
        self.count += len(batch[1])
        self.accuracy.update(logits, batch[1])
        self.several.update(logits.softmax(-1), batch[1])
        self.log("val_accuracy", self.accuracy, on_epoch=True)
        return {"loss": loss, "count": len(batch[1])}

    def on_validation_batch_end(self, outputs: Any, *_: Any) -> None:
        self.kept_losses.append(outputs["loss"] * outputs["count"])

    def on_validation_epoch_end(self) -> None:
        logits = torch.cat([output["logits"] for output in self.outputs])
        targets = torch.cat([output["targets"] for output in self.outputs])
        self.log("val_loss", F.cross_entropy(logits, targets))
        self.log("val_mean", torch.stack([output["loss"] for output in self.outputs]).mean())
        self.log("val_batches", float(len(self.outputs)))
        self.log("val_correct", self.correct / self.count)
        self.log("classes", self.classes[0])
        self.log_dict(self.several.compute())
        self.several.reset()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        # Nothing is ever better: the rate falls after every epoch.
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", patience=0, threshold=9.0, threshold_mode="abs"
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val_correct"},
        }


def test_what_steps_keep_in_the_module_is_on_every_rank() -> None:
    theirs = same_as_one_process(KeepsEverything)
    assert theirs["lr"] == [pytest.approx(0.03)]


class LogsOfAllKinds(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, _ = batch
        logits = self.net(inputs)
        loss = F.cross_entropy(logits, targets)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("sum", F.cross_entropy(logits, targets, reduction="sum"), reduce_fx="sum")
        self.log("n", float(len(targets)), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("largest", logits.max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("smallest", inputs.min(), on_step=False, on_epoch=True, reduce_fx="min")
        self.log("loss of the worst batch", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("perplexity", loss.exp())
        self.log("rate", 0.25)
        # Nothing is certain in the beginning, which tells no rule.
        self.log("certain", (logits.softmax(-1).amax(-1) > 0.5).float().sum())
        return loss


def test_logs_are_those_of_one_process_whatever_they_are_of_a_batch() -> None:
    same_as_one_process(LogsOfAllKinds)


class PreparedByHooks(Classifier):
    def on_fit_start(self) -> None:
        self.scale = 2.0

    def on_train_start(self) -> None:
        self.kept_seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept_seen += len(batch[1])
        return super().training_step(batch, batch_idx) * self.scale


def test_attributes_that_hooks_of_the_fit_make_are_no_failure() -> None:
    same_as_one_process(PreparedByHooks)


def test_early_stopping_sees_an_attribute_on_every_rank() -> None:
    def train(rank: int | None) -> int:
        stop = EarlyStopping("val_correct", patience=0, min_delta=9.0, mode="max")
        run = replace(RUN, trainer={"max_epochs": 5}, callbacks=[lambda: stop])
        with run.setting(rank) as (trainer, _):
            trainer.fit(KeepsEverything(), rows(), rows(16))
        return stop.stopped_epoch

    assert run_ranks(train) == [train(None)] * 2 == [1, 1]
