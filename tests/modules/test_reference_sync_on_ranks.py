"""TR-DPO where ranks hold parts: each mixes its own, as one process would mix all of them."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_align import DPOModule
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.rewinds import Rewinds
from tests.modules.test_dpo import module, pairs
from tests.modules.test_pretrain import fit
from tests.modules.test_reference_sync import SYNC

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.found.append(float(outputs["loss"]).hex())
        assert all(isinstance(p, DTensor) for p in pl_module.reference_layers.model.parameters())


def followed() -> DPOModule:
    ours = module(**SYNC)
    ours.optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.1)
    return ours


def batches(rank: int | None) -> list[dict[str, torch.Tensor]]:
    return [pairs(i, i + 1) if rank is None else pairs(i + rank) for i in range(10)]


def whole(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def run(rank: int, *callbacks: pl.Callback, together: bool = True, **options: Any) -> Any:
    """Losses of this rank, to the bit, and the reference at the end."""
    ours, losses = followed(), Losses()
    strategy = ModelParallelStrategy(save_distributed_checkpoint=together)
    on_ranks = {"devices": 2, "plugins": [ForkedRanks(rank, 2)], "strategy": strategy}
    fit(
        ours,
        batches(rank),
        callbacks=[*callbacks, losses],
        use_distributed_sampler=False,
        **{**on_ranks, **options},
    )
    assert ours.reference_layers is not None
    return losses.found, [each.numpy() for each in whole(ours.reference_layers.model)]


class Saves(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def same(one: Any, other: Any) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def test_the_reference_is_that_of_one_process() -> None:
    (_, ours), (_, other) = run_ranks(run, timeout_s=60)
    alone = followed()
    before = [p.clone() for p in alone.reference_layers.model.parameters()]
    fit(alone, batches(None))
    after = whole(alone.reference_layers.model)
    assert same(ours, other)
    assert sum(float((a - b).abs().sum()) for a, b in zip(after, before, strict=True)) > 1
    for found, expected in zip(ours, after, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("together", [True, False], ids=["a folder", "one file"])
def test_a_checkpoint_has_it_whole_and_resumes_to_the_bit(together: bool, tmp_path: Path) -> None:
    """Between two mixtures, behind one; another number of ranks may take it up."""
    path = tmp_path / "a.ckpt"
    ranks = run_ranks(lambda rank: run(rank, Saves(path), together=together), timeout_s=60)
    assert path.is_dir() == together
    resumed = run_ranks(lambda rank: run(rank, together=together, ckpt_path=path), timeout_s=60)
    for (losses, reference), (again, theirs) in zip(ranks, resumed, strict=True):
        assert again == losses[3:]
        assert same(theirs, reference)
    if not together:
        alone = followed()
        fit(alone, batches(None), ckpt_path=path)
        for ours, expected in zip(whole(alone.reference_layers.model), ranks[0][1], strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_a_run_goes_back_in_mid_fit() -> None:
    """Across mixtures: each rank has its parts of the reference in what it goes back to."""
    whole_run = run_ranks(run, timeout_s=60)
    back = run_ranks(lambda rank: run(rank, Rewinds(3, 7, times=1)), timeout_s=60)
    for (losses, reference), (again, theirs) in zip(whole_run, back, strict=True):
        assert again == losses[:7] + losses[3:]
        assert same(theirs, reference)
