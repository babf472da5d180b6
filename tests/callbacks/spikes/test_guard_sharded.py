"""SpikeGuard where each rank has a part of every parameter: what it does under DDP, to 1e-5."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_align import GaLoreAdamW, Muon, PretrainModule, SpikeGuard
from lightning_align.callbacks.spikes.memory import MEMORY, state_nbytes
from lightning_align.run.skipping import skipped_batches
from tests.callbacks.spikes.test_guard_ranks import Judging
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.spiky import Regression, batches
from tests.modules.test_pretrain import llama, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BATCHES, BAD = 32, 24  # of both ranks; the one that is large, or not a number, where it is one


class BadBatch(PretrainModule):
    """One batch, wherever it comes, has a loss that is large or not a number."""

    factor = 1e3

    def loss_from_hidden(self, hidden_BTD: torch.Tensor, batch: Any) -> Any:
        loss, sums = super().loss_from_hidden(hidden_BTD, batch)
        if not torch.equal(batch["input_ids"], rows(BAD)["input_ids"]):
            return loss, sums
        total, weight = sums["loss"]
        return loss * self.factor, {**sums, "loss": (total * self.factor, weight)}


class Kept(pl.Callback):
    """What a run came to: its weights, put together, and the batches that it has left out."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in pl_module.parameters()]
        self.found = {
            "weights": torch.cat([p.detach().flatten() for p in whole]),
            "left_out": skipped_batches(trainer).plain(),
            "nbytes": state_nbytes(trainer)[MEMORY],
        }


def fit(rank: int, module: pl.LightningModule, data: list[Any], **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        plugins=[ForkedRanks(rank, 2)],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def guarded(
    rank: int, strategy: Any, folder: Path, *, factor: float, optimizer: Any, **options: Any
) -> tuple[Kept, SpikeGuard]:
    """A run of ours in which the bad batch comes to rank 0 before the thirteenth step."""
    torch.manual_seed(0)
    module = BadBatch(llama(), optimizer=partial(optimizer, lr=1e-2))
    module.factor = factor
    kept, guard = Kept(), SpikeGuard(detector=Judging(), report_dir=str(folder), **options)
    data = [rows(number, number + 1) for number in range(rank, BATCHES, 2)]
    data = [{name: each[:1] for name, each in batch.items()} for batch in data]
    fit(rank, module, data, strategy=strategy(), callbacks=[guard, kept], gradient_clip_val=1.0)
    return kept, guard


def compare(folder: Path, **options: Any) -> tuple[list[Any], list[Any]]:
    """Of both ranks under DDP, and of both where it is sharded: what is kept and what is told."""
    options = {"factor": 1e3, "optimizer": torch.optim.AdamW, **options}

    def both(rank: int) -> list[Any]:
        results = []
        for strategy in (DDPStrategy, ModelParallelStrategy):
            place = folder / strategy.__name__
            kept, guard = guarded(rank, strategy, place, **options)
            seen, incidents = guard.detector.seen, guard.report.incidents  # type: ignore[attr-defined]
            results.append((kept.found, seen, incidents))
        return results

    ranks = run_ranks(both, timeout_s=120)
    return [each[0] for each in ranks], [each[1] for each in ranks]


def check_same_decisions(theirs: list[Any], ours: list[Any]) -> None:
    (first, seen, _), (second, also_seen, _) = ours
    assert torch.equal(first["weights"], second["weights"])
    assert str(seen) == str(also_seen)  # NaN included
    # Sums over ranks in another order, in fp32.
    torch.testing.assert_close(first["weights"], theirs[0][0]["weights"], rtol=1e-5, atol=1e-5)
    assert first["left_out"] == theirs[0][0]["left_out"]
    assert [each[3] for each in seen] == [each[3] for each in theirs[0][1]]  # reasons


@pytest.mark.parametrize("factor", [1e3, math.nan])
def test_a_spike_of_one_rank_is_skipped_and_explained_as_under_ddp(
    factor: float, tmp_path: Path
) -> None:
    """Also with units clipped at every step, which are rows, columns and vectors in parts."""
    theirs, ours = compare(tmp_path, factor=factor, agc=0.02)
    check_same_decisions(theirs, ours)
    (_, _, (their,)), (_, seen, (our,)) = theirs[0], ours[0]
    assert [step for step, *_, reason in seen if reason] == [our.step] == [BAD // 2]
    assert (our.action, our.missing, our.skipped) == ("skip", [], their.skipped)
    assert our.cause.kind == their.cause.kind == ("data" if factor == 1e3 else "numerics")
    same = partial(pytest.approx, rel=1e-4, nan_ok=True)
    for found, expected in zip(our.batches, their.batches, strict=True):
        assert (found.position, found.rank) == (expected.position, expected.rank)
        assert found.loss == same(expected.loss)
    for layer, other in zip(our.layers, their.layers, strict=True):
        assert layer.name == other.name
        assert layer.grad_norm == same(other.grad_norm)
        assert layer.usual_grad_norm == same(other.usual_grad_norm)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        pytest.param(Muon, marks=pytest.mark.slow),
        pytest.param(partial(GaLoreAdamW, rank=2, update_proj_gap=3), marks=pytest.mark.slow),
    ],
    ids=["AdamW", "Muon", "GaLoreAdamW"],
)
def test_a_spike_heals_by_a_rewind_as_under_ddp(optimizer: Any, tmp_path: Path) -> None:
    """Each rank goes back to its own parts; the batch comes no more, and is asked by the weights
    that the run has gone back to."""
    back = {"rewind_steps": 1, "snapshot_every_n_steps": 2, "skip_batches": 1, "lr_factor": 0.5}
    theirs, ours = compare(tmp_path, action="rewind", optimizer=optimizer, **back)
    check_same_decisions(theirs, ours)
    kept, seen, (incident,) = ours[0]
    assert incident.action == "rewind"
    assert kept["left_out"] == [[10, 14]]  # to the snapshot of step 10, past batch 12 and one more
    after = [b.loss_after for b in incident.batches]
    expected = [b.loss_after for b in theirs[0][2][0].batches]
    assert after == pytest.approx(expected, rel=1e-5)
    assert max(loss for _, loss, _, reason in seen if not reason) < 10
    # A snapshot is half of DDP's, but for counters and buffers.
    assert kept["nbytes"] == pytest.approx(theirs[0][0]["nbytes"] / 2, rel=0.02)


class ShardsItself(Regression):
    """A module of one's own; ``in_part`` leaves a layer of it whole on each rank."""

    def __init__(self, in_part: bool = False) -> None:
        super().__init__()
        self.in_part = in_part

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[2], mesh=mesh)
        if not self.in_part:
            fully_shard(self.net, mesh=mesh)


def sharded(rank: int, module: pl.LightningModule, **options: Any) -> SpikeGuard:
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1, **options}
    guard = SpikeGuard(["skip", "stop"], Judging())
    fit(
        rank,
        module,
        batches(48, at29=1e4)[rank::2],
        strategy=ModelParallelStrategy(**sizes),
        callbacks=[guard],
    )
    return guard


def test_a_module_that_shards_itself_is_guarded_too() -> None:
    def on_a_rank(rank: int) -> Any:
        return sharded(rank, ShardsItself()).detector.seen  # type: ignore[attr-defined]

    ours, theirs = run_ranks(on_a_rank)
    assert ours == theirs
    assert [step for step, *_, reason in ours if reason] == [14]


def test_what_is_not_cut_into_parts_of_all_ranks_is_refused() -> None:
    def on_a_rank(rank: int) -> None:
        rule = r"^SpikeGuard\(model='ShardsItself'\): 'net\.0\.weight' is not cut into parts"
        with pytest.raises(ValueError, match=rule):
            sharded(rank, ShardsItself(in_part=True))
        rule = r"^SpikeGuard\(strategy='ModelParallelStrategy'\): it divides layers among ranks"
        with pytest.raises(ValueError, match=rule):
            sharded(rank, ShardsItself(), data_parallel_size=1, tensor_parallel_size=2)

    run_ranks(on_a_rank)


def test_memory_that_ends_on_one_rank_alone_ends_the_run(tmp_path: Path) -> None:
    """The others wait for its parts: to go on would be a deadlock."""

    class NoMemory(BadBatch):
        def batch_loss(self, batch: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory")

    class NoMemoryElsewhere(BadBatch):
        def batch_loss(self, batch: Any) -> torch.Tensor:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    class Fails(BadBatch):
        def batch_loss(self, batch: Any) -> torch.Tensor:
            raise KeyError("a column")

    def run(rank: int, kind: Any) -> SpikeGuard:
        torch.manual_seed(0)
        module, guard = kind(llama()), SpikeGuard(detector=Judging(), report_dir=str(tmp_path))
        data = [{n: x[:1] for n, x in rows(i, i + 1).items()} for i in range(rank, BATCHES, 2)]
        fit(rank, module, data, strategy=ModelParallelStrategy(), callbacks=[guard])
        return guard

    def on_a_rank(rank: int) -> None:
        (incident,) = run(rank, Fails).report.incidents  # alike on all ranks: the run goes on
        assert any("KeyError" in text for text in incident.missing)
        with pytest.raises(torch.OutOfMemoryError):
            run(rank, NoMemory)
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            run(rank, NoMemoryElsewhere)

    run_ranks(on_a_rank)
