"""Which part of a batch a micro-batch is: by its weight, by the labels that count, by its rows."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_align.strategies.pipeline.chain import Step
from lightning_align.strategies.pipeline.shares import loss_is_sum, shares_of
from tests.helpers.covers import with_slow
from tests.helpers.pipelines import Chained, Run
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS

SCHEDULES = ("1F1B", "Interleaved1F1B")
LABELS = [[5, 6, 7, 8], [-100, 6, -100, 8], [-100, -100, -100, -100]]


class Modelled(pl.LightningModule):
    """Passes labels to a model of transformers, as ``how`` says."""

    def __init__(self, how: str = "labels", **options: Any) -> None:
        super().__init__()
        self.model = TINY_MODELS["llama"](**options)
        self.how = how
        self.after: list[Any] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.log("begun", 1.0)
        if self.how == "fails":
            raise ArithmeticError
        labels = {"labels": batch["labels"]} if self.how == "labels" else {}
        output = self.model(batch["input_ids"], **labels)
        self.after.append(output)
        return output.logits.mean()


def steps_of(module: Any, labels: list[list[int]]) -> list[Step]:
    rows = [torch.tensor([row]) for row in labels]
    return [
        Step(module.training_step, {"input_ids": row.clamp(min=0), "labels": row}, (0,), seed=1)
        for row in rows
    ]


def test_labels_count_that_the_mean_of_a_causal_model_is_over() -> None:
    """The first label of a row has no position before it: 3 and 2 of 5 count, and none."""
    module = Modelled()
    assert shares_of(module, steps_of(module, LABELS)) == [3 / 5, 2 / 5, 0.0]
    assert module.after == [], "the step goes no further than its model"
    assert "forward" not in vars(module.model)


@pytest.mark.parametrize("how", ["no labels", "fails"])
def test_without_labels_shares_are_those_of_rows(how: str) -> None:
    module = Modelled(how)
    assert shares_of(module, steps_of(module, LABELS)) == [1 / 3] * 3


def test_where_no_label_counts_shares_are_those_of_rows() -> None:
    module = Modelled()
    assert shares_of(module, steps_of(module, [LABELS[2]] * 2)) == [0.5, 0.5]


def test_a_module_may_weigh_micro_batches_itself() -> None:
    class Weighing(Modelled):
        def pipeline_microbatch_weight(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["input_ids"].sum()

    module = Weighing()
    assert shares_of(module, steps_of(module, [[1, 2], [3, 0], [1, 1]])) == [3 / 8, 3 / 8, 2 / 8]


def test_a_loss_that_is_a_sum_has_no_labels_to_weigh_by() -> None:
    class Summed(Modelled):
        loss_reduction = "sum"

    module = Summed()
    assert loss_is_sum(module)
    assert not loss_is_sum(Modelled())
    assert shares_of(module, steps_of(module, LABELS)) == [1 / 3] * 3


def test_a_module_without_such_a_model_is_not_run() -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("only a model of transformers is asked")

    module = Plain()
    assert shares_of(module, steps_of(module, LABELS[:2])) == [0.5, 0.5]


@pytest.mark.parametrize("schedule", with_slow(SCHEDULES, ["Interleaved1F1B"]))
def test_weights_of_microbatches_make_the_mean_of_the_batch(schedule: str) -> None:
    class Weighted(Chained):
        def pipeline_microbatch_weight(self, batch: dict[str, Tensor]) -> Tensor:
            return (batch["labels"][:, 1:] != -100).sum()

    def train(rank: int | None) -> list[float]:
        run = Run("chain", {"schedule": schedule, "num_microbatches": 4}, steps=4)
        with run.setting(rank) as (trainer, seen):
            trainer.fit(Weighted(), run.loader())
        return seen.losses

    assert run_ranks(train)[0] == pytest.approx(train(None), abs=1e-5)


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
        run = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=3)
        with run.setting(rank) as (trainer, seen):
            trainer.fit(AroundGPT2(), run.loader(), run.loader())
            return seen.losses, float(trainer.callback_metrics["val_loss"])

    theirs = train(None)
    for ours in run_ranks(train):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
