"""kill -9 at random moments of a process that saves as fast as it can."""

import os
import random
import re
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from lightning_align.checkpointing import (
    Commit,
    SnapshotEngine,
    committed_checkpoints,
    latest_valid_checkpoint,
    load_checkpoint,
)
from tests.helpers.children import fork

KEPT = 2


def save_forever(dirpath: Path, first: int, reports: int) -> None:
    """Save states whose every element is the step; report each commit on a pipe."""

    def on_commit(commit: Commit) -> None:
        os.write(reports, commit.manifest.step.to_bytes(8, "little"))

    engine = SnapshotEngine(dirpath, on_commit=on_commit)
    weight, small = torch.zeros(400_000), [torch.zeros(50) for _ in range(20)]
    for step in range(first, first + 100_000):
        for tensor in (weight, *small):
            tensor.fill_(step)
        engine.save({"weight": weight, "small": small, "step": step}, f"step{step}", step)
        for manifest in engine.committed[KEPT:]:
            engine.delete(manifest.name)


def kill_once(dirpath: Path, first: int, after_commit: bool, delay_s: float) -> list[int]:
    """Steps whose commit was reported before the process was killed."""
    reader, writer = os.pipe()
    pid = fork(lambda: save_forever(dirpath, first, writer))
    os.close(writer)
    reports = os.read(reader, 8) if after_commit else b""
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while chunk := os.read(reader, 1 << 16):
        reports += chunk
    os.close(reader)
    return [int.from_bytes(reports[i : i + 8], "little") for i in range(0, len(reports), 8)]


def check(dirpath: Path, reported: int) -> int:
    """Nothing torn, nothing lost; the step that a run would resume from."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # a damaged checkpoint would be warned of
        newest = latest_valid_checkpoint(dirpath)
        manifests = committed_checkpoints(dirpath)
    for warning in warned:  # killed while it wrote a manifest: of a step that nobody was told of
        torn = re.search(r"step(\d+)\.ckpt\.json is passed over: the manif", str(warning.message))
        assert torn is not None, warning.message
        assert int(torn[1]) > reported
    for manifest in manifests:
        state = load_checkpoint(dirpath / f"{manifest.name}.ckpt")
        assert state["step"] == manifest.step
        for tensor in (state["weight"], *state["small"]):
            assert bool((tensor == manifest.step).all())
    if newest is None:
        assert reported == 0
        return 0
    assert newest.endswith(f"step{manifests[0].step}.ckpt")
    assert manifests[0].step >= reported
    return manifests[0].step


def torture(dirpath: Path, kills: int, seed: int) -> None:
    generator = random.Random(seed)
    reported = resumed = 0
    for kill in range(kills):
        # One in four also while the process takes the folder over from the one before.
        delay_s = generator.uniform(0.0, 0.1)
        steps = kill_once(dirpath, resumed + 1, kill % 4 > 0, delay_s)
        reported = max([reported, *steps])
        resumed = check(dirpath, reported)
    assert reported >= kills * 3 // 4  # it was saving when it was killed


def damage(dirpath: Path) -> None:
    """A flipped bit in the newest, a truncated file before it: the next run falls back."""
    with SnapshotEngine(dirpath) as engine:
        last = engine.committed[0].step
        for step in (last + 1, last + 2):
            engine.save({"weight": torch.full((100,), float(step)), "step": step}, f"s{step}", step)
    newest, second = (dirpath / f"s{last + i}.ckpt" for i in (2, 1))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-10])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = latest_valid_checkpoint(dirpath)
    first, second_ = (str(warning.message) for warning in warned)
    assert "its xxh3 digest differs" in first
    assert "bytes instead of" in second_
    assert found is not None
    assert load_checkpoint(found)["step"] == last


def test_five_kills(tmp_path: Path) -> None:
    torture(tmp_path, kills=5, seed=0)
    damage(tmp_path)


@pytest.mark.slow
def test_sixty_kills(tmp_path: Path) -> None:
    torture(tmp_path, kills=60, seed=1)
    damage(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert not {name for name in names if name.endswith(".writing")}
