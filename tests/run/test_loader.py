"""A run of a stranger, module and loader, resumes to the last bit once it has ExactResume."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_align.run import capture
from lightning_align.run.loader import PositionedLoader
from tests.helpers.foreign import ForeignRun, consumed_in

OTHERS = ["generator", "stream", "stateful", "two", "mixed"]
LOADERS = ["shuffled", "stateful-stream", *OTHERS]
WITH_WORKERS = ["workers", "persistent", "stream-workers"]
EVERY_STEP = {"every_n_train_steps": 1, "filename": "{epoch}-{step}"}


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def resumes_from(run: ForeignRun, positions: set[int]) -> None:
    """The law: from every checkpoint at one of ``positions``, the rest is the same bits."""
    seen = set()
    for path in checkpoints(Path(run.folder)):
        position = consumed_in(path)
        if position in positions:
            seen.add(position)
            resumed = run.resumed(path).fit()
            assert resumed.record(after=position) == run.record(after=position), path.name
    assert seen == positions


@pytest.mark.parametrize(
    "name",
    [
        "shuffled",
        "stateful-stream",
        *(pytest.param(name, marks=pytest.mark.slow) for name in [*OTHERS, *WITH_WORKERS]),
    ],
)
def test_resume_in_mid_epoch_and_behind_it(tmp_path: Path, name: str) -> None:
    run = ForeignRun(str(tmp_path), loader=name, checkpoint=EVERY_STEP).fit()
    batches = len([line for line in run.record() if " loss " in line]) // 3  # of an epoch
    resumes_from(run, {2, batches + 3})


EPOCH_ENDS = {"filename": "{epoch}-{step}"}
BY_STEPS = {"max_steps": 16, "max_epochs": -1}
SETTINGS = {
    "epoch-ends": (EPOCH_ENDS, {}),
    "accumulate": (EVERY_STEP, {"accumulate_grad_batches": 2}),
    "no-validation": (EPOCH_ENDS, {"limit_val_batches": 0}),
    "max-steps": (EPOCH_ENDS, {**BY_STEPS, "limit_val_batches": 0}),
    "max-steps-validation": (EPOCH_ENDS, BY_STEPS),
    "short-epochs": (EVERY_STEP, {"limit_train_batches": 3}),
    "reloaded-every-epoch": (EVERY_STEP, {"reload_dataloaders_every_n_epochs": 1}),
}
EVERY_SETTING = ("shuffled", "stateful-stream", "persistent")  # the others: two of them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name in [*LOADERS, *WITH_WORKERS]
        for setting in (SETTINGS if name in EVERY_SETTING else list(SETTINGS)[:2])
    ],
)
def test_resume_from_every_checkpoint(tmp_path: Path, name: str, setting: str) -> None:
    checkpoint, trainer = SETTINGS[setting]
    run = ForeignRun(str(tmp_path), loader=name, checkpoint=checkpoint, trainer=trainer).fit()
    batches = len([line for line in run.record() if " loss " in line])
    positions = {consumed_in(path) for path in checkpoints(tmp_path)} - {batches}
    assert len(positions) >= 2
    each_other = set(sorted(positions)[:: max(1, len(positions) // 4)])
    resumes_from(run, each_other | {p for p in positions if p % (batches // 3) == 0})


def test_plateau_schedulers_step_once_for_each_checkpointed_epoch_or_step(tmp_path: Path) -> None:
    """Lightning steps them after the hooks that save, and leaves it out on a resume."""
    for interval, positions in (("epoch", {6, 12}), ("step", {4, 9})):
        folder = tmp_path / interval
        folder.mkdir()
        checkpoint = {"filename": "{epoch}-{step}"} if interval == "epoch" else EVERY_STEP
        run = ForeignRun(str(folder), checkpoint=checkpoint, module={"plateau": interval}).fit()
        resumes_from(run, positions)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stateful", "workers"])
def test_loader_started_before_the_restore_is_started_again(tmp_path: Path, name: str) -> None:
    """configure_optimizers may read trainer.estimated_stepping_batches, which starts workers."""
    module = {"reads_stepping_batches": True}
    run = ForeignRun(str(tmp_path), loader=name, checkpoint=EVERY_STEP, module=module).fit()
    resumes_from(run, {8})


@pytest.mark.slow
def test_open_window_and_scaler_of_mixed_precision(tmp_path: Path) -> None:
    """Every batch is saved, also between optimizer steps; gradients wait as they were scaled."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 4.0, growth_interval=2))
    run = ForeignRun(
        str(tmp_path),
        save_every_batch=True,
        trainer={"plugins": [plugin], "accumulate_grad_batches": 3, "max_epochs": 2},
    ).fit()
    resumes_from(run, {2, 4, 8})
    path = max(checkpoints(tmp_path), key=consumed_in)
    assert torch.load(path, weights_only=True)["MixedPrecision"]["scale"] > 4.0


def test_data_that_became_shorter_is_refused(tmp_path: Path) -> None:
    run = ForeignRun(str(tmp_path), checkpoint=EVERY_STEP).fit()
    path = next(path for path in checkpoints(tmp_path) if consumed_in(path) == 5)
    with pytest.raises(
        ValueError, match=r"batch 5 of epoch 0'\): the training loader ends after 1"
    ):
        run.resumed(path, loader="one-batch").fit()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leave_out", "what"),
    [
        ("_begin_pass", "generator"),
        ("_reseed", "shuffled"),
        ("_draw", "stream"),
        ("_load_state_dicts", "stateful"),
    ],
)
def test_the_comparison_notices_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave_out: str, what: str
) -> None:
    run = ForeignRun(str(tmp_path), loader=what, checkpoint=EVERY_STEP).fit()
    path = next(path for path in checkpoints(tmp_path) if consumed_in(path) == 9)
    if leave_out == "_draw":  # nothing is dropped
        monkeypatch.setattr(PositionedLoader, "_are_stateful", True)
    else:
        monkeypatch.setattr(PositionedLoader, leave_out, lambda *args, **kwargs: None)
    resumed = run.resumed(path).fit()
    assert resumed.record(9) != run.record(9)


def test_epoch_means_are_noticed_when_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ForeignRun(str(tmp_path), checkpoint=EVERY_STEP).fit()
    path = next(path for path in checkpoints(tmp_path) if consumed_in(path) == 9)
    monkeypatch.setattr(capture.epoch_means, "restore_means", lambda *args: None)
    ours, expected = run.resumed(path).fit().record(9), run.record(9)
    differing = [line for line in ours if line not in expected]
    assert len(differing) == 1
    assert differing[0].startswith("12 epoch")
