"""A script that is run once more loses nothing, and each way to resume finds the newest run."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_align import AsyncCheckpoint
from lightning_align.callbacks.checkpoint_place import BestOfEarlier, Place, place_of
from lightning_align.checkpointing import SnapshotEngine, load_checkpoint
from lightning_align.checkpointing.files import Folder
from tests.callbacks.test_async_checkpoint import fit, names, trainer
from tests.helpers.foreign import Stranger
from tests.helpers.ranks import ForkedRanks, run_ranks


def save(dirpath: Any, run: str, step: int, commits_before: int = 0, **about: Any) -> None:
    with SnapshotEngine(dirpath, commits_before=commits_before) as engine:
        engine.save({"weight": torch.ones(2)}, f"step={step}", step, {"run": run, **about})


def ours(folder: Path, **options: Any) -> AsyncCheckpoint:
    options = {"every_n_train_steps": 3, "save_last": True, "filename": "{step}", **options}
    return AsyncCheckpoint(folder, **options)


# A rerun


def test_a_rerun_saves_in_a_version_and_last_goes_on_with_it(tmp_path: Path) -> None:
    """Three times the same script, with its folder; the third run is resumed as a new process."""
    fit(ours(tmp_path / "c"), folder=tmp_path)
    for number in (1, 2):
        callback = ours(tmp_path / "c")
        message = (
            r"AsyncCheckpoint\(dirpath='.*c'\): holds checkpoints of another run, such as 'step=12'"
            rf" \(step 12\), which stay; this run saves in version_{number} there. To go on with"
            r" the newest run, pass fit\(ckpt_path='last'\). .* overwrite=True"
        )
        with pytest.warns(UserWarning, match=message):
            fit(callback, folder=tmp_path, max_epochs=1)
        newest = tmp_path / "c" / f"version_{number}" / "step=6.ckpt"
        assert callback.last_model_path == AsyncCheckpoint.latest(tmp_path / "c") == str(newest)
    assert names(tmp_path / "c") == {"step=12"}
    resumed = ours(tmp_path / "c")
    made = fit(resumed, folder=tmp_path, ckpt_path="last", max_epochs=3)
    assert made.ckpt_path == str(newest)
    assert (made.global_step, resumed.dirpath) == (18, str(newest.parent))
    assert names(newest.parent) == {"step=18", "step=6"}, "what it went on from is kept"
    assert names(tmp_path / "c" / "version_1") == {"step=6"}


def test_an_older_run_is_resumed_by_its_path_and_is_the_newest_then(tmp_path: Path) -> None:
    fit(ours(tmp_path), folder=tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="this run saves in version_1"):
        fit(ours(tmp_path), folder=tmp_path)
    assert AsyncCheckpoint.latest(tmp_path) == str(tmp_path / "version_1" / "step=12.ckpt")
    callback = ours(tmp_path)
    fit(callback, folder=tmp_path, ckpt_path=str(tmp_path / "last.ckpt"), max_steps=9)
    assert callback.dirpath == str(tmp_path)
    assert AsyncCheckpoint.latest(tmp_path) == str(tmp_path / "step=9.ckpt")


def test_a_second_fit_of_a_trainer_goes_on_in_its_version(tmp_path: Path) -> None:
    fit(ours(tmp_path), folder=tmp_path, max_epochs=1)
    callback = ours(tmp_path)
    with pytest.warns(UserWarning, match="this run saves in version_1"):
        made = fit(callback, folder=tmp_path, max_epochs=1)
    made.fit_loop.max_epochs = 2
    made.fit(Stranger())
    assert callback.dirpath == str(tmp_path / "version_1")
    assert "step=12" in names(tmp_path / "version_1")


def test_the_newest_run_is_found_where_only_one_callback_has_saved(tmp_path: Path) -> None:
    """The first run saved in both folders and more often; the second has come to one save."""

    def two() -> list[AsyncCheckpoint]:
        return [
            ours(tmp_path / "often", every_n_train_steps=1),
            ours(tmp_path / "rare", every_n_train_steps=6, save_last=False),
        ]

    fit(*two(), folder=tmp_path)
    with pytest.warns(UserWarning, match="another run"):
        fit(*two(), folder=tmp_path, max_steps=2)
    made = trainer(*two(), folder=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AsyncCheckpoint: dirpath was")
        made.validate(Stranger(), ckpt_path="last", verbose=False)
    assert made.ckpt_path == str(tmp_path / "often" / "version_1" / "step=2.ckpt")


def test_overwrite_replaces_what_is_there_once_something_new_is_saved(tmp_path: Path) -> None:
    class Stopping(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 2:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    fit(ours(tmp_path), folder=tmp_path)
    with pytest.raises(ArithmeticError):
        trainer(ours(tmp_path, overwrite=True), folder=tmp_path).fit(Stopping())
    assert names(tmp_path) == {"step=12"}, "nothing is lost before there is something new"
    callback = ours(tmp_path, overwrite=True)
    fit(callback, folder=tmp_path, max_epochs=1)
    assert names(tmp_path) == {"step=6"}
    assert AsyncCheckpoint.latest(tmp_path) == callback.last_model_path
    resumed = ours(tmp_path, overwrite=True)
    assert fit(resumed, folder=tmp_path, ckpt_path="last").global_step == 12
    assert not (tmp_path / "version_1").exists()


def test_two_ranks_save_in_one_version_and_resume_from_it(tmp_path: Path) -> None:
    save(tmp_path / "c", "other", 5)

    def train(rank: int, ckpt_path: str | None) -> tuple[str | None, str, int]:
        callback = ours(tmp_path / "c")
        options: dict[str, Any] = {"strategy": "ddp", "devices": 2}
        options |= {"plugins": [ForkedRanks(rank, 2)], "max_steps": 6 if ckpt_path else 3}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the other run, on one of the ranks
            made = fit(callback, folder=tmp_path, ckpt_path=ckpt_path, **options)
        return callback.dirpath, callback.best_model_path, made.global_step

    version = tmp_path / "c" / "version_1"
    for ckpt_path, step in ((None, 3), ("last", 6)):
        ended = (str(version), str(version / f"step={step}.ckpt"), step)
        assert run_ranks(lambda rank, path=ckpt_path: train(rank, path)) == [ended] * 2


def test_a_place_is_where_the_run_is_else_the_first_behind_all_others(tmp_path: Path) -> None:
    given = str(tmp_path)
    assert place_of(given, "a") == Place(given)
    save(given, "a", 5)
    save(given, "a", 6)
    assert place_of(given, "a") == Place(given, (), 2)
    second = f"{given}/version_1"
    Path(second).mkdir()  # of a run that saved nothing
    with pytest.warns(UserWarning, match="version_1"):
        assert place_of(given, "b") == Place(second, (), 2)
    save(second, "b", 1, 2)
    with pytest.warns(UserWarning, match="version_2"):
        assert place_of(given, "c") == Place(f"{given}/version_2", (), 3)
    assert place_of(given, "b") == Place(second, (), 3)
    assert place_of(given, "c", overwrite=True) == Place(given, ("step=6", "step=5"), 3)
    save(f"{given}/version_4", "a", 7, 3)  # a copy, or a run that went on in another folder
    assert place_of(given, "a").dirpath == f"{given}/version_4"
    assert place_of(given, "a", ckpt_path=f"{given}/step=5.ckpt").dirpath == given


# last.ckpt


def test_save_last_is_a_file_that_every_tool_opens(tmp_path: Path) -> None:
    callback = ours(tmp_path, monitor="val_loss", save_last="link")
    fit(callback, folder=tmp_path, max_epochs=1)
    last = tmp_path / "last.ckpt"
    assert last.resolve() == Path(callback.last_model_path).resolve()
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert load_checkpoint(last)["global_step"] == 6
    Stranger.load_from_checkpoint(last, weights_only=True)
    resumed = ours(tmp_path, monitor="val_loss", save_last="link")
    made = fit(resumed, folder=tmp_path, ckpt_path=str(last))
    assert (made.global_step, resumed.dirpath) == (12, str(tmp_path))
    assert last.resolve().name == "step=12.ckpt"
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"last.ckpt"} | {
        f"{name}.ckpt" for name in names(tmp_path)
    }


def test_a_checkpoint_is_never_written_through_the_link(tmp_path: Path) -> None:
    callback = ours(tmp_path, filename="last", save_top_k=-1)
    fit(callback, folder=tmp_path, max_epochs=1)
    assert names(tmp_path) == {"last-v1", "last-v2"}
    assert (tmp_path / "last.ckpt").is_symlink()


def test_a_url_is_told_at_construction_what_to_use(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        AsyncCheckpoint("memory://told", save_last=True)
        AsyncCheckpoint("told", save_last=True)
    told = [record.message for record in caplog.records if "last.ckpt" in record.message]
    assert len(told) == 1
    assert "AsyncCheckpoint(save_last=True): memory://told has no links" in told[0]
    assert "fit(ckpt_path='last')" in told[0]


# The best


def test_best_is_found_by_another_process(tmp_path: Path) -> None:
    options: dict[str, Any] = {"monitor": "val_loss", "save_top_k": 2, "save_last": False}
    callback = ours(tmp_path, **options)
    fit(callback, folder=tmp_path)

    def another(rank: int) -> str:
        made = trainer(ours(tmp_path, **options), folder=tmp_path)
        made.validate(Stranger(), ckpt_path="best", verbose=False)
        return str(made.ckpt_path)

    assert run_ranks(another, 1, group=False) == [callback.best_model_path]
    anew = ours(tmp_path, **options)
    assert anew.best_model_path == callback.best_model_path
    with pytest.warns(UserWarning, match="another run"):
        made = fit(anew, folder=tmp_path, limit_train_batches=0)
    assert made.global_step == 0
    assert anew.best_model_path == "", "a run that has saved nothing has no best"


def test_the_best_of_the_newest_run_that_is_whole(tmp_path: Path) -> None:
    def about(score: float | None) -> dict[str, Any]:
        return {"monitor": "loss", "score": score}

    def best(monitor: str | None = "loss", mode: str = "min") -> str:
        return Path(BestOfEarlier().path(Folder(tmp_path), monitor, mode)).name

    assert best() == ""
    save(tmp_path, "a", 1, 0, **about(0.0))
    second = tmp_path / "version_1"
    for number, (step, score) in enumerate([(2, 3.0), (3, 1.0), (4, 1.0), (5, None)], 1):
        save(second, "b", step, number, **about(score))
    assert (best(), best(mode="max"), best(None)) == ("step=3.ckpt", "step=2.ckpt", "step=5.ckpt")
    assert best("other") == ""
    (second / "step=3.ckpt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step=3.ckpt is passed over as the best"):
        assert best() == "step=4.ckpt"
    SnapshotEngine(second).withdraw(lambda step, _: step == 4)
    assert best() == "step=2.ckpt"


class RestoresLate(SingleDeviceStrategy):
    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


@pytest.mark.filterwarnings("error:.*holds checkpoints of another run")
def test_a_strategy_that_restores_late_goes_on_in_the_folder(tmp_path: Path) -> None:
    for steps in (2, 4):
        late = RestoresLate(torch.device("cpu"))
        callback = AsyncCheckpoint(
            tmp_path / "here", "{step}", every_n_train_steps=2, save_top_k=-1
        )
        trainer = pl.Trainer(
            max_steps=steps,
            strategy=late,
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(BoringModel(), ckpt_path="last")
    assert not (tmp_path / "here" / "version_1").exists()
    assert {path.stem for path in (tmp_path / "here").glob("*.ckpt")} == {"step=2", "step=4"}
