"""What is best and newest, in ModelCheckpoint's words, beside a callback and inside its files."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import AsyncCheckpoint
from lightning_align.callbacks.checkpoint_standing import standing
from lightning_align.checkpointing import load_checkpoint
from lightning_align.checkpointing.retention import Retention
from tests.callbacks.test_async_checkpoint import Slow, Stranger, fit, names, trainer
from tests.helpers.ranks import run_ranks

WORDS = (
    "best_model_path",
    "best_model_score",
    "current_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
)


def plain(value: Any) -> Any:
    """Scores as numbers, paths without their folders."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return Path(value).name if isinstance(value, str) else value if value is None else float(value)


@pytest.mark.parametrize("seconds", [0.0, 0.1], ids=["", "the one before is still being written"])
def test_a_checkpoint_says_of_itself_what_model_checkpoints_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    Slow(monkeypatch).seconds = seconds
    options = {"monitor": "loss", "every_n_train_steps": 1, "filename": "{step}"}
    for number, (k, mode) in enumerate(((-1, "min"), (2, "max"))):
        folder = tmp_path / str(number)
        theirs, ours = (
            kind(folder / kind.__name__, save_top_k=k, mode=mode, **options)
            for kind in (ModelCheckpoint, AsyncCheckpoint)
        )
        fit(theirs, ours, folder=folder)
        assert names(ours.dirpath)
        for name in names(ours.dirpath):
            expected = torch.load(folder / "ModelCheckpoint" / f"{name}.ckpt", weights_only=True)
            found = load_checkpoint(folder / "AsyncCheckpoint" / f"{name}.ckpt")
            of_theirs, of_ours = (
                state["callbacks"][callback.state_key]
                for state, callback in ((expected, theirs), (found, ours))
            )
            for word in WORDS:
                assert plain(of_ours[word]) == plain(of_theirs[word]), (name, word)
            assert Path(of_ours["last_model_path"]).stem == name


def test_best_and_last_are_found_in_this_process_and_in_another(tmp_path: Path) -> None:
    options: dict[str, Any] = {"monitor": "val_loss", "save_last": True, "filename": "{step}"}
    callback = AsyncCheckpoint(tmp_path, **options)
    made = fit(callback, folder=tmp_path, max_epochs=3)
    best, last = callback.best_model_path, callback.last_model_path
    for ckpt_path, path in (("best", best), ("last", last)):
        made.validate(ckpt_path=ckpt_path, verbose=False)
        assert made.ckpt_path == path

    def another(rank: int) -> str:
        for ckpt_path, path in (("best", best), ("last", last)):
            again = trainer(AsyncCheckpoint(tmp_path, **options), folder=tmp_path)
            again.validate(Stranger(), ckpt_path=ckpt_path, verbose=False)
            assert again.ckpt_path == path
        resumed = AsyncCheckpoint(tmp_path, **options)
        fit(resumed, folder=tmp_path, ckpt_path="last", max_epochs=3)
        return resumed.best_model_path

    assert run_ranks(another, 1, group=False) == [best], "as the checkpoint that is resumed says"
    made.fit_loop.max_epochs = 4
    made.fit(made.lightning_module, ckpt_path="best")
    assert made.global_step == 24


def test_a_callback_can_be_copied_and_pickled_also_in_mid_run(tmp_path: Path) -> None:
    copies: list[AsyncCheckpoint] = []

    class Copying(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
            ours = trainer.checkpoint_callback
            copies.extend((copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))))

    options: dict[str, Any] = {"monitor": "loss", "save_top_k": 2, "every_n_train_steps": 1}
    callback = AsyncCheckpoint(tmp_path / "a", save_on_exception=True, **options)
    fit(Copying(), callback, folder=tmp_path)
    after = copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))
    for each in after:
        assert each.best_model_path == callback.best_model_path
        assert each.state_dict() == callback.state_dict()
    for number, each in enumerate((*copies, *after)):
        each.dirpath = str(tmp_path / str(number))
        fit(each, folder=tmp_path, max_epochs=1)
        assert len(names(each.dirpath)) == 2


def test_expected_is_what_will_be_committed() -> None:
    retention = Retention(2, "min", keep_newest=True)
    for name, score in (("a", 3.0), ("b", 1.0)):
        retention.begin(name, score)
        retention.commit(name)
    retention.begin("c", 2.0)
    retention.begin("d", None)
    expected = standing(retention.expected(), "{}.ckpt".format, monitored=True)
    assert standing(retention, "{}.ckpt".format, monitored=True)["last_model_path"] == "b.ckpt"
    for name in ("c", "d"):
        retention.commit(name)
    assert standing(retention, "{}.ckpt".format, monitored=True) == expected
    assert expected == {
        "best_model_path": "b.ckpt",
        "last_model_path": "d.ckpt",
        "best_model_score": 1.0,
        "best_k_models": {"b.ckpt": 1.0, "c.ckpt": 2.0},
        "current_score": 2.0,
        "kth_best_model_path": "c.ckpt",
        "kth_value": 2.0,
    }


def test_nothing_is_best_where_nothing_is_ranked() -> None:
    retention = Retention(0, "max", keep_newest=True)
    retention.begin("a", None)
    retention.commit("a")
    assert standing(retention, str, monitored=False) == {
        "best_model_path": "",
        "last_model_path": "a",
    }
    assert standing(retention, str, monitored=True)["kth_value"] == -torch.inf
