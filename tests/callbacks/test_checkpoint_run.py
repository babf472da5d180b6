"""A run has one id, in all of its folders and resumes, and one W&B run."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

from lightning_align import AsyncCheckpoint
from lightning_align.callbacks.checkpoint_folder import SAVES
from lightning_align.callbacks.checkpoint_run import CheckpointRun, run_of
from lightning_align.checkpointing import committed_checkpoints
from tests.callbacks.test_async_checkpoint import fit, trainer


def test_a_trainer_has_one_run_and_a_copy_is_of_none(tmp_path: Path) -> None:
    ours, other = trainer(folder=tmp_path), trainer(folder=tmp_path)
    run = CheckpointRun(ours)
    assert run_of(ours, [CheckpointRun(), CheckpointRun(other), run]) is run
    new = run_of(other, [CheckpointRun(), run])
    assert new.is_of(other)
    assert new.id != run.id
    for copied in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        assert copied.id == run.id
        assert not copied.is_of(ours)


def test_saves_are_counted_over_all_folders_and_resumes(tmp_path: Path) -> None:
    def numbers(max_epochs: int, ckpt_path: str | None = None) -> list[int]:
        callbacks = [
            AsyncCheckpoint(tmp_path / str(n), every_n_train_steps=n, save_top_k=-1) for n in (2, 3)
        ]
        fit(*callbacks, folder=tmp_path, max_epochs=max_epochs, ckpt_path=ckpt_path)
        found = [found for each in callbacks for found in committed_checkpoints(each.dirpath)]
        assert {each.metadata["run"] for each in found} == {callbacks[0].run_id}
        return sorted(each.metadata[SAVES] for each in found)

    assert numbers(1) == [1, 2, 3, 4, 5]
    assert numbers(2, "last") == list(range(1, 11))


def test_a_callback_in_another_trainer_is_another_run(tmp_path: Path) -> None:
    """Nothing would tell the checkpoints of the two apart. It saves at the same steps again."""
    callback = AsyncCheckpoint(tmp_path)
    fit(callback, folder=tmp_path, max_epochs=1)
    first = callback.run_id
    with pytest.warns(UserWarning, match="holds checkpoints of another run"):
        fit(callback, folder=tmp_path, max_epochs=1)
    assert callback.run_id != first
    assert callback.dirpath == str(tmp_path / "version_1")
    made = fit(callback, folder=tmp_path, ckpt_path="last")
    assert made.global_step == 12
    assert callback.dirpath == str(tmp_path / "version_1")


@pytest.mark.slow
def test_resumed_run_continues_the_wandb_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    def logger(**options: Any) -> Any:
        return WandbLogger(save_dir=tmp_path, offline=True, project="p", **options)

    first, second, other = logger(), logger(), logger(id="other")
    fit(AsyncCheckpoint(tmp_path / "c"), folder=tmp_path, logger=first, max_epochs=1)
    identity = first.experiment.id
    wandb.finish()
    fit(AsyncCheckpoint(tmp_path / "c"), folder=tmp_path, logger=second, ckpt_path="last")
    assert second.experiment.id == identity
    wandb.finish()
    with pytest.warns(UserWarning, match=f"checkpoint is of the W&B run {identity}, and this run"):
        fit(
            AsyncCheckpoint(tmp_path / "c"),
            folder=tmp_path,
            logger=other,
            ckpt_path="last",
            max_epochs=3,
        )
    assert other.experiment.id == "other"
