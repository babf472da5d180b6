"""What is asked of a spike changes nothing, also where a module has sharded itself."""

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_align import SpikeGuard
from tests.callbacks.spikes.test_guard_ranks import Judging
from tests.callbacks.spikes.test_guard_sharded import fit
from tests.callbacks.test_lisa_sharded import ShardedByHand, gathered
from tests.helpers.lisa import BATCHES, Layered
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Large(ShardedByHand):
    """One loss is large."""

    asked = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e3 if batch_idx == 9 else loss


class Asked(Large):
    """Says the loss of a batch, too, by a forward of its own."""

    def batch_loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.asked += 1
        return self(batch)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return Layered.training_step(self, batch, 0)


@pytest.mark.parametrize("action", ["log", "clip"])
def test_a_forward_of_a_modules_own_leaves_no_weights_behind(action: str) -> None:
    """Else the next step would compute with those from before the update."""

    def trained(rank: int, asks: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(1)
        module = Asked() if asks else Large()
        guard = SpikeGuard(action=action, detector=Judging())
        data = [{name: part[rank : rank + 1] for name, part in b.items()} for b in BATCHES]
        options: dict[str, Any] = {"strategy": ModelParallelStrategy(2, 1), "callbacks": [guard]}
        fit(rank, module, data, gradient_clip_val=1.0, **options)
        return gathered(module), module.asked

    for (ours, asked), (expected, _) in zip(
        run_ranks(lambda rank: trained(rank, asks=True), timeout_s=120),
        run_ranks(lambda rank: trained(rank, asks=False), timeout_s=120),
        strict=True,
    ):
        assert asked
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
