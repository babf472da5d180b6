"""What a step returns, logs and keeps under a pipeline: as in one process, or refused.

Each module is foreign: it knows a chain of layers, and nothing else of us.
"""

import random
import warnings
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from tests.helpers.pipelines import Run
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS

CLASSES = 3
RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=3)


def rows(count: int = 32, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 6, generator=generator)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    masked = torch.rand(count, generator=generator) < 0.4
    return DataLoader(TensorDataset(inputs, targets, masked), batch_size)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        self.made()

    def made(self) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.3)


def fit(make: type[Classifier], rank: int | None, **trainer: Any) -> Any:
    """Two epochs; what monitors and the module's hooks have seen, and the learning rates."""
    run = replace(RUN, trainer={"max_epochs": 2, **trainer})
    with run.setting(rank) as (fitting, seen):
        module = make()
        # The last batch is smaller, and cut into fewer parts.
        fitting.fit(module, rows(28), rows(22))
        metrics = {name: float(value) for name, value in fitting.callback_metrics.items()}
        rates = [group["lr"] for group in fitting.optimizers[0].param_groups]
        left = {name: value for name, value in vars(module).items() if name.startswith("kept")}
    return {"losses": seen.losses, "logged": seen.logged, "metrics": metrics, "lr": rates}, left


def same_as_one_process(make: type[Classifier]) -> dict[str, Any]:
    """Every rank has what one process has; returns that."""
    theirs, theirs_left = fit(make, None)
    for ours, ours_left in run_ranks(lambda rank: fit(make, rank)):
        assert ours["lr"] == theirs["lr"]
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
        assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=1e-5)
        for our, their in zip(ours["logged"], theirs["logged"], strict=True):
            assert our == pytest.approx(their, abs=1e-5)
        assert ours_left.keys() == theirs_left.keys()
        for name, value in theirs_left.items():
            torch.testing.assert_close(ours_left[name], value, atol=1e-5, rtol=1e-5)
    return theirs


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


class Summed(Classifier):
    loss_reduction = "sum"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum") / 32


def test_a_loss_that_is_declared_a_sum_adds_up() -> None:
    same_as_one_process(Summed)


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


class MeanOverSome(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, masked = batch
        losses = F.cross_entropy(self.net(inputs), targets, reduction="none")
        return (losses * masked).sum() / masked.sum().clamp(min=1)


class SumThatIsNotDeclared(Summed):
    loss_reduction = "mean"


class MeanOverSomeOnceReady(MeanOverSome):
    def on_train_start(self) -> None:
        self.scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale


class LogsARatio(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("ratio", batch[0].max() / batch[0].mean())
        return super().training_step(batch, batch_idx)


class KeepsARatio(Classifier):
    ratio = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ratio += float(batch[0].max() / batch[0].mean())
        return super().training_step(batch, batch_idx)


class LogsAMetricOfTheBatch(Classifier):
    def made(self) -> None:
        self.accuracy = MulticlassAUROC(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        return F.cross_entropy(logits, batch[1])


class LeavesRowsOut(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, masked = batch
        return F.cross_entropy(self.net(inputs[~masked]), targets[~masked])


class CounterWeighsLoss(Classifier):
    def made(self) -> None:
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += len(batch[1])
        return super().training_step(batch, batch_idx) * min(1.0, self.seen / 20)


REFUSED: dict[str, tuple[type[Classifier], str]] = {
    "a mean over some rows": (
        MeanOverSome,
        r"the loss of 4 micro-batches comes to .* one piece .* Define pipeline_microbatch_weight",
    ),
    "a sum": (SumThatIsNotDeclared, r'It is a sum: give the module .* loss_reduction = "sum"'),
    "in the first step": (MeanOverSomeOnceReady, "the loss of 4 micro-batches comes to"),
    "a ratio is logged": (LogsARatio, r"\(name='ratio'\): it is .* no mean, sum, .* Log it at the"),
    "a ratio is kept": (KeepsARatio, r"changes 'ratio' to .* Change it in on_train_batch_end"),
    "a metric of the batch": (LogsAMetricOfTheBatch, r"\(name='accuracy'\): .* on_step=False"),
    "a counter weighs": (CounterWeighsLoss, r"changes \['seen'\], .* them in on_train_batch_start"),
    "shapes": (LeavesRowsOut, r"of \[.*\] for micro-batch \d, and of .* first .* Leave rows out,"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_micro_batches_do_not_come_to_is_refused_before_it_trains(name: str) -> None:
    make, message = REFUSED[name]

    def refused(rank: int) -> tuple[int, bool]:
        with RUN.setting(rank) as (trainer, _):
            trainer.callbacks.append(started := Started())
            with pytest.raises(Exception, match=message):
                trainer.fit(make(), rows())
            return trainer.global_step, started.has

    at_set_up = name != "in the first step"
    assert run_ranks(refused) == [(0, not at_set_up)] * 2


class Started(pl.Callback):
    has = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.has = True


class Weighted(MeanOverSome):
    def pipeline_microbatch_weight(self, batch: Any) -> Tensor:
        return batch[2].sum()


def test_with_its_weight_the_mean_over_some_rows_trains() -> None:
    same_as_one_process(Weighted)


class AddsNoise(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = batch[0] + torch.randn_like(batch[0])
        return F.cross_entropy(self.net(inputs), batch[1])


def test_a_random_loss_trains_with_a_warning() -> None:
    def train(rank: int) -> list[float]:
        with RUN.setting(rank) as (trainer, seen):
            if rank:
                trainer.fit(AddsNoise(), rows())
            else:
                with pytest.warns(UserWarning, match="in AddsNoise loss is another with other ran"):
                    trainer.fit(AddsNoise(), rows())
        return seen.losses

    first, second = run_ranks(train)
    assert first == second
    assert len(first) == 4


class LogsNoise(AddsNoise):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("noisy", loss)
        return loss


class LogsACountLate(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("late", float(len(batch[1])) if batch_idx > 1 else 0.0)
        return super().training_step(batch, batch_idx)


def test_what_cannot_be_told_is_warned_of_once_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_align.strategies.pipeline.step_comparisons._COMPARISONS", 1)

    def warned(rank: int, make: type[Classifier]) -> list[str]:
        with RUN.setting(rank) as (trainer, _), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(make(), rows())
        return [str(w.message) for w in caught if "PipelineStrategy: " in str(w.message)]

    noise, _ = run_ranks(lambda rank: warned(rank, LogsNoise))
    assert len(noise) == 1
    assert "loss, log noisy is another with other random numbers" in noise[0]
    late, _ = run_ranks(lambda rank: warned(rank, LogsACountLate))
    assert len(late) == 1
    assert "['log late'], of which 1 comparison" in late[0]


class TurnsToTheBatch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss + logits.std(0).mean() if batch_idx > 1 else loss


def test_a_loss_that_turns_to_what_micro_batches_do_not_come_to_is_warned_of() -> None:
    def warned(rank: int) -> list[str]:
        with RUN.setting(rank) as (trainer, _), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(TurnsToTheBatch(), rows())
        return [str(w.message) for w in caught if "PipelineStrategy(" in str(w.message)]

    (told,), _ = run_ranks(warned)
    assert "the loss of 4 micro-batches comes to" in told
    assert told.endswith("It did come to the same in the first batch.")


class Normed(Classifier):
    def made(self) -> None:
        self.net.insert(1, nn.BatchNorm1d(16))


def test_batch_norm_trains_with_a_warning() -> None:
    def train(rank: int) -> int:
        with RUN.setting(rank) as (trainer, seen):
            if rank:
                trainer.fit(Normed(), rows())
            else:
                with pytest.warns(UserWarning, match="statistics of one micro-batch: net.1"):
                    trainer.fit(Normed(), rows())
        return len(seen.losses)

    assert run_ranks(train) == [4, 4]


class DrawsForItself(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.generators = nn.Module()  # as a part of the model has its own
        self.generators.dice = random.Random(1)
        self.generators.numbers = np.random.default_rng(1)
        self.noise = torch.Generator().manual_seed(1)

    def draw(self) -> list[float]:
        numbers = [self.generators.dice.random(), float(self.generators.numbers.random())]
        return [*numbers, float(torch.rand(1, generator=self.noise))]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.draw()
        return super().training_step(batch, batch_idx)


def test_comparing_leaves_no_trace() -> None:
    """The bits are those of a run that compares nothing."""
    from lightning_align.strategies.pipeline.step_comparisons import StepComparisons

    def train(rank: int, compares: bool) -> Any:
        if not compares:
            StepComparisons.compare = lambda *_, **__: None  # type: ignore[assignment]
        with RUN.setting(rank) as (trainer, seen):
            pl.seed_everything(4, verbose=False)
            module = DrawsForItself()
            module.net.insert(1, nn.BatchNorm1d(16))
            module.net.append(nn.Dropout(0.5))
            trainer.fit(module, rows())
            drawn = [*torch.rand(3).tolist(), *module.draw()]
            return seen.losses, [b.tolist() for b in module.buffers()], drawn

    theirs = run_ranks(lambda rank: train(rank, compares=False))
    assert run_ranks(lambda rank: train(rank, compares=True)) == theirs


def test_early_stopping_sees_an_attribute_on_every_rank() -> None:
    def train(rank: int | None) -> int:
        stop = EarlyStopping("val_correct", patience=0, min_delta=9.0, mode="max")
        run = replace(RUN, trainer={"max_epochs": 5}, callbacks=[lambda: stop])
        with run.setting(rank) as (trainer, _):
            trainer.fit(KeepsEverything(), rows(), rows(16))
        return stop.stopped_epoch

    assert run_ranks(train) == [train(None)] * 2 == [1, 1]


class AroundGPT2(pl.LightningModule):
    """The model of transformers takes the mean over labels that count, as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = TINY_MODELS["gpt2"](attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.model(input_ids=batch["input_ids"], labels=batch["labels"])
        self.log("loss", output.loss)
        return output.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.3)


def test_labels_of_a_transformers_model_are_weighed_by_those_that_count() -> None:
    def train(rank: int | None) -> Any:
        run = replace(RUN, data={"masked": True})
        with run.setting(rank) as (trainer, seen):
            trainer.fit(AroundGPT2(), run.loader(), run.loader())
            return seen.losses, float(trainer.callback_metrics["val_loss"])

    theirs = train(None)
    for ours in run_ranks(train):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
