"""A run of a stranger, module and loader, resumes to the last bit once it has ExactResume."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.foreign import ForeignRun, consumed_in

LOADERS = ["shuffled", "generator", "stream", "stateful", "stateful-stream", "two", "mixed"]
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


@pytest.mark.parametrize("name", [*LOADERS, *WITH_WORKERS])
def test_resume_in_mid_epoch_and_behind_it(tmp_path: Path, name: str) -> None:
    run = ForeignRun(str(tmp_path), loader=name, checkpoint=EVERY_STEP).fit()
    batches = len([line for line in run.record() if " loss " in line]) // 3  # of an epoch
    resumes_from(run, {2, batches + 3})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LOADERS, *WITH_WORKERS])
@pytest.mark.parametrize(
    ("checkpoint", "trainer"),
    [
        pytest.param({"filename": "{epoch}-{step}"}, {}, id="epoch-ends"),
        pytest.param({"filename": "{epoch}-{step}"}, {"limit_val_batches": 0}, id="no-validation"),
        pytest.param(
            {"filename": "{epoch}-{step}"},
            {"limit_val_batches": 0, "max_steps": 16, "max_epochs": -1},
            id="max-steps",
        ),
        pytest.param(
            {"filename": "{epoch}-{step}"},
            {"max_steps": 16, "max_epochs": -1},
            id="max-steps-validation",
        ),
        pytest.param(EVERY_STEP, {"accumulate_grad_batches": 2}, id="accumulate"),
        pytest.param(EVERY_STEP, {"limit_train_batches": 3}, id="short-epochs"),
        pytest.param(
            EVERY_STEP, {"reload_dataloaders_every_n_epochs": 1}, id="reloaded-every-epoch"
        ),
    ],
)
def test_resume_from_every_checkpoint(
    tmp_path: Path, name: str, checkpoint: dict[str, Any], trainer: dict[str, Any]
) -> None:
    run = ForeignRun(str(tmp_path), loader=name, checkpoint=checkpoint, trainer=trainer).fit()
    batches = len([line for line in run.record() if " loss " in line])
    positions = {consumed_in(path) for path in checkpoints(tmp_path)} - {batches}
    assert len(positions) >= 2
    resumes_from(run, positions)
