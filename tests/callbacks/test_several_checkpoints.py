"""More than one checkpoint callback in a Trainer: one run, and a folder for each."""

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import AsyncCheckpoint
from tests.callbacks.test_async_checkpoint import fit, names, trainer
from tests.helpers.foreign import Stranger
from tests.helpers.ranks import ForkedRanks, run_ranks


def three(folder: Path) -> list[ModelCheckpoint]:
    """By steps, by epochs and by a validated value; and Lightning's own."""
    return [
        AsyncCheckpoint(folder / "steps", every_n_train_steps=2, save_top_k=-1, filename="{step}"),
        AsyncCheckpoint(folder / "epochs", filename="{step}"),
        AsyncCheckpoint(
            folder / "best", monitor="val_loss", every_n_train_steps=3, filename="{step}"
        ),
        ModelCheckpoint(folder / "theirs", every_n_train_steps=4, filename="{step}"),
    ]


def weights(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return trainer.lightning_module.state_dict()


class RaiseOnce(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 4 and not hasattr(self, "raised"):
            self.raised = True
            raise ArithmeticError


@pytest.mark.parametrize(
    "source", ["steps/step=4", "epochs/step=6", "best/step=*", "theirs/step=4", "last"]
)
def test_a_run_is_resumed_from_any_of_its_folders(tmp_path: Path, source: str) -> None:
    whole = weights(fit(*three(tmp_path / "whole"), folder=tmp_path))
    fit(*three(tmp_path / "half"), folder=tmp_path, max_epochs=1)
    path = source if source == "last" else str(next((tmp_path / "half").glob(f"{source}.ckpt")))
    callbacks = three(tmp_path / "half")
    made = fit(*callbacks, folder=tmp_path, ckpt_path=path)
    assert all(torch.equal(ours, whole[name]) for name, ours in weights(made).items())
    assert "step=12" in names(tmp_path / "half" / "epochs")
    assert len({callback.run_id for callback in callbacks[:3]}) == 1


def test_last_is_the_newest_of_all_folders_whatever_the_time_of_their_files(tmp_path: Path) -> None:
    """To step 12, back to 2, on to 3: there only one folder has come to a commit."""
    steps, epochs = (
        AsyncCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1),
        AsyncCheckpoint(tmp_path / "epochs", "{step}"),
    )
    fit(steps, epochs, folder=tmp_path)
    back = str(tmp_path / "steps" / "step=2.ckpt")
    with pytest.raises(ArithmeticError):
        fit(RaiseOnce(), steps, epochs, folder=tmp_path, ckpt_path=back)
    for number, folder in enumerate(("steps", "epochs")):  # as a copy would date them
        for file in (tmp_path / folder).iterdir():
            os.utime(file, (1e9 + number, 1e9 + number))
    for callbacks in ((steps, epochs), (epochs, steps)):
        made = trainer(*callbacks, folder=tmp_path)
        made.validate(Stranger(), ckpt_path="last", verbose=False)
        assert made.ckpt_path == str(tmp_path / "steps" / "step=3-v1.ckpt")


def test_two_ranks_save_and_resume_several(tmp_path: Path) -> None:
    def train(rank: int, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
        plugins = [ForkedRanks(rank, 2)]
        options = {"strategy": "ddp", "devices": 2, "plugins": plugins, **options}
        callbacks = three(folder)[:3]
        made = fit(*callbacks, folder=tmp_path, **options)
        assert len({Path(callback.best_model_path).parent for callback in callbacks}) == 3
        return weights(made)

    whole, half = tmp_path / "whole", tmp_path / "half"
    expected = run_ranks(lambda rank: train(rank, whole))
    run_ranks(lambda rank: train(rank, half, max_epochs=1))
    path = str(half / "steps" / "step=2.ckpt")
    for ours, theirs in zip(
        run_ranks(lambda rank: train(rank, half, ckpt_path=path)), expected, strict=True
    ):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("other", [AsyncCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("link", [False, True], ids=["", "by a link"])
def test_one_folder_for_two_callbacks_is_refused_by_name(
    tmp_path: Path, other: type[ModelCheckpoint], link: bool
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    ours = AsyncCheckpoint(tmp_path / "a", every_n_train_steps=2)
    theirs = other(tmp_path / ("b" if link else "a"), monitor="val_loss")
    either = rf"(AsyncCheckpoint|{other.__name__})\{{'monitor'.*\}}"
    message = (
        rf"AsyncCheckpoint\(dirpath='.*a'\): {either} and {either} would both write there, and each"
        " delete what the other keeps. Give one of them another dirpath"
    )
    with pytest.raises(ValueError, match=message):
        fit(ours, theirs, folder=tmp_path)
    assert names(tmp_path / "a") == set()
    again = fit(AsyncCheckpoint(tmp_path / "a"), folder=tmp_path, max_epochs=1)
    assert again.global_step == 6, "the folder was given free"


def test_the_default_folder_for_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would both write there"):
        fit(AsyncCheckpoint(), ModelCheckpoint(monitor="val_loss"), folder=tmp_path)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_second_fit_of_a_trainer_goes_on_with_what_is_kept(tmp_path: Path, resumes: bool) -> None:
    options: dict[str, Any] = {"monitor": "loss", "mode": "max", "every_n_train_steps": 1}
    theirs, ours = (
        kind(tmp_path / kind.__name__, filename="{step}", save_top_k=2, **options)
        for kind in (ModelCheckpoint, AsyncCheckpoint)
    )
    made = fit(theirs, ours, folder=tmp_path, max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit_loop.max_epochs = 2
        made.fit(made.lightning_module, ckpt_path=ours.last_model_path if resumes else None)
        made.fit_loop.max_epochs = 4
        made.fit(made.lightning_module)
    assert made.global_step == 24
    kept = {path.stem for path in (tmp_path / "ModelCheckpoint").glob("*.ckpt")}
    resumed_from = {"step=6"} if resumes else set()  # stays as long as the run lasts
    assert names(tmp_path / "AsyncCheckpoint") == kept | resumed_from
    assert {Path(path).stem for path in ours.best_k_models} == {
        Path(path).stem for path in theirs.best_k_models
    }


def test_a_second_fit_knows_what_was_deleted_in_between(tmp_path: Path) -> None:
    options: dict[str, Any] = {"monitor": "loss", "mode": "max", "every_n_train_steps": 1}
    callback = AsyncCheckpoint(tmp_path, "{step}", save_top_k=2, **options)
    made = fit(callback, folder=tmp_path, max_epochs=1)
    best = callback.best_model_path
    for file in (best, best + ".json"):
        os.unlink(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit_loop.max_epochs = 2
        made.fit(made.lightning_module)
    assert best not in callback.best_k_models
    assert {Path(path).stem for path in callback.best_k_models} == names(tmp_path)
    assert len(callback.best_k_models) == 2


@pytest.mark.parametrize("source", ["step=5", "step=10", "step=13"])
def test_a_fit_after_an_exception_saves_and_resumes_as_any(tmp_path: Path, source: str) -> None:
    """The epoch begins anew, at step 4: its end is step 10, that of the next one step 16."""
    callback = AsyncCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    made = trainer(RaiseOnce(), callback, folder=tmp_path)
    pl.seed_everything(5, verbose=False)
    module = Stranger()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ArithmeticError):
            made.fit(module)
        made.fit(module)
    assert names(tmp_path) == {f"step={step}" for step in range(1, 17) if step != 4}
    path = str(tmp_path / f"{source}.ckpt")
    resumed = fit(AsyncCheckpoint(tmp_path), folder=tmp_path, ckpt_path=path)
    assert resumed.global_step == 16
    assert all(
        torch.equal(ours, module.state_dict()[name]) for name, ours in weights(resumed).items()
    )
