"""Each micro-batch runs as if it were the first: what it draws, and what becomes of its loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_align.strategies.pipeline.running import loss_of
from tests.helpers.pipelines import Chained, Run
from tests.helpers.ranks import run_ranks
from tests.helpers.sequential import Sequential, pairs

ONE_F_ONE_B = {"schedule": "1F1B", "num_microbatches": 4}
INTERLEAVED = {"schedule": "Interleaved1F1B", "num_microbatches": 4}
GPIPE = {"schedule": "GPipe", "num_microbatches": 4}
RUN = Run("chain", ONE_F_ONE_B, steps=4, data={"masked": False})


def test_dropout_is_drawn_by_layer_and_alike_under_every_schedule_and_cut() -> None:
    """Stages of one rank or of two, cut anywhere, in any order of micro-batches: the same masks."""
    cuts = [(GPIPE, [3, 3]), (ONE_F_ONE_B, [3, 3]), (ONE_F_ONE_B, [2, 4])]
    cuts.append((INTERLEAVED, [2, 2, 1, 1]))
    runs = [
        replace(RUN, steps=2, strategy={**how, "partition_method": cut}, overrides={"dropout": 0.5})
        for how, cut in cuts
    ]

    def train(run: Run) -> Callable[[int], list[float]]:
        def fit(rank: int) -> list[float]:
            pl.seed_everything(3, verbose=False)
            losses: list[float] = run.fit(rank)["losses"]
            return losses

        return fit

    first, *others = (run_ranks(train(run))[0] for run in runs)
    assert others == [first] * 3


def masks(rank: int) -> list[list[float]]:
    """The first dropout mask that each rank draws."""

    class Masks(nn.Dropout):
        seen: list[list[float]]

        def forward(self, hidden: Tensor) -> Tensor:
            dropped = super().forward(torch.ones(16))
            if torch.is_grad_enabled():
                self.__dict__.setdefault("seen", []).append(dropped.tolist())
            return hidden

    with RUN.setting(rank) as (trainer, _):
        pl.seed_everything(3, verbose=False)
        module: Any = Chained()
        for number, block in enumerate(module.blocks):
            module.blocks[number] = nn.Sequential(block, Masks(0.5))
        trainer.fit(module, RUN.loader())
        found = [mask for block in module.blocks for mask in vars(block[1]).get("seen", [])]
        after = torch.rand(2).tolist()
    return [*found, after]


def test_stages_and_microbatches_draw_other_masks_and_leave_the_generators_alone() -> None:
    first, second = run_ranks(masks)
    assert first[-1] == second[-1], "a shuffle would differ between ranks"
    drawn = [tuple(mask) for mask in first[:-1] + second[:-1]]
    assert len(drawn) == 4 * 4 * 4
    assert len(set(drawn)) == len(drawn)


def test_noise_before_the_chain_is_the_noise_that_the_loss_sees() -> None:
    class Denoising(Sequential):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            noise = torch.randn(len(batch[0]), 8)
            self.log("noise", noise.sum())
            return F.mse_loss(self.net(noise), noise[:, :4])

    def train(rank: int) -> list[float]:
        run = replace(RUN, strategy={**GPIPE, "partition_method": [1, 2]})
        with run.setting(rank) as (trainer, _):
            pl.seed_everything(1, verbose=False)
            module: Any = Denoising()
            # The chain is the identity, so only the same noise gives a loss of 0.
            module.net = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 4))
            with torch.no_grad():
                for layer in (module.net[0], module.net[2]):
                    layer.weight.copy_(torch.eye(*layer.weight.shape))
                    layer.bias.zero_()
            module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
            losses = []
            trainer.callbacks.append(Losses(losses))
            trainer.fit(module, pairs())
        return losses

    class Losses(pl.Callback):
        def __init__(self, losses: list[float]) -> None:
            self.losses = losses

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    assert run_ranks(train)[0] == [0.0] * 5


@pytest.mark.parametrize("output", [torch.tensor(2.0), torch.tensor([[2.0]]), {"loss": 2.0}])
def test_a_loss_is_one_value_however_it_is_returned(output: Any) -> None:
    wrapped = {"loss": torch.tensor([2.0])} if isinstance(output, dict) else output
    loss = loss_of(Chained(), wrapped)
    assert (loss.shape, loss.item()) == ((), 2.0)


@pytest.mark.parametrize(
    ("output", "returned"),
    [
        (None, "NoneType"),
        (2.0, "float"),
        (torch.ones(2), "Tensor"),
        ({"loss": torch.ones(()), "extra": 1}, r"a dict of \['extra', 'loss'\]"),
    ],
)
def test_anything_but_a_loss_is_refused(output: Any, returned: str) -> None:
    with pytest.raises(ValueError, match=rf"must return its loss, .*, and returned {returned}\."):
        loss_of(Chained(), output)
