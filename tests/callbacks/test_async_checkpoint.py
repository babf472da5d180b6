import logging
import os
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_align import AsyncCheckpoint, ExactResume
from lightning_align.checkpointing import SnapshotEngine, committed_checkpoints, load_checkpoint
from tests.helpers.covers import cover
from tests.helpers.faulty_files import FaultyFileSystem, faulty
from tests.helpers.foreign import Stranger
from tests.helpers.ranks import ForkedRanks, run_ranks


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def trainer(*callbacks: pl.Callback, folder: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            "default_root_dir": str(folder),
            **options,
        }
    )


def fit(*callbacks: pl.Callback, folder: Any, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """Two epochs of six batches with a validation behind each."""
    pl.seed_everything(5, verbose=False)
    made = trainer(*callbacks, folder=folder, **options)
    with warnings.catch_warnings():
        ours = ("AsyncCheckpoint", "passed over", "W&B", "Not written", "no last checkpoint")
        warnings.filterwarnings("ignore", message=f"(?!.*({'|'.join(ours)}))")
        made.fit(Stranger(), ckpt_path=ckpt_path)
    return made


def names(dirpath: Any) -> set[str]:
    return {found.name for found in committed_checkpoints(dirpath)}


# ModelCheckpoint's words


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"monitor": "val_loss", "save_top_k": 2, "filename": "{epoch}-{val_loss:.3f}"},
        {"monitor": "loss", "mode": "max", "save_top_k": 3, "every_n_train_steps": 1},
        {"every_n_train_steps": 2, "save_top_k": -1},
        {"every_n_epochs": 2, "save_top_k": -1},
        {"train_time_interval": timedelta(0), "save_top_k": -1},
        {"save_top_k": 0},
        {"monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": False},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_keeps_what_model_checkpoint_keeps(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs, ours = (
        ModelCheckpoint(tmp_path / "theirs", **options),
        AsyncCheckpoint(tmp_path / "ours", **options),
    )
    fit(theirs, ours, folder=tmp_path)
    kept = {path.stem for path in (tmp_path / "theirs").glob("*.ckpt")}
    assert names(tmp_path / "ours") == kept
    assert Path(ours.best_model_path).name == Path(theirs.best_model_path).name
    assert ours.best_model_score == theirs.best_model_score
    assert {Path(path).name: score for path, score in ours.best_k_models.items()} == {
        Path(path).name: score for path, score in theirs.best_k_models.items()
    }


def test_file_is_what_model_checkpoint_writes(tmp_path: Path) -> None:
    options = {"every_n_train_steps": 5, "save_top_k": 1}
    theirs, ours = (
        ModelCheckpoint(tmp_path / "theirs", **options),
        AsyncCheckpoint(tmp_path / "ours", **options),
    )
    fit(theirs, ours, folder=tmp_path)
    expected = torch.load(theirs.best_model_path, weights_only=True)
    found = torch.load(ours.best_model_path, weights_only=True)
    assert found.keys() == expected.keys()
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert str(found[key]) == str(expected[key])
    module = Stranger.load_from_checkpoint(ours.best_model_path, weights_only=True)
    assert all(torch.equal(v, found["state_dict"][k]) for k, v in module.state_dict().items())


def test_save_last_keeps_the_newest_besides_the_best(tmp_path: Path) -> None:
    class Rising(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.log("rising", torch.tensor(float(trainer.global_step)))

    callback = AsyncCheckpoint(
        tmp_path, monitor="rising", save_last=True, every_n_train_steps=2, filename="{step}"
    )
    fit(Rising(), callback, folder=tmp_path)
    assert names(tmp_path) == {"step=2", "step=12"}
    assert Path(callback.best_model_path).stem == "step=2"
    assert Path(callback.last_model_path).stem == "step=12"


def test_names_never_leave_the_folder_and_are_never_taken_twice(tmp_path: Path) -> None:
    class Slashed(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.log("a/b", torch.tensor(0.5))

    callback = AsyncCheckpoint(tmp_path, filename="{a/b:.1f}", every_n_train_steps=5, save_top_k=-1)
    fit(Slashed(), callback, folder=tmp_path)
    assert names(tmp_path) == {"a_b=0.5", "a_b=0.5-v1"}


# Only what is committed has a name


class Slow:
    """Commits that take their time, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.failing = 0.0, lambda name: False
        commit = SnapshotEngine._commit

        def slowly(engine: SnapshotEngine, snapshot: Any) -> Any:
            time.sleep(self.seconds)
            if self.failing(snapshot.name):
                raise OSError(28, "No space left on device")
            return commit(engine, snapshot)

        monkeypatch.setattr(SnapshotEngine, "_commit", slowly)


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


class Watch(pl.Callback):
    """Asserts after every batch that whatever the callback names is committed."""

    def __init__(self, callback: AsyncCheckpoint) -> None:
        self.callback, self.seen = callback, set()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:  # commits are slow, and the other steps may be quicker than all of them
            wait_for(lambda: committed_checkpoints(self.callback.dirpath))
        for path in self.named():
            assert os.path.exists(path + ".json"), path
            self.seen.add(path)

    def named(self) -> set[str]:
        ours = self.callback
        paths = {ours.best_model_path, ours.last_model_path, *ours.best_k_models}
        return paths - {""}


@pytest.mark.parametrize("backpressure", ["wait", "skip", "latest"])
def test_paths_name_committed_files_only_also_inside_checkpoints(
    tmp_path: Path, slow: Slow, backpressure: Any
) -> None:
    slow.seconds = 0.05
    callback = AsyncCheckpoint(
        tmp_path,
        monitor="loss",
        save_top_k=-1,
        every_n_train_steps=1,
        backpressure=backpressure,
    )
    watch = Watch(callback)
    fit(callback, watch, folder=tmp_path)
    assert len(watch.seen) > (5 if backpressure == "wait" else 0)
    for manifest in committed_checkpoints(tmp_path):
        path = tmp_path / f"{manifest.name}.ckpt"
        state = load_checkpoint(path)["callbacks"][callback.state_key]
        earlier = {
            str(tmp_path / f"{found.name}.ckpt")
            for found in committed_checkpoints(tmp_path)
            if found.step <= manifest.step
        }
        named = {state["best_model_path"], state["last_model_path"], *state["best_k_models"]}
        assert named - {""} <= earlier


class Noting(Logger):
    """A logger that notes what it is told, and checks that named files are committed."""

    name, version = "noting", 0

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.told: list[str] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append(dict(metrics))

    def log_hyperparams(self, *args: Any) -> None:
        pass

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path = checkpoint_callback.last_model_path
        assert os.path.exists(path + ".json")
        self.told.append(path)

    def values(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.metrics if name in metrics]


def test_backpressure_skip_leaves_out_saves_and_says_so(tmp_path: Path, slow: Slow) -> None:
    slow.seconds = 0.3
    logger = Noting()
    options = {"every_n_train_steps": 1, "save_top_k": -1}
    callback = AsyncCheckpoint(tmp_path, backpressure="skip", **options)
    fit(callback, folder=tmp_path, logger=logger)
    skipped = sum(logger.values("checkpoint/skipped"))
    assert skipped > 0
    assert len(names(tmp_path)) == 12 - skipped


def test_backpressure_latest_writes_the_newest_of_those_that_wait(
    tmp_path: Path, slow: Slow
) -> None:
    slow.seconds = 0.3
    logger = Noting()
    options = {"every_n_train_steps": 1, "save_top_k": -1}
    callback = AsyncCheckpoint(tmp_path, backpressure="latest", **options)
    fit(callback, folder=tmp_path, logger=logger)
    assert "epoch=1-step=12" in names(tmp_path)
    assert 2 <= len(names(tmp_path)) < 12
    assert max(logger.values("checkpoint/stall_s")) < 0.3, "nobody waited for the writer"
    assert Path(callback.last_model_path).stem == "epoch=1-step=12"


# Faults


def test_remote_storage_that_fails_and_recovers_loses_no_checkpoint_but_its_own(
    tmp_path: Path,
) -> None:
    def before(operation: str, name: str) -> None:
        if operation == "write" and "step=8" in name:
            raise TimeoutError("the bucket did not answer")

    with faulty(before):
        callback = AsyncCheckpoint("faulty://bucket/run", every_n_train_steps=4, save_top_k=-1)
        with pytest.warns(UserWarning, match=r"step=8.*the bucket did not answer"):
            made = fit(callback, folder=tmp_path)
        assert made.global_step == 12
        assert names("faulty://bucket/run") == {"epoch=0-step=4", "epoch=1-step=12"}
        assert AsyncCheckpoint.latest("faulty://bucket/run") == callback.last_model_path
        FaultyFileSystem.store["/bucket/run/epoch=1-step=12.ckpt"].write(b"damaged")
        with pytest.warns(UserWarning, match="passed over"):
            latest = AsyncCheckpoint.latest("faulty://bucket/run")
        assert latest.endswith("epoch=0-step=4.ckpt")


class Raise(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise ArithmeticError("what training raised")


def test_exception_flushes_what_was_saved_and_is_never_masked(tmp_path: Path, slow: Slow) -> None:
    slow.seconds = 0.3
    callback = AsyncCheckpoint(tmp_path, every_n_train_steps=5)
    with pytest.raises(ArithmeticError, match="what training raised"):
        fit(callback, Raise(5), folder=tmp_path)
    assert names(tmp_path) == {"epoch=0-step=5"}
    assert Path(callback.best_model_path).stem == "epoch=0-step=5"


def test_failing_storage_does_not_mask_the_exception(tmp_path: Path, slow: Slow) -> None:
    slow.failing = lambda name: True
    with (
        pytest.warns(UserWarning, match="Last complete checkpoint: none"),
        pytest.raises(ArithmeticError, match="what training raised"),
    ):
        fit(AsyncCheckpoint(tmp_path, every_n_train_steps=5), Raise(5), folder=tmp_path)


def test_storage_that_hangs_does_not_hold_an_exception_beyond_the_deadline(
    tmp_path: Path, slow: Slow
) -> None:
    slow.seconds = 3.0
    callback = AsyncCheckpoint(tmp_path, every_n_train_steps=5, flush_timeout_s=0.1)
    start = time.monotonic()
    with (
        pytest.warns(UserWarning, match=r"Not written within 0.1 s: epoch=0-step=5"),
        pytest.raises(ArithmeticError),
    ):
        fit(callback, Raise(5), folder=tmp_path)
    assert time.monotonic() - start < 2.5


def test_save_on_exception_saves_between_batches_and_never_inside_one(tmp_path: Path) -> None:
    class RaiseAtEnd(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise ArithmeticError

    between = AsyncCheckpoint(tmp_path / "between", save_on_exception=True)
    with pytest.raises(ArithmeticError):
        fit(between, RaiseAtEnd(), folder=tmp_path)
    assert names(tmp_path / "between") == {"epoch=0-step=3"}
    inside = AsyncCheckpoint(tmp_path / "inside", save_on_exception=True)
    with (
        pytest.warns(UserWarning, match="in the middle of a batch"),
        pytest.raises(ArithmeticError),
    ):
        fit(inside, Raise(3), folder=tmp_path)
    assert names(tmp_path / "inside") == set()


class Signal(pl.Callback):
    """Sends this process a signal in the middle of a batch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_signals_save_the_batch_they_came_in(tmp_path: Path, number: int) -> None:
    callback = AsyncCheckpoint(tmp_path, save_on_exception=True)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SIGTERMException, SystemExit)):
            fit(callback, Signal(number), folder=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert names(tmp_path) == {"epoch=0-step=4"}
    fit(AsyncCheckpoint(tmp_path), folder=tmp_path, ckpt_path="last")


@cover(number={"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}, signalled=[0, 1])
def test_a_signal_to_one_rank_saves_the_batch_that_all_are_in(
    tmp_path: Path, number: int, signalled: int
) -> None:
    def options(rank: int) -> dict[str, Any]:
        return {"strategy": "ddp", "devices": 2, "plugins": [ForkedRanks(rank, 2)]}

    def interrupted(rank: int) -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        watch = [Signal(number)] if rank == signalled else []
        callback = AsyncCheckpoint(tmp_path, save_on_exception=True)
        try:
            fit(callback, *watch, folder=tmp_path, **options(rank))
        except SIGTERMException:
            return signal.SIGTERM
        except SystemExit:  # Lightning's answer to Ctrl-C
            return signal.SIGINT
        return 0

    def resumed(rank: int) -> dict[str, torch.Tensor]:
        made = fit(AsyncCheckpoint(tmp_path), folder=tmp_path, ckpt_path="last", **options(rank))
        return made.lightning_module.state_dict()

    def uninterrupted(rank: int) -> dict[str, torch.Tensor]:
        callback = AsyncCheckpoint(tmp_path / "whole")
        return fit(callback, folder=tmp_path, **options(rank)).lightning_module.state_dict()

    assert run_ranks(interrupted) == [number, number]
    assert names(tmp_path) == {"epoch=1-step=4"}
    for ours, whole in zip(run_ranks(resumed), run_ranks(uninterrupted), strict=True):
        assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("ckpt_path", ["last", None])
def test_a_run_beside_one_that_is_alive_is_refused(tmp_path: Path, ckpt_path: str | None) -> None:
    """A new one, too, though it would write a version: it may be a rank that thinks it is alone."""
    fit(AsyncCheckpoint(tmp_path), folder=tmp_path, max_epochs=1)
    engine = SnapshotEngine(tmp_path)
    with pytest.raises(RuntimeError, match="is writing checkpoints there"):
        fit(AsyncCheckpoint(tmp_path), folder=tmp_path, ckpt_path=ckpt_path)
    engine.close()
    assert not (tmp_path / "version_1").exists()


# Resuming


def test_last_is_the_newest_whole_one(tmp_path: Path) -> None:
    callback = AsyncCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(callback, folder=tmp_path)
    newest = tmp_path / "step=12.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step=12.ckpt \(step 12\) is passed over"):
        assert AsyncCheckpoint.latest(tmp_path) == str(tmp_path / "step=9.ckpt")
    again = AsyncCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    with pytest.warns(UserWarning, match="passed over"):
        made = fit(again, folder=tmp_path, ckpt_path="last", max_epochs=3)
    assert made.ckpt_path == str(tmp_path / "step=9.ckpt")
    assert made.global_step == 18
    assert "step=12-v1" in names(tmp_path), "no name is written twice"


def test_last_is_of_the_way_that_was_taken_last(tmp_path: Path) -> None:
    """To step 12, back to 4, on to 8: what was left behind goes as its steps come again."""
    options: dict[str, Any] = {"every_n_train_steps": 2, "filename": "{step}"}

    def saving(**others: Any) -> AsyncCheckpoint:
        return AsyncCheckpoint(
            tmp_path, monitor="loss", save_top_k=9, save_last=True, **options, **others
        )

    fit(saving(), folder=tmp_path)
    middle, resumed = str(tmp_path / "step=4.ckpt"), saving()
    told = r"goes back to step 4; the newest .* is of step 12. Until .*'last' still means 'step=12'"
    resumed.save_last = False  # or the end is saved, since nothing else was
    with pytest.warns(UserWarning, match=told):
        fit(resumed, folder=tmp_path, ckpt_path=middle, max_epochs=-1, max_steps=5)
    resumed.save_last = True
    assert AsyncCheckpoint.latest(tmp_path) == str(tmp_path / "step=12.ckpt")
    fit(resumed, folder=tmp_path, ckpt_path=middle, max_epochs=-1, max_steps=8)

    assert AsyncCheckpoint.latest(tmp_path) == str(tmp_path / "step=8-v1.ckpt")
    assert names(tmp_path) == {
        *("step=2", "step=4", "step=6-v1", "step=8-v1", "step=10", "step=12")
    }
    assert resumed.last_model_path == str(tmp_path / "step=8-v1.ckpt")
    assert {Path(path).stem for path in resumed.best_k_models} == {
        *("step=2", "step=4", "step=6-v1", "step=8-v1")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes back")
        made = fit(saving(), folder=tmp_path, ckpt_path="last", max_epochs=2)
    assert made.ckpt_path == str(tmp_path / "step=8-v1.ckpt")
    assert names(tmp_path) == {
        *("step=2", "step=4", "step=6-v1", "step=8-v1", "step=10-v1", "step=12-v1")
    }


def test_a_step_that_is_saved_twice_keeps_the_old_file_until_the_new_one_is_committed(
    tmp_path: Path, slow: Slow
) -> None:
    """The only checkpoint is one that was left behind, and the write of its step fails."""
    options: dict[str, Any] = {"every_n_train_steps": 6, "filename": "{step}"}
    elsewhere = tmp_path / "step=3.ckpt"
    early = AsyncCheckpoint(tmp_path / "a", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(early, folder=tmp_path, max_epochs=1)
    (tmp_path / "a" / "step=3.ckpt").rename(elsewhere)
    (tmp_path / "a" / "step=3.ckpt.json").unlink()

    slow.failing = lambda name: name == "step=6-v1"
    with pytest.warns(UserWarning, match="'step=6-v1'.*was not written"):
        fit(AsyncCheckpoint(tmp_path / "a", **options), folder=tmp_path, ckpt_path=elsewhere)
    assert names(tmp_path / "a") == {"step=12"}, "a later one was committed after that"

    again = AsyncCheckpoint(tmp_path / "a", **options)
    slow.failing = lambda name: True
    with pytest.warns(UserWarning, match="goes back to step 3; .*is of step 12"):
        fit(again, folder=tmp_path, ckpt_path=elsewhere)
    assert names(tmp_path / "a") == {"step=12"}
    slow.failing = lambda name: False
    fit(again, folder=tmp_path, ckpt_path=elsewhere)
    assert names(tmp_path / "a") == {"step=12-v1"}


def test_nothing_to_resume_from_starts_anew(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        made = fit(AsyncCheckpoint(tmp_path), folder=tmp_path, ckpt_path="last", max_epochs=1)
    assert made.global_step == 6


def test_url(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/checkpoints"
    callback = AsyncCheckpoint(url, every_n_train_steps=3, save_top_k=1, filename="{step}")
    fit(callback, folder=tmp_path, max_epochs=1)
    assert callback.best_model_path == AsyncCheckpoint.latest(url)
    assert names(url) == {"step=6"}
    made = fit(
        AsyncCheckpoint(url, every_n_train_steps=3, save_top_k=1, filename="{step}"),
        folder=tmp_path,
        ckpt_path="last",
    )
    assert made.global_step == 12
    assert names(url) == {"step=6", "step=12"}, "the one resumed from stays, as ModelCheckpoint's"
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_best_is_tested_without_naming_it(tmp_path: Path) -> None:
    class Testable(Stranger):
        test_step = Stranger.validation_step
        test_dataloader = Stranger.val_dataloader

    callback = AsyncCheckpoint(tmp_path, monitor="val_loss")
    made = trainer(callback, folder=tmp_path)
    made.fit(Testable())
    made.test(ckpt_path="best", verbose=False)
    assert made.ckpt_path == callback.best_model_path


def test_ranking_survives_a_resume(tmp_path: Path) -> None:
    options: dict[str, Any] = {"monitor": "loss", "save_top_k": 2, "every_n_train_steps": 1}
    whole, half, rest = (
        AsyncCheckpoint(tmp_path / folder, **options) for folder in ("whole", "half", "half")
    )
    fit(whole, folder=tmp_path, max_epochs=3)
    fit(half, folder=tmp_path, max_epochs=1)
    fit(rest, folder=tmp_path, max_epochs=3, ckpt_path="last")
    scores = sorted(map(float, whole.best_k_models.values()))
    assert sorted(map(float, rest.best_k_models.values())) == scores


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    fit(AsyncCheckpoint(tmp_path), folder=tmp_path)
    other = Stranger()
    other.body = torch.nn.Linear(8, 1)
    kept = names(tmp_path)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"body.weight\""):
        trainer(AsyncCheckpoint(tmp_path), folder=tmp_path).fit(other, ckpt_path="last")
    assert names(tmp_path) == kept


# ExactResume


def test_brings_exact_resume_unless_there_is_one(tmp_path: Path) -> None:
    alone = fit(AsyncCheckpoint(tmp_path / "a"), folder=tmp_path, max_epochs=1)
    given = ExactResume(seed=3)
    beside = fit(given, AsyncCheckpoint(tmp_path / "b"), folder=tmp_path, max_epochs=1)
    found = [[c for c in made.callbacks if isinstance(c, ExactResume)] for made in (alone, beside)]
    assert len(found[0]) == 1
    assert found[1] == [given]


# Processes that are spawned


@pytest.mark.slow
def test_ddp_spawn_saves_and_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "ddp_spawn", "devices": 2}
    callback = AsyncCheckpoint(tmp_path, monitor="loss", every_n_train_steps=2, save_last=True)
    fit(callback, folder=tmp_path, **options)
    steps = {found.step for found in committed_checkpoints(tmp_path)}
    assert max(steps) == 6, "two epochs of three batches a rank"
    assert os.path.exists(callback.best_model_path)
    fit(callback, folder=tmp_path, ckpt_path="last", max_epochs=3, **options)
    assert max(found.step for found in committed_checkpoints(tmp_path)) == 8


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"every_n_train_steps": 2, "train_time_interval": timedelta(minutes=1)},
            r"every_n_train_steps=2\): cannot be combined with train_time_interval. Add a second",
        ),
        ({"every_n_train_steps": -1}, r"every_n_train_steps=-1\): must not be negative"),
        ({"mode": "best"}, r"mode='best'\): must be 'min' or 'max'"),
        ({"save_top_k": -2}, r"save_top_k=-2\): must be at least -1"),
        ({"save_top_k": 3}, r"save_top_k=3\): without monitor there is no best"),
        ({"backpressure": "drop"}, r"backpressure='drop'\): must be 'wait', 'skip' or 'latest'"),
        ({"flush_timeout_s": 0}, r"flush_timeout_s=0\): must be above 0"),
        ({"save_last": "copy"}, r"save_last='copy'\): must be"),
        (
            {"enable_version_counter": False},
            r"enable_version_counter=False\): must be True: a file that is overwritten is lost",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="AsyncCheckpoint\\(" + message):
        AsyncCheckpoint("checkpoints", **options)


def test_another_checkpoint_io_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    started: list[str] = []

    class Started(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            started.append("training")

    with pytest.raises(ValueError, match=r"plugins='Own'\): would be passed over: .* Take it out"):
        fit(Started(), AsyncCheckpoint(tmp_path), folder=tmp_path, plugins=[Own()])
    assert started == []


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ValueError, match=r"must be a folder, and .*file is a file\."):
        fit(AsyncCheckpoint(blocker / "inner"), folder=tmp_path)
