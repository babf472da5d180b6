"""Laws of strategies, for Lightning's ModelParallelStrategy: our modules shard themselves for it.

Two ranks give the losses of one process up to summation order; a run whose ranks are killed and
that is resumed from the folder which they have written ends bit-identical to one never stopped.
Lightning starts this strategy's processes by running a script anew, so here they are there already.
"""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_align.layers.sharding import is_sharded
from tests.helpers.ranks import ForkedRanks, end_of_ranks, run_ranks
from tests.helpers.resume import SaveEveryBatch
from tests.laws.composition import note
from tests.laws.members import (
    ADAPTED,
    CACHED,
    CALLBACKS,
    FOLLOWED,
    MODULES,
    OPTIMIZERS,
    Member,
)
from tests.laws.runs import KillAt, Outcome, Run, on_its_data, refusal

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

Reference = Callable[[Run], Outcome]
PRETRAIN, DPO = MODULES[:2]
COLUMN = "model_parallel, 2 ranks"  # whoever refuses says so under this name


@dataclass(frozen=True)
class OnARank(Run):
    """A run's part on one of two ranks."""

    rank: int = 0

    def trainer_options(self, folder: Path) -> dict[str, Any]:
        # AsyncCheckpoint copies a state that rank 0 has whole.
        parts = all(callback.name != "AsyncCheckpoint" for callback in self.callbacks)
        strategy = ModelParallelStrategy(save_distributed_checkpoint=parts)
        two = {"devices": 2, "strategy": strategy}
        return {**super().trainer_options(folder), **two, "plugins": [ForkedRanks(self.rank, 2)]}


def on_rank(run: Run, rank: int) -> OnARank:
    """The run with half of each batch."""
    given = {each.name: getattr(run, each.name) for each in fields(Run)}
    return OnARank(**{**given, "batch_size": run.batch_size // 2, "rank": rank})


def fit_on(
    rank: int,
    run: Run,
    folder: Path,
    material: Path,
    *,
    ckpt_path: str | None = None,
    extra: Sequence[pl.Callback] = (),
) -> None:
    with on_rank(run, rank).trainer(folder, material, extra=extra) as (trainer, module, data):
        trainer.fit(module, data, ckpt_path=ckpt_path)


def fit_sharded(run: Run, folder: Path, material: Path, **options: Any) -> Outcome:
    run_ranks(lambda rank: fit_on(rank, run, folder, material, **options), timeout_s=300)
    return Outcome.read(folder)


def equals_one_process(run: Run, folder: Path, material: Path, reference: Reference) -> None:
    # Without dropout: each rank draws masks of its own.
    run = replace(run, dropout=False, max_epochs=1, limit_batches=6)
    expected = reference(run).losses[0]
    first, second = fit_sharded(run, folder, material).losses
    ours = {position: first[position] + second[position] for position in first}
    # fp32 sums over some hundred tokens in another order
    assert ours == pytest.approx(expected, rel=1e-5)


def is_refused(run: Run, folder: Path, material: Path, rule: str) -> None:
    with pytest.raises(RuntimeError, match=rf"(?s)2 of 2 ranks failed.*ValueError: .*{rule}"):
        fit_sharded(run, folder, material)
    assert not list(folder.glob("losses.*"))


class KillRanksAt(KillAt):
    """Kills each rank by itself: they have no group of processes of their own."""

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def resumes(run: Run, folder: Path, material: Path, position: int) -> None:
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()

    def on_a_rank(rank: int) -> None:
        fit_on(rank, run, killed, material, extra=[SaveEveryBatch(), KillRanksAt(position)])

    expected = fit_sharded(run, whole, material)
    ended = end_of_ranks(on_a_rank, timeout_s=300)
    assert [rank.exit_code for rank in ended] == [-signal.SIGKILL] * 2
    ckpt_path = str(killed / f"batch={position}.ckpt")
    assert fit_sharded(run, killed, material, ckpt_path=ckpt_path) == expected, "not the same bits"


def resumes_in_mid_window(run: Run, folder: Path, material: Path) -> None:
    """Killed in mid-accumulation: each rank has its part of the gradients that wait."""
    run = replace(run, accumulate=3, max_epochs=1, limit_batches=6)
    resumes(run, folder, material, 4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_optimizers(
    optimizer: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    run = replace(on_its_data(PRETRAIN), optimizer=optimizer)
    equals_one_process(run, tmp_path, material, reference)
    (tmp_path / "resumed").mkdir()
    resumes_in_mid_window(run, tmp_path / "resumed", material)
    note("Optimizers and strategies", optimizer.name, COLUMN, "equal, resumes")


@pytest.mark.parametrize("callback", CALLBACKS, ids=str)
def test_callbacks(callback: Member, tmp_path: Path, material: Path, reference: Reference) -> None:
    module = DPO if refusal(callback, PRETRAIN) else PRETRAIN
    run = replace(on_its_data(module), callbacks=(callback,))
    if (rule := callback.refuses.get(COLUMN)) is not None:
        is_refused(run, tmp_path, material, rule)
        note("Callbacks and strategies", callback.name, COLUMN, "refuses")
        return
    equals_one_process(run, tmp_path, material, reference)
    (tmp_path / "resumed").mkdir()
    resumes_in_mid_window(run, tmp_path / "resumed", material)
    note("Callbacks and strategies", callback.name, COLUMN, "equal, resumes")


@pytest.mark.parametrize("module", [PRETRAIN, DPO, ADAPTED, CACHED, FOLLOWED], ids=str)
def test_modules(module: Member, tmp_path: Path, material: Path, reference: Reference) -> None:
    run = on_its_data(module)
    if (rule := module.refuses.get(COLUMN)) is not None:
        is_refused(run, tmp_path, material, rule)
        note("Modules and strategies", module.name, COLUMN, "refuses")
        return
    equals_one_process(run, tmp_path, material, reference)
    (tmp_path / "resumed").mkdir()
    resumes_in_mid_window(run, tmp_path / "resumed", material)
    note("Modules and strategies", module.name, COLUMN, "equal, resumes")


def test_the_laws_fail_where_they_are_broken(
    tmp_path: Path, material: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss outside of the model's forward, as our losses are: gradients stay with their rank."""
    from lightning_align.modules import causal_lm

    def gathered_alone(model: Any, function: Callable[[], Any]) -> Any:
        if is_sharded(model):  # the reference is not
            model.unshard()
        return function()

    run = on_its_data(PRETRAIN)
    reference(replace(run, dropout=False, max_epochs=1, limit_batches=6))  # of the unbroken one
    monkeypatch.setattr(causal_lm, "as_forward", gathered_alone)
    # AdamW finds gradients that are whole beside weights that are parts.
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        equals_one_process(run, tmp_path, material, reference)
