"""What a filename may be: whatever is refused raises where the callback is made."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_align import AsyncCheckpoint
from lightning_align.callbacks.checkpoint_names import file_name, warn_of_unlogged
from lightning_align.checkpointing import committed_checkpoints


@pytest.mark.parametrize(
    ("filename", "rule"),
    [
        ("best.ckpt", "must not hold '.ckpt', which is added. Leave it out"),
        ("a.ckpt.json", "must not hold '.ckpt'"),
        ("", "must not be empty. Leave it out for '{epoch}-{step}'"),
        ("  ", "must not be empty"),
        ("../best", "must be a file name, without folders. The folder is dirpath"),
        ("/tmp/best", "must be a file name, without folders"),
        ("runs\\best", "must be a file name, without folders"),
        ("{step}/best", "must be a file name, without folders"),
        (".hidden", "must not begin with a dot"),
        ("{../loss}", "cannot|must"),
        ("a\nb", "must be printable"),
        ("a\0b", "must be printable"),
        ("a\ud800b", "must be printable"),
        ("a::b", "must be printable, and without '::'"),
        ("x" * 201, "must fit into 200 bytes"),
        ("ü" * 101, "must fit into 200 bytes"),
        ("{epoch", "cannot be filled with numbers"),
        ("epoch}", "cannot be filled with numbers"),
        ("{}", "cannot be filled with numbers"),
        ("{epoch:q}", "cannot be filled with numbers"),
        ("{val_loss:d}", "cannot be filled with numbers .*float.*Write metrics as {val_loss:.2f}"),
        (Path("best"), "must be a text"),
    ],
    ids=repr,
)
def test_impossible_filenames_are_refused_at_construction(filename: str, rule: str) -> None:
    with pytest.raises(ValueError, match=r"AsyncCheckpoint\(filename=(.|\n)*\): (" + rule + ")"):
        AsyncCheckpoint("checkpoints", filename)


def test_a_filename_that_was_set_later_is_refused_before_training(tmp_path: Path) -> None:
    callback = AsyncCheckpoint(tmp_path)
    callback.filename = "best.ckpt"
    with pytest.raises(ValueError, match=r"filename='best.ckpt'\): must not hold '.ckpt'"):
        fit(callback, BoringModel())


@pytest.mark.parametrize(
    ("constant", "rule"),
    [
        ("FILE_EXTENSION", "must be '.ckpt', by which"),
        ("CHECKPOINT_NAME_LAST", "must stay as it is: the newest checkpoint keeps its own name"),
    ],
)
def test_other_constants_are_refused(tmp_path: Path, constant: str, rule: str) -> None:
    rule = rf"AsyncCheckpoint\({constant}='other'\): {rule}"
    with pytest.raises(ValueError, match=rule):
        type("Subclass", (AsyncCheckpoint,), {constant: "other"})(tmp_path)
    callback = AsyncCheckpoint(tmp_path)
    setattr(callback, constant, "other")
    with pytest.raises(ValueError, match=rule):
        fit(callback, BoringModel())


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        (None, "epoch=0-step=2"),
        ("best", "best"),
        ("{epoch:02d}-{step:06d}-{loss:.2f}", "epoch=00-step=000002-loss=0.50"),
        ("{a/b:.1f}", "a_b=0.2"),
        ("v1.0 [a] *", "v1.0 [a] *"),
        ("ü-{step}", "ü-step=2"),
    ],
)
def test_filenames_that_are_taken_become_names(
    tmp_path: Path, filename: str | None, name: str
) -> None:
    class Logs(BoringModel):
        def training_step(self, *args: object) -> torch.Tensor:
            self.log("loss", 0.5)
            self.log("a/b", 0.2)
            return self.layer(torch.ones(32)).sum()

    fit(AsyncCheckpoint(tmp_path, filename), Logs())
    assert [found.name for found in committed_checkpoints(tmp_path)] == [name]


def fit(callback: AsyncCheckpoint, module: pl.LightningModule, **options: object) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, **options}
    pl.Trainer(callbacks=[callback], accelerator="cpu", **quiet, **options).fit(module)


def test_a_metric_of_the_filename_that_nobody_logs_is_told_once(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fit(AsyncCheckpoint(tmp_path, "{step}-{val_los:.2f}", every_n_train_steps=1), BoringModel())
    rule = "filename='{step}-{val_los:.2f}'): val_los was not logged and stands as 0 in the name"
    assert sum(rule in str(each.message) for each in recwarn) == 1
    assert [found.name for found in committed_checkpoints(tmp_path)] == ["step=2-val_los=0.00"]


def test_unlogged_are_those_that_were_not_told_of(recwarn: pytest.WarningsRecorder) -> None:
    metrics = {"epoch": torch.tensor(0), "loss": torch.tensor(0.5)}
    assert warn_of_unlogged("{loss}", {"loss"}, metrics) == set()
    assert not recwarn
    with pytest.warns(UserWarning, match=r"a, b was not logged.*\['epoch', 'loss'\]"):
        assert warn_of_unlogged("{a}{b}", {"a", "b", "loss"}, metrics) == {"a", "b"}


def test_slashes_make_no_folders() -> None:
    assert file_name("val/loss=0.5.ckpt") == "val_loss=0.5"
