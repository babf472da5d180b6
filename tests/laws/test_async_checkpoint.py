"""Law: kill -9 a run at any moment; what AsyncCheckpoint has left continues it to the last bit.

On a module and loaders that know nothing of us. Lightning's ModelCheckpoint, beside it on the same
run, is whole, too, but what it leaves does not continue the run.
"""

import contextlib
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_align import AsyncCheckpoint
from tests.helpers.foreign import ForeignRun, consumed_in

pytestmark = pytest.mark.slow


def whole_and_killed(
    folder: Path, seed: int, **options: Any
) -> tuple[ForeignRun, ForeignRun, float]:
    """A run that never stopped, and one killed from outside at a random moment."""
    whole = ForeignRun(str(folder / "whole"), exact_resume=False, **options)
    Path(whole.folder).mkdir()
    # The same callbacks, so that only the kill differs.
    every_step = {"every_n_train_steps": 1, "save_top_k": 2, "monitor": "loss", "save_last": True}
    whole = replace(whole, async_checkpoint={"dirpath": whole.folder + "/async", **every_step})
    whole.fit()
    killed = replace(
        whole,
        folder=str(folder / "killed"),
        async_checkpoint={"dirpath": str(folder / "killed" / "async"), **every_step},
        checkpoint={"every_n_train_steps": 1, "filename": "{step}"},
        pause_s=0.03,
    )
    Path(killed.folder).mkdir()
    batches = random.Random(seed).uniform(3, 14 if whole.devices == 1 else 7)  # of 18, of 9
    kill_after(killed, batches)
    return whole, killed, batches


def kill_after(run: ForeignRun, batches: float) -> None:
    """SIGKILL to all processes of the run, a part of a batch after it has recorded so many."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with contextlib.suppress(BaseException):
            run.fit()
        os._exit(1)
    record, deadline = Path(f"{run.path}.0"), time.monotonic() + 120

    def recorded() -> int:
        return record.read_text().count(" loss ") if record.exists() else 0

    try:
        while recorded() < int(batches):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep((batches % 1) * 0.05)
    finally:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {}),
        (1, {"loader": "workers", "trainer": {"accumulate_grad_batches": 2}}),
        (2, {"loader": "stream"}),
        (3, {"loader": "stateful"}),
        (4, {"loader": "persistent"}),
        (5, {"devices": 2}),
        (6, {"devices": 2, "trainer": {"accumulate_grad_batches": 2}}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else ",".join(map(str, value.values())),
)
def test_kill_9_and_resume_from_the_latest(
    tmp_path: Path, seed: int, options: dict[str, Any]
) -> None:
    whole, killed, _ = whole_and_killed(tmp_path, seed, **options)
    path = AsyncCheckpoint.latest(killed.async_checkpoint["dirpath"])
    assert path is not None
    position = consumed_in(path)
    resumed = replace(killed, name="resumed", ckpt_path="last", checkpoint={}, pause_s=0.0)
    resumed.fit()
    for rank in range(whole.devices):
        ours, expected = resumed.record(position, rank), whole.record(position, rank)
        assert ours == expected
    if whole.devices == 1 and "loader" not in options:
        lightning_alone_does_not(killed, whole)


def lightning_alone_does_not(killed: ForeignRun, whole: ForeignRun) -> None:
    steps = {int(path.stem.split("=")[1]): path for path in Path(killed.folder).glob("step=*.ckpt")}
    path = steps[max(steps) - 1]  # the newest may be torn
    alone = replace(
        killed, name="alone", ckpt_path=str(path), checkpoint={}, async_checkpoint={}, pause_s=0.0
    )
    alone.fit()
    position = consumed_in(path)
    assert alone.record(position) != whole.record(position)
