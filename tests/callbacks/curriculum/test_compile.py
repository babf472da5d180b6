"""torch.compile makes a graph for each of the lengths that a curriculum states, and no other."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align import Curriculum
from lightning_align.callbacks.curriculum.callback import RECOMPILE_LIMIT
from tests.helpers.curriculum import by_length, linear

pytestmark = pytest.mark.slow


class Compiled(pl.LightningModule):
    """One layer, compiled for the shapes that it meets; every graph is counted."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.graphs = 0

        def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            self.graphs += 1
            return graph.forward

        layer = nn.Sequential(nn.Embedding(32, 8), nn.Tanh(), nn.Linear(8, 32))
        self.layer = torch.compile(layer, backend=counted, dynamic=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.layer(batch["input_ids"][:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def graphs(curriculum: Curriculum) -> int:
    rows = torch.randint(32, (16, 2, 49), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row, "labels": row} for row in rows]
    module = Compiled()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curriculum],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.graphs


def stated(curriculum: Curriculum) -> int:
    assert curriculum._length is not None
    return len(curriculum._length.schedule.distinct)


def test_a_graph_for_each_length_that_is_stated() -> None:
    curriculum = by_length(scheduler=linear(total=6, least=12, most=48, each=12))
    assert graphs(curriculum) == stated(curriculum) == 4


def test_more_lengths_than_torch_keeps_are_warned_of() -> None:
    """It gives up after so many, silently."""
    curriculum = by_length(scheduler=linear(total=12, least=4, most=48, each=4))
    with pytest.warns(UserWarning, match="there are 12 lengths, and torch.compile gives up"):
        assert graphs(curriculum) == RECOMPILE_LIMIT < stated(curriculum)
