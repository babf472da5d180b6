"""A module says what a batch must hold: of a datamodule at set-up, else of the first batch."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import DPOModule, PretrainModule
from lightning_align.modules.batch_check import check_batch, check_data
from tests.modules.test_pretrain import fit, llama, rows

IDS = torch.ones(2, 5, dtype=torch.long)


class Data:
    batch_keys = ("input_ids", "labels")


def test_a_datamodule_that_tells_is_asked() -> None:
    check_data("Here", Data(), ["labels"], "")
    check_data("Here", object(), ["mask"], "")  # who does not tell is met at the first batch
    check_data("Here", None, ["mask"], "")
    with pytest.raises(
        ValueError,
        match=r"Here\(datamodule='Data'\): its batches hold input_ids and labels, and Here needs"
        r" mask and marks\. Take another\.",
    ):
        check_data("Here", Data(), ["labels", "mask", "marks"], "Take another")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IDS, IDS), r"batch='<tuple>'\): must be a mapping with input_ids and labels"),
        ({"input_ids": IDS}, r"must hold input_ids and labels, and lacks labels"),
        ({"input_ids": [1, 2], "labels": IDS}, r"must be token ids of shape \(rows, tokens\)"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"must be token ids .* is \(5,\) torch.int64"),
        ({"input_ids": IDS.float(), "labels": IDS}, r"must be token ids .* torch.float32"),
        ({"input_ids": IDS, "labels": IDS.float()}, "must have whole numbers and 2 tokens a row"),
        ({"input_ids": IDS[:, :1], "labels": IDS[:, :1]}, "one to read and one to predict"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels has the shape \(2, 4\), input_ids"),
    ],
)
def test_batches_that_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch("Here", batch, ("input_ids", "labels"), "")


@pytest.mark.parametrize("module", [PretrainModule, DPOModule])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_stage_asks(module: Any, stage: str) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    loader = torch.utils.data.DataLoader([{"ids": IDS}], batch_size=None)
    with pytest.raises(ValueError, match=rf"{module.__name__}\(batch=\['ids'\]\): must hold input"):
        getattr(trainer, stage)(module(llama()), loader)


def test_a_subclass_may_ask_for_more() -> None:
    class Weighted(PretrainModule):
        @property
        def batch_keys(self) -> tuple[str, ...]:
            return (*super().batch_keys, "weights")

    with pytest.raises(ValueError, match=r"Weighted\(batch=.*and lacks weights"):
        fit(Weighted(llama()), [rows(0, 1)])
    fit(Weighted(llama()), [{**rows(0, 1), "weights": torch.ones(2)}])
