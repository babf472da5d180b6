"""Killed and resumed runs must repeat the losses of one that never stopped, to the last bit."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_align.data.sampler import PositionSampler
from lightning_align.run import exact_resume
from lightning_align.run.accumulation import WINDOW_KEY
from lightning_align.run.exact_resume import ExactResume
from tests.helpers.children import fork
from tests.helpers.resume import HandWritten, Run, SequenceData

EVERY_STEP = {"every_n_train_steps": 1, "filename": "{epoch}-{step}"}
EVERY_EPOCH = {"filename": "{epoch}-{step}"}
AT_TRAIN_END = {"filename": "{epoch}-{step}", "save_on_train_epoch_end": True}
AT_VALIDATION = {"filename": "{epoch}-{step}", "save_on_train_epoch_end": False}


def checkpoints(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def position_of(checkpoint: Path) -> int:
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    return int(loops["epoch_loop.batch_progress"]["total"]["processed"])


def resume(run: Run, checkpoint: Path, folder: Path) -> tuple[list[str], str]:
    folder.mkdir(exist_ok=True)
    name = f"resumed-{checkpoint.stem}"
    resumed = replace(
        run,
        folder=str(folder),
        name=name,
        ckpt_path=str(checkpoint),
        checkpoint={},
        save_every_batch=False,
    )
    Path(folder, f"{name}.0").touch()
    return resumed.fit()


@pytest.mark.parametrize(
    ("checkpoint", "trainer"),
    [
        pytest.param(EVERY_STEP, {}, id="every-step"),
        pytest.param(EVERY_STEP, {"accumulate_grad_batches": 3}, id="accumulate"),
        pytest.param(EVERY_STEP, {"limit_val_batches": 0}, id="no-validation"),
        pytest.param(EVERY_STEP, {"limit_train_batches": 7}, id="short-epochs"),
        pytest.param(EVERY_EPOCH, {}, id="every-epoch"),
        pytest.param(AT_TRAIN_END, {"accumulate_grad_batches": 3}, id="epoch-end"),
        pytest.param(AT_VALIDATION, {"val_check_interval": 0.5}, id="mid-epoch-validation"),
    ],
)
@pytest.mark.parametrize(
    ("module", "every"),
    [
        ("hand-written", 4),
        pytest.param("hand-written", 1, marks=pytest.mark.slow),
        pytest.param("gpt2", 1, marks=pytest.mark.slow),
    ],
)
def test_resume_from_checkpoints_repeats_the_run(
    tmp_path: Path, module: str, every: int, checkpoint: dict[str, Any], trainer: dict[str, Any]
) -> None:
    """From all of them, or from those of each epoch's end and each fourth one."""
    run = Run(str(tmp_path), module=module, checkpoint=checkpoint, trainer=trainer, max_epochs=2)
    epoch = trainer.get("limit_train_batches", 10)
    losses, digest = run.fit()
    written = checkpoints(run.folder)
    assert len(written) >= 2
    for number, path in enumerate(written):
        if number % every and position_of(path) % epoch:
            continue
        resumed, resumed_digest = resume(run, path, tmp_path / "resumed")
        assert resumed == losses[position_of(path) :], path.name
        assert resumed_digest == digest, path.name


@pytest.mark.parametrize("module", ["hand-written", "gpt2"])
def test_resume_in_mid_accumulation_keeps_the_gradients(tmp_path: Path, module: str) -> None:
    """A checkpoint may fall between optimizer steps; Lightning alone would lose the window."""
    run = Run(
        str(tmp_path),
        module=module,
        save_every_batch=True,
        trainer={"accumulate_grad_batches": 4},
        max_epochs=2,
    )
    losses, digest = run.fit()
    waiting = [
        path
        for path in checkpoints(run.folder)
        if WINDOW_KEY in torch.load(path, weights_only=True)
    ]
    assert waiting
    for path in waiting:
        resumed, resumed_digest = resume(run, path, tmp_path / "resumed")
        assert resumed == losses[position_of(path) :]
        assert resumed_digest == digest


def test_of_our_module_no_attribute_of_this_process_is_saved(tmp_path: Path) -> None:
    """A clock's reading means nothing to another process."""
    run = Run(str(tmp_path), module="gpt2", checkpoint=EVERY_STEP, max_epochs=1)
    run.fit()
    for path in checkpoints(run.folder):
        (attributes,) = torch.load(path, weights_only=True)["lightning_align.attributes"]
        assert attributes.keys() == {"_tokens_seen"}


def test_loader_started_before_the_restore_is_started_again(tmp_path: Path) -> None:
    """configure_optimizers may read trainer.estimated_stepping_batches, which starts the
    workers."""
    run = Run(
        str(tmp_path), module="stepping-batches", num_workers=2, checkpoint=EVERY_STEP, max_epochs=2
    )
    losses, digest = run.fit()
    path = checkpoints(run.folder)[3]
    resumed, resumed_digest = resume(run, path, tmp_path / "resumed")
    assert resumed == losses[position_of(path) :]
    assert resumed_digest == digest


def without_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceData, "position", property(lambda _: 0))


def without_reseeding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_resume, "reseed", lambda *_: None)


def without(key: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Leave one part out of the checkpoint."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        load = torch.load

        def load_without(*args: Any, **kwargs: Any) -> Any:
            checkpoint = load(*args, **kwargs)
            if key == "loops":
                del checkpoint["loops"]
            else:
                for state in checkpoint["optimizer_states"]:
                    state["state"] = {}
            return checkpoint

        monkeypatch.setattr(torch, "load", load_without)

    return patch


@pytest.mark.parametrize(
    "leave_out",
    [without_position, without_reseeding, without("optimizer"), without("loops")],
    ids=["position", "reseeding", "optimizer", "loops"],
)
def test_the_comparison_notices_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave_out: Callable[[Any], None]
) -> None:
    run = Run(str(tmp_path), checkpoint=EVERY_STEP, max_epochs=2)
    losses, digest = run.fit()
    path = checkpoints(run.folder)[3]
    position = position_of(path)
    leave_out(monkeypatch)
    resumed, resumed_digest = resume(run, path, tmp_path / "resumed")
    assert resumed != losses[position:]
    assert resumed_digest != digest


def started(run: Run, fresh: bool) -> int:
    """Id of a process that trains, the first of its group: a fresh interpreter, or a forked one."""
    if fresh:
        return subprocess.Popen(run.command(), start_new_session=True).pid

    def fit() -> None:
        os.setsid()
        run.fit()

    return fork(fit)


def train(run: Run, fresh: bool) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(started(run, fresh), 0)[1]) == 0


def kill_when(run: Run, lines: int, fresh: bool) -> None:
    """Start ``run`` as a process and send SIGKILL to all of it once it has recorded ``lines``
    batches."""
    pid = started(run, fresh)
    record = Path(run.folder, f"{run.name}.0")
    deadline = time.monotonic() + 120
    try:
        while not record.exists() or len(record.read_text().splitlines()) < lines:
            if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() > deadline:
                pytest.fail("the run ended, or did not begin, before it was killed")
            time.sleep(0.002)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("kill_at", "num_workers", "accumulate", "fresh"),
    [
        (4, 0, 1, False),
        pytest.param(10, 0, 1, False, marks=pytest.mark.slow),
        pytest.param(13, 2, 2, True, marks=pytest.mark.slow),
        pytest.param(20, 2, 1, False, marks=pytest.mark.slow),
    ],
    ids=["mid-epoch", "epoch-end", "workers-accumulate", "workers-epoch-end"],
)
def test_sigkill_and_resume_is_bit_identical(
    tmp_path: Path, kill_at: int, num_workers: int, accumulate: int, fresh: bool
) -> None:
    """Epochs have 10 batches; the process is killed from outside and resumed by another process."""
    whole = Run(
        str(tmp_path / "whole"),
        module="gpt2",
        num_workers=num_workers,
        trainer={"accumulate_grad_batches": accumulate},
    )
    Path(whole.folder).mkdir()
    losses, digest = whole.fit()
    killed = replace(whole, folder=str(tmp_path / "killed"), checkpoint=EVERY_STEP, pause_s=0.03)
    Path(killed.folder).mkdir()
    kill_when(killed, kill_at, fresh)
    assert killed.losses() == losses[: len(killed.losses())]
    path = checkpoints(killed.folder)[-1]
    resumed = replace(killed, name="resumed", ckpt_path=str(path), checkpoint={}, pause_s=0.0)
    train(resumed, fresh)
    assert resumed.losses() == losses[position_of(path) :]
    assert Path(resumed.folder, "resumed.hash").read_text() == digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "fresh"), [(3, False), (5, True)], ids=["mid-epoch", "epoch-end"]
)
def test_sigkill_and_resume_on_two_ranks(tmp_path: Path, kill_at: int, fresh: bool) -> None:
    """Two forked gloo ranks; an epoch has 5 batches, the last of them uneven."""
    whole = Run(
        str(tmp_path / "whole"), module="gpt2", devices=2, trainer={"accumulate_grad_batches": 2}
    )
    Path(whole.folder).mkdir()
    train(whole, fresh)
    killed = replace(whole, folder=str(tmp_path / "killed"), checkpoint=EVERY_STEP, pause_s=0.03)
    Path(killed.folder).mkdir()
    kill_when(killed, kill_at, fresh)
    path = checkpoints(killed.folder)[-1]
    resumed = replace(killed, name="resumed", ckpt_path=str(path), checkpoint={}, pause_s=0.0)
    train(resumed, fresh)
    for rank in range(2):
        assert resumed.losses(rank) == whole.losses(rank)[position_of(path) :]
    assert whole.losses(0) != whole.losses(1)
    hashes = [Path(run.folder, f"{run.name}.hash").read_text() for run in (whole, resumed)]
    assert hashes[0] == hashes[1]


# The callback itself


def test_state_round_trips_and_carries_the_seed() -> None:
    ours = ExactResume(seed=4)
    restored = ExactResume()
    restored.load_state_dict(ours.state_dict())
    assert restored.state_dict() == {"seed": 4}


def test_another_seed_is_refused_on_resume() -> None:
    with pytest.raises(ValueError, match=r"ExactResume\(seed=5\): the checkpoint was written with"):
        ExactResume(seed=5).load_state_dict({"seed": 4})


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seed=-1\): must not be negative"):
        ExactResume(seed=-1)


def test_takes_the_seed_of_the_datamodule_and_comes_first(tmp_path: Path) -> None:
    callback = ExactResume()
    others = [pl.callbacks.LambdaCallback(), callback]
    trainer = pl.Trainer(
        max_steps=1,
        logger=False,
        accelerator="cpu",
        callbacks=others,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(HandWritten(), SequenceData(seed=9))
    assert callback.state_dict() == {"seed": 9}
    assert trainer.callbacks[0] is callback


def test_sampler_seam_is_left_alone_by_lightning(tmp_path: Path) -> None:
    data = SequenceData()
    trainer = pl.Trainer(
        max_steps=1,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(HandWritten(), data)
    assert isinstance(trainer.train_dataloader.sampler, PositionSampler)
    assert trainer.train_dataloader.sampler is data.train_sampler
