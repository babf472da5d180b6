"""SpikeGuard on two ranks: one verdict, and all skip; under DDP, in a pipeline, with blocks on
disk."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import Muon, PretrainModule, SpikeGuard, ZeROInfinityStrategy
from lightning_align.run.protocols import gathered
from lightning_align.stability import SpikeDetector, SpikeVerdict
from tests.callbacks.spikes.test_guard import Watch
from tests.helpers.pipelines import Run, one_process, pipeline
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.spiky import AlarmAt, Regression, batches
from tests.modules.test_pretrain import fit, llama, rows, weights

POISONED = 4  # the batch that is not a number on one rank
PLANTED = 12  # the batch that is large there, where it is one


class PoisonedRegression(Regression):
    """On one rank a batch has a loss that is not a number, or is large."""

    rank = 0
    factor, at = math.nan, POISONED

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        poisoned = self.global_rank == self.rank and batch_idx == self.at
        return loss * self.factor if poisoned else loss


class PoisonedPretrain(PretrainModule):
    """The same of ours."""

    rank = 0
    number = 0
    factor, at = math.nan, POISONED

    def loss_from_hidden(self, hidden_BTD: torch.Tensor, batch: Any) -> Any:
        loss, sums = super().loss_from_hidden(hidden_BTD, batch)
        poisoned = self.global_rank == self.rank and self.number == self.at
        self.number += 1
        if poisoned:
            total, weight = sums["loss"]
            return loss * self.factor, {**sums, "loss": (total * self.factor, weight)}
        return loss, sums


def train_on_ranks(
    make: Any, data: Any, strategy: Any = "ddp", detector: Any = None, **options: Any
) -> list[Any]:
    """(weights behind each step, what the detector has seen) of each of two ranks."""

    def train(rank: int) -> Any:
        guard = SpikeGuard(detector=(detector or NanDetector)())
        watch = Watch()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy() if callable(strategy) else strategy,
            plugins=[ForkedRanks(rank, 2)],
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[guard, watch],
            use_distributed_sampler=False,
            **options,
        )
        module = make()
        trainer.fit(module, DataLoader(data(rank), batch_size=None))
        return watch.weights, guard.detector.seen  # type: ignore[attr-defined]

    return run_ranks(train)


class NanDetector(AlarmAt):
    """Raises an alarm at what is not a number, and notes what it is told."""

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> Any:
        self.steps = () if math.isfinite(loss) else (step,)
        return super().update(step, loss, grad_norm)


class Judging(SpikeDetector):
    """Judges by itself, and notes what it is told and says."""

    def __init__(self) -> None:
        super().__init__(window=16, warmup=8)
        self.seen: list[Any] = []

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> SpikeVerdict:
        verdict = super().update(step, loss, grad_norm)
        self.seen.append((step, loss, grad_norm, verdict.reason))
        return verdict


def planted(kind: Any, rank: int, count: int, **how: Any) -> tuple[Any, Any]:
    """A module that has a spike on one rank, and its data on each."""

    def make() -> Any:
        torch.manual_seed(0)
        module = kind() if kind is PoisonedRegression else kind(llama())
        vars(module).update(rank=rank, **how)
        return module

    def data(rank: int) -> Any:
        if kind is PoisonedRegression:
            return batches(count)[rank::2]
        return [rows(i, i + 1) for i in range(rank, count, 2)]

    return make, data


KINDS = [PoisonedRegression, pytest.param(PoisonedPretrain, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_spike_on_one_rank_is_skipped_on_both(kind: Any, rank: int) -> None:
    """Loss and gradient are large and finite, on that rank only; the detector is the default's."""
    make, data = planted(kind, rank, 32, factor=1e3, at=PLANTED)
    (ours, seen), (theirs, also_seen) = train_on_ranks(make, data, detector=Judging)
    assert all(map(torch.equal, ours, theirs))
    assert seen == also_seen
    assert [step for step, *_, reason in seen if reason] == [PLANTED]
    assert all(math.isfinite(loss) and math.isfinite(norm) for _, loss, norm, _ in seen)
    assert torch.equal(ours[PLANTED], ours[PLANTED - 1])
    assert not torch.equal(ours[PLANTED + 1], ours[PLANTED])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_on_one_rank_is_skipped_on_both(kind: Any, rank: int) -> None:
    make, data = planted(kind, rank, 20)
    (ours, seen), (theirs, also_seen) = train_on_ranks(make, data)
    assert all(map(torch.equal, ours, theirs))
    assert str(seen) == str(also_seen)  # NaN included
    assert [step for step, loss, _ in seen if not math.isfinite(loss)] == [POISONED]
    assert torch.equal(ours[POISONED], ours[POISONED - 1])
    assert not torch.equal(ours[POISONED + 1], ours[POISONED])
    assert ours[-1].isfinite().all()


PIPELINES: list[dict[str, Any]] = [
    {"schedule": "1F1B"},
    {"schedule": "Interleaved1F1B", "num_stages_per_rank": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", PIPELINES, ids=lambda each: each["schedule"])
@pytest.mark.parametrize("model", ["chain", "llama"])
def test_a_pipeline_skips_and_clips_on_all_ranks_as_one_process_does(
    model: str, strategy: dict[str, Any]
) -> None:
    guard = lambda: SpikeGuard(detector=AlarmAt(2, 5), agc=0.05)  # noqa: E731
    run = Run(model, strategy, steps=9, callbacks=[guard], clip=0.1)
    run = replace(run, data={"masked": model != "chain"})
    ranks, alone = pipeline(run), one_process(run)
    clips_alone = [lambda: SpikeGuard(detector=AlarmAt(), agc=0.05)]
    unguarded = one_process(replace(run, callbacks=clips_alone))
    assert ranks[0]["losses"] == ranks[1]["losses"]
    # Sums over micro-batches in another order, in fp32.
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert alone["losses"][:3] == unguarded["losses"][:3]
    assert alone["losses"][3:] != pytest.approx(unguarded["losses"][3:], rel=1e-4)


class Counting(ZeROInfinityStrategy):
    """Notes how much was written when forward and backward have run."""

    def __init__(self, **arguments: Any) -> None:
        small: dict[str, Any] = {"params_buffer_count": 2, "sub_group_size": 400}
        super().__init__(**small, **arguments)
        self.forward: list[int] = []
        self.backward_done: list[int] = []

    def _written(self) -> int:
        assert self._engine is not None
        self._engine.gradients.settle_all()
        self._engine.store.settle_all()
        return self._engine.threads.traffic.written

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.forward.append(self._written())  # updates that have waited are done
        return loss

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().backward(*args, **kwargs)
        self.backward_done.append(self._written())
        return loss


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, pytest.param(Muon, marks=pytest.mark.slow)]
)
def test_blocks_on_disk_are_skipped_and_nothing_is_written(optimizer: Any, tmp_path: Any) -> None:
    """Windows of two batches, with a clip; the fourth step is left out."""

    def run(strategy: Any) -> tuple[torch.Tensor, Any]:
        torch.manual_seed(0)
        module = PretrainModule(llama(num_hidden_layers=4), optimizer=partial(optimizer, lr=1e-2))
        guard = SpikeGuard(detector=AlarmAt(3))
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
        data = [rows(i, i + 1) for i in range(12)]
        where = {"default_root_dir": tmp_path, "strategy": strategy}
        trainer = fit(module, data, callbacks=[guard], **options, **where)
        with gathered(trainer.strategy, list(module.parameters())):
            return weights(module), guard.detector.seen  # type: ignore[attr-defined]

    theirs, seen = run("auto")
    strategy = Counting()
    ours, also_seen = run(strategy)
    assert torch.equal(ours, theirs)
    assert also_seen == seen
    # From the backward that closes a window to the forward of the next one.
    pairs = zip(strategy.backward_done[1::2], strategy.forward[2::2], strict=False)
    assert [after > before for before, after in pairs] == [True, True, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, Muon])
def test_on_two_ranks_with_blocks_on_disk_neither_writes_in_a_skipped_step(
    optimizer: Any, tmp_path: Any
) -> None:
    """The fourth window of two batches is left out, and losses stay those of DDP."""

    def run(rank: int, strategy: Any) -> Any:
        torch.manual_seed(0)
        module = PretrainModule(llama(num_hidden_layers=4), optimizer=partial(optimizer, lr=1e-2))
        guard = SpikeGuard(detector=AlarmAt(3))
        data = [rows(i, i + 1) for i in range(rank, 24, 2)]
        ranks = {"devices": 2, "plugins": [ForkedRanks(rank, 2)], "use_distributed_sampler": False}
        where = {"default_root_dir": tmp_path, "strategy": strategy}
        trainer = fit(module, data, callbacks=[guard], accumulate_grad_batches=2, **ranks, **where)
        with gathered(trainer.strategy, list(module.parameters())):
            return weights(module).tolist(), guard.detector.seen  # type: ignore[attr-defined]

    def both(rank: int) -> Any:
        strategy = Counting()
        theirs, ours = run(rank, "ddp"), run(rank, strategy)
        return theirs, ours, strategy.backward_done, strategy.forward

    ranks = run_ranks(both, timeout_s=120)
    assert ranks[0][:2] == ranks[1][:2]
    for (theirs, seen), (ours, also_seen), backward_done, forward in ranks:
        # Muon's products, and norms of weights that are cut, are summed in another order.
        assert ours == (pytest.approx(theirs, abs=1e-5) if optimizer is Muon else theirs)
        for (_, loss, norm), (_, other, others) in zip(also_seen, seen, strict=True):
            assert loss == (pytest.approx(other, rel=1e-5) if optimizer is Muon else other)
            assert norm == pytest.approx(others, rel=1e-5)
        # From the backward that closes a window to the forward of the next one.
        pairs = zip(backward_done[1::2], forward[2::2], strict=False)
        assert [after > before for before, after in pairs] == [True, True, True, False, True]


def test_updates_in_backward_are_refused_beside_a_guard(tmp_path: Any) -> None:
    module = PretrainModule(llama())
    with pytest.raises(ValueError, match=r"update_in_backward=True.*looks at all gradients"):
        fit(
            module,
            [rows(0)],
            callbacks=[SpikeGuard()],
            default_root_dir=tmp_path,
            strategy=ZeROInfinityStrategy(update_in_backward=True),
        )
