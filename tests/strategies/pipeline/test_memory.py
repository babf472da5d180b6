"""1F1B keeps the activations of a few micro-batches, however many there are."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from tests.helpers.pipelines import Run
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow  # `make test-laws` runs them

RUN = Run("chain", steps=2, data={"masked": False, "varying": False})


class Saved(pl.Callback):
    """Peak of the bytes that backward waits for, without parameters, over the second batch."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        parameters = {p.data_ptr() for p in pl_module.parameters() if not p.is_meta}
        saved = self

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor
                self.size = 0 if tensor.data_ptr() in parameters else tensor.nbytes
                saved.now += self.size
                saved.peak = max(saved.peak, saved.now)

            def __del__(self) -> None:
                saved.now -= self.size

        if batch_idx == 1:
            self.now = self.peak = 0
            self.hooks = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor)
            self.hooks.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self.hooks.__exit__()


def peaks(schedule: str, microbatches: int) -> list[int]:
    """By rank, for micro-batches of one size."""

    def train(rank: int) -> int:
        saved = Saved()
        strategy = {"schedule": schedule, "num_microbatches": microbatches}
        run = replace(RUN, strategy=strategy, callbacks=[lambda: saved])
        with run.setting(rank) as (trainer, _):
            loader = run.loader()
            for batch in loader.dataset.batches:  # type: ignore[attr-defined]
                for name, value in batch.items():
                    batch[name] = value[:1].repeat(microbatches, 1)
            trainer.fit(run.module(), loader)
        return saved.peak

    return run_ranks(train)


def test_peak_of_1f1b_is_that_of_the_stages_behind_it() -> None:
    gpipe, one_f_one_b, more = peaks("GPipe", 4), peaks("1F1B", 4), peaks("1F1B", 8)
    for rank in range(2):
        in_flight = min(4, 2 - rank)
        assert one_f_one_b[rank] <= 1.05 * in_flight / 4 * gpipe[rank]
        assert more[rank] == pytest.approx(one_f_one_b[rank], rel=0.01)
