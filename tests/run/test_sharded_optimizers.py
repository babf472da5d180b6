"""Optimizers of a sharded model, loaded from what ModelParallelStrategy has saved."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from lightning_align import GaLoreAdamW, StableAdamW
from lightning_align.run.exact_resume import ExactResume
from tests.helpers.ranks import ForkedRanks, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class OneIsLeftOut(pl.LightningModule):
    """A module whose second layer no gradient reaches, and whose first step is a bad one."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.optimizer = optimizer

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layers[2](self.layers[0](batch)).square().mean()
        return loss * float("nan") if self.trainer.global_step == 0 else loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.named_parameters())


class OneThaws(OneIsLeftOut):
    """Of the same layers the first is frozen for an epoch of four batches."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.layers[0].requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers[2](self.layers[0](batch)).square().mean()

    def on_train_epoch_start(self) -> None:
        first: Any = self.layers[0]
        first.reshard()  # of what is gathered only the gathered parameters would be thawed
        first.requires_grad_(self.current_epoch > 0)


class SaveAt(pl.Callback):
    """Saves once, behind so many batches; behind 0, as training starts."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches = batches
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.batches == 0:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches -= 1
        if self.batches == 0:
            trainer.save_checkpoint(self.path)


def fit(
    rank: int,
    optimizer: Any,
    *extra: pl.Callback,
    whole: bool,
    steps: int,
    ranks: int = 2,
    kind: type[OneIsLeftOut] = OneIsLeftOut,
    accumulate: int = 1,
    **options: Any,
) -> OneIsLeftOut:
    pl.seed_everything(3, verbose=False)
    module = kind(optimizer)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        plugins=[ForkedRanks(rank, ranks)],
        strategy=ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=not whole),
        callbacks=[ExactResume(), *extra],
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(rank))
    trainer.fit(module, DataLoader(rows, batch_size=None), **options)
    return module


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("optimizer", [GaLoreAdamW, StableAdamW])
def test_what_had_no_gradient_is_not_asked_for(tmp_path: Path, whole: bool, optimizer: Any) -> None:
    """Neither is a count forgotten that began in training: the first step has been skipped."""
    path = tmp_path / "saved.ckpt"
    build = partial(optimizer, lr=0.1)
    if optimizer is GaLoreAdamW:
        build = partial(build, rank=2, update_proj_gap=2)

    def on_a_rank(rank: int) -> tuple[list[Tensor], list[Tensor], int, list[bool]]:
        module = fit(rank, build, whole=whole, steps=4)
        module.trainer.save_checkpoint(path)
        module = fit(rank, build, whole=whole, steps=7, ckpt_path=path)
        skipped = module.trainer.optimizers[0].skipped_steps
        resumed = [p.full_tensor() for p in module.parameters()]
        asked = [p.requires_grad for p in module.parameters()]
        straight = fit(rank, build, whole=whole, steps=7)
        return resumed, [p.full_tensor() for p in straight.parameters()], skipped, asked

    for resumed, straight, skipped, asked in run_ranks(on_a_rank):
        assert skipped == 1
        assert all(asked)
        assert all(map(torch.equal, resumed, straight))


def weights(module: pl.LightningModule) -> list[Tensor]:
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()  # what no backward has reached
    return [p.full_tensor() for p in module.parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("optimizer", "states"), [(torch.optim.AdamW, 4), (torch.optim.SGD, 0)])
def test_what_is_frozen_when_it_is_loaded_keeps_its_state(
    tmp_path: Path, whole: bool, optimizer: Any, states: int
) -> None:
    """Attributes, and with them what trains, are put back behind its parts; SGD keeps none."""
    path, build = tmp_path / "saved.ckpt", partial(optimizer, lr=0.1)

    def on_a_rank(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        options: dict[str, Any] = {"whole": whole, "steps": 14, "kind": OneThaws}
        straight = fit(rank, build, SaveAt(11, path), **options)
        resumed = fit(rank, build, ckpt_path=path, **options)
        assert len(resumed.trainer.optimizers[0].state) == states
        return weights(resumed), weights(straight)

    for resumed, straight in run_ranks(on_a_rank):
        assert all(map(torch.equal, resumed, straight))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("kind", "optimizer", "batches"),
    [
        (OneThaws, torch.optim.AdamW, 0),
        (OneThaws, torch.optim.AdamW, 2),  # the window is open
        (OneIsLeftOut, StableAdamW, 4),  # the first step has been skipped
    ],
)
def test_a_save_before_the_first_update_counts_none(
    tmp_path: Path, whole: bool, kind: Any, optimizer: Any, batches: int
) -> None:
    path, build = tmp_path / "saved.ckpt", partial(optimizer, lr=0.1)
    options: dict[str, Any] = {"whole": whole, "steps": 4, "accumulate": 4, "kind": kind}

    def on_a_rank(rank: int) -> list[list[Tensor]]:
        saved = fit(rank, build, SaveAt(batches, path), **options)
        return [weights(each) for each in (saved, fit(rank, build, ckpt_path=path, **options))]

    def plain(rank: int) -> list[Tensor]:
        return weights(fit(rank, build, **options))

    for runs, expected in zip(run_ranks(on_a_rank), run_ranks(plain), strict=True):
        for ours in runs:
            assert all(map(torch.equal, ours, expected))


def test_a_state_goes_to_another_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    build = partial(GaLoreAdamW, lr=0.1, rank=2, proj_type="full")

    def state_of(module: OneIsLeftOut) -> dict[str, Tensor]:
        state = module.trainer.optimizers[0].state[module.layers[2].weight]
        parts = {name: value for name, value in state.items() if name not in ("step", "offset")}
        return {name: part.full_tensor() for name, part in parts.items()}

    def save(rank: int) -> dict[str, Tensor]:
        module = fit(rank, build, whole=False, steps=4)
        module.trainer.save_checkpoint(path)
        return state_of(module)

    def load(rank: int) -> dict[str, Tensor]:
        module = fit(rank, build, whole=False, steps=4, ranks=3, ckpt_path=path)
        return state_of(module)

    saved = run_ranks(save)[0]
    assert len(saved) == 4
    for loaded in run_ranks(load, world_size=3):
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_a_state_of_another_rank_is_refused(tmp_path: Path, whole: bool) -> None:
    path = tmp_path / "saved.ckpt"

    def on_a_rank(rank: int) -> None:
        build = partial(GaLoreAdamW, lr=0.1)
        module = fit(rank, partial(build, rank=2), whole=whole, steps=2)
        module.trainer.save_checkpoint(path)
        rule = (
            r"GaLoreAdamW\.load_state_dict\(.* 'layers\.0\.weight' must hold .*\(6, 3\).* \(6, 2\)"
        )
        with pytest.raises(ValueError, match=rule):
            fit(rank, partial(build, rank=3), whole=whole, steps=3, ckpt_path=path)

    run_ranks(on_a_rank)


def test_what_is_no_checkpoint_is_left_to_lightning(tmp_path: Path) -> None:
    def on_a_rank(rank: int) -> None:
        with pytest.raises(ValueError, match="does not point to a valid checkpoint"):
            fit(rank, StableAdamW, whole=False, steps=2, ckpt_path=tmp_path)

    run_ranks(on_a_rank)
