"""Which part of a batch a micro-batch is: by its weight, by the labels that count, by its rows."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_align.strategies.pipeline.chain import Step
from lightning_align.strategies.pipeline.shares import loss_is_sum, shares_of
from tests.helpers.tiny_models import TINY_MODELS

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
