"""A run goes back behind checkpoints: which are withdrawn, named, saved again, and resumed from."""

import os
import signal
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import AsyncCheckpoint, ExactResume, SpikeGuard
from lightning_align.callbacks.checkpoint_withdrawal import SavedSteps, Withdrawn
from lightning_align.checkpointing import committed_checkpoints
from tests.callbacks.test_async_checkpoint import fit, names
from tests.helpers.children import in_child
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.spiky import AlarmOnce
from tests.run.test_skipping import GoesBack


class Withdraws(GoesBack):
    """As SpikeGuard does, in the hook in which it goes back."""

    def __init__(self, *jumps: tuple[int, int, int]) -> None:
        super().__init__(*jumps)
        self.saved, self.found = SavedSteps(), Withdrawn([], [])
        self.standing: tuple[str, str] | None = None
        self.callback: ModelCheckpoint | None = None
        self.back = False

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        self.saved.note(trainer)
        super().on_train_batch_end(trainer, *rest)

    def went_back(self, trainer: Any) -> None:
        self.found, self.back = self.saved.go_back(trainer), True
        if self.callback is not None:
            best, last = self.callback.best_model_path, self.callback.last_model_path
            self.standing = Path(best).stem, Path(last).stem


def stems(paths: list[str]) -> set[str]:
    return {Path(path).stem for path in paths}


def every_step(folder: Path, **options: Any) -> AsyncCheckpoint:
    defaults = {"every_n_train_steps": 1, "save_top_k": -1}
    return AsyncCheckpoint(folder, "{step}", **{**defaults, **options})


def test_what_was_saved_behind_the_batch_is_withdrawn_and_goes(tmp_path: Path) -> None:
    """Saved up to step 4, back to 2; steps 3 to 12 are saved once more."""
    callback, back = every_step(tmp_path), Withdraws((2, 5, 0))
    back.callback = callback
    fit(back, callback, folder=tmp_path)
    assert stems(back.found.withdrawn) == {"step=3", "step=4"}
    assert back.found.named == []
    assert back.standing == ("step=2", "step=2")
    left = {"step=1", "step=2", "step=2-v1", "step=3-v1", "step=4-v1"}
    assert names(tmp_path) == left | {f"step={n}" for n in range(5, 13)}
    assert not list(tmp_path.glob("*.withdrawn"))
    assert Path(callback.best_model_path).stem == "step=12"


def test_in_a_folder_behind_a_url_it_is_the_same(tmp_path: Path) -> None:
    """Right behind the way back none of the stretch is ``last``, also for who only lists files."""
    url = f"memory://{tmp_path.name}/checkpoints"
    latest: list[str] = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if back.back and not latest:
                callback._folder.wait(None)  # type: ignore[union-attr]
                latest.append(AsyncCheckpoint.latest(url) or "")

    callback = AsyncCheckpoint(url, "{step}", every_n_train_steps=3, save_top_k=-1)
    back = Withdraws((2, 5, 0))  # step 3 is of the stretch, and there is no other one
    fit(back, callback, Looks(), folder=tmp_path)
    assert [path.rpartition("/")[2] for path in back.found.withdrawn] == ["step=3.ckpt"]
    assert stems(latest) == {"step=2"}
    assert names(url) == {"step=2", "step=3-v1", "step=6", "step=9", "step=12"}
    files = fsspec.filesystem("memory")
    assert not files.glob(f"/{tmp_path.name}/checkpoints/*.withdrawn")
    files.rm(f"/{tmp_path.name}", recursive=True)


def test_the_step_that_was_saved_last_is_saved_again(tmp_path: Path) -> None:
    callback = every_step(tmp_path, every_n_train_steps=3)
    fit(Withdraws((4, 7, 0)), callback, folder=tmp_path)
    assert names(tmp_path) == {"step=3", "step=6-v1", "step=9", "step=12"}


def test_if_nothing_is_left_the_state_that_was_gone_back_to_is_saved(tmp_path: Path) -> None:
    """At step 3, of which the only checkpoint is; back to step 2, where none is due."""
    callback = AsyncCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=1)
    back = Withdraws((2, 4, 1))
    seen: list[set[str]] = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if back.back and not seen:
                callback._folder.wait(None)  # type: ignore[union-attr]
                seen.append(names(tmp_path))

    fit(back, callback, Looks(), folder=tmp_path)
    assert stems(back.found.withdrawn) == {"step=3"}
    assert seen == [{"step=2"}]
    assert names(tmp_path) == {"step=12"}


def test_by_a_monitored_value_the_best_of_the_stretch_is_best_no_longer(tmp_path: Path) -> None:
    options = {"monitor": "loss", "mode": "max", "save_last": True}
    callback, back = every_step(tmp_path, **options), Withdraws((1, 5, 0))
    back.callback = callback
    fit(back, callback, folder=tmp_path, max_epochs=1)
    assert back.found.withdrawn
    assert back.standing == ("step=1", "step=1")
    assert not stems(back.found.withdrawn) & {
        Path(path).stem for path in [*callback.best_k_models, callback.last_model_path]
    }


class Dies(pl.Callback):
    """SIGKILL to this process, some batches after it has gone back, once all is written."""

    def __init__(self, back: Withdraws, callback: AsyncCheckpoint, batches: int) -> None:
        self.back, self.callback, self.left = back, callback, batches

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.back.back:
            if self.left == 0:
                self.callback._folder.wait(None)  # type: ignore[union-attr]
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "batches", "newest"), [(4, 0, 4), (3, 0, 3), (3, 2, 6), (1, 1, 5)]
)
def test_a_kill_behind_the_way_back_resumes_from_what_counts(
    tmp_path: Path, every: int, batches: int, newest: int
) -> None:
    """From step 8 back to 4: what was saved at 5, 6 or 7 is not what ``last`` means, though newest.

    What is saved in the hook of the way back, or behind it, knows what is left out.
    """
    jump = (4, 8, 1)

    def weights(*callbacks: pl.Callback, **options: Any) -> dict[str, torch.Tensor]:
        made = fit(*callbacks, folder=tmp_path, **options)
        return made.lightning_module.state_dict()

    whole = weights(ExactResume(), Withdraws(jump), enable_checkpointing=False)
    dirpath = tmp_path / "checkpoints"

    def killed() -> None:
        callback, back = every_step(dirpath, every_n_train_steps=every), Withdraws(jump)
        fit(back, callback, Dies(back, callback, batches), folder=tmp_path)

    assert in_child(killed) == -signal.SIGKILL
    found = AsyncCheckpoint.latest(dirpath)
    assert found is not None
    at = torch.load(found, weights_only=True)["global_step"]
    assert at == newest
    back = Withdraws(jump)
    resumed = weights(back, every_step(dirpath, every_n_train_steps=every), ckpt_path="last")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    assert back.back == (at < 4), "behind the way back the ranges are in the checkpoint"


@pytest.mark.parametrize("save_last", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_those_of_model_checkpoint_are_named_and_its_steps_saved_again(
    tmp_path: Path, save_last: bool
) -> None:
    options = {"every_n_train_steps": 1, "save_top_k": -1, "save_last": save_last}
    theirs, back = ModelCheckpoint(tmp_path, "{step}", **options), Withdraws((2, 4, 0))
    fit(ExactResume(), back, theirs, folder=tmp_path, max_epochs=1)
    assert back.found.withdrawn == []
    assert stems(back.found.named) == {"step=3", *(["last"] if save_last else [])}
    found = {path.stem for path in tmp_path.glob("step*.ckpt")}
    assert found == {*(f"step={n}" for n in range(1, 7)), "step=2-v1", "step=3-v1"}
    first, again = (torch.load(tmp_path / f"step=3{v}.ckpt") for v in ("", "-v1"))
    assert first["global_step"] == again["global_step"] == 3
    assert any(not torch.equal(v, again["state_dict"][k]) for k, v in first["state_dict"].items())
    assert back.found.notes == [
        f"Saved of the stretch that was left, and kept: {', '.join(back.found.named)}"
    ]


def test_the_incident_of_a_rewind_names_what_was_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rewind_steps": 1, "snapshot_every_n_steps": 2, "skip_batches": 0}
    guard = SpikeGuard("rewind", AlarmOnce(3), **options)
    theirs = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(guard, theirs, folder=tmp_path, max_epochs=1)
    (incident,) = guard.report.incidents
    note = f"Saved of the stretch that was left, and kept: {tmp_path / 'step=3.ckpt'}"
    assert incident.notes == [note]


@pytest.mark.slow
def test_two_ranks_withdraw_together(tmp_path: Path) -> None:
    """Three batches are an epoch of a rank."""

    def on(rank: int) -> list[str]:
        options = {"strategy": "ddp", "devices": 2, "plugins": [ForkedRanks(rank, 2)]}
        callback, back = every_step(tmp_path), Withdraws((1, 2, 0))
        fit(back, callback, folder=tmp_path, **options)
        return back.found.withdrawn

    assert run_ranks(on) == [[], []], "the save of the alarm's own batch had yet to come"
    found = committed_checkpoints(tmp_path)
    assert [each.step for each in found[:6]] == [6, 5, 4, 3, 2, 1]
    assert [each.metadata["batches"] for each in found[:2]] == [6, 5]


def test_what_a_resumed_run_finds_is_of_no_step_that_it_knows(tmp_path: Path) -> None:
    theirs = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(ExactResume(), theirs, folder=tmp_path, max_epochs=1)
    again = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    back = Withdraws((8, 10, 0))
    fit(ExactResume(), back, again, folder=tmp_path, ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert stems(back.found.named) == {"step=9"}
