"""Full disks, errors of the disk, damaged files: what is told, and what is whole all the same."""

import errno
import os
import re
import resource
import shutil
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import GaLoreAdamW, Muon, StableAdamW
from lightning_align.offload import store
from lightning_align.offload.record import read_record
from tests.helpers.children import fork, in_child
from tests.helpers.covers import cover
from tests.helpers.offloaded import Regression, assert_same, fit, points, small

CODES = {"preadv": errno.EIO, "pwritev": errno.EIO, "fdatasync": errno.EIO, "replace": errno.ENOSPC}


class Count(pl.Callback):
    """Counts steps that are committed."""

    steps = 0

    def on_train_batch_start(self, trainer, *_):
        self.steps = trainer.global_step


def whole(tmp_path, **options):
    """What an undisturbed run in memory comes to."""
    module = Regression()
    fit(tmp_path, module, points(), **options)
    return module.state_dict()


@cover(early=["auto", False], call=list(CODES))
def test_an_error_of_the_disk_ends_the_run_at_a_whole_step(tmp_path, monkeypatch, call, early):
    """In the threads of the store, and where the record takes the place of the one before."""
    count = Count()
    real = getattr(os, call)

    def fail(*arguments, **options):
        if count.steps == 3:
            raise OSError(CODES[call], os.strerror(CODES[call]), "the file")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, fail)
    if call == "replace":  # pathlib has its own name for it
        monkeypatch.setattr(Path, "replace", lambda path, to: fail(path, to))
    with pytest.raises(OSError, match=os.strerror(CODES[call])) as error:
        fit(tmp_path, Regression(), points(), small(update_in_backward=early), callbacks=[count])
    monkeypatch.undo()
    (note,) = getattr(error.value, "__notes__", [None])
    # Updates that wait for the next forward are not done by then, and their step is committed
    # there. A thread's error is raised where its work is waited for, be it in the next commit.
    whole_step = 3 if early else 2
    left = rf"after step [34], in {tmp_path}/zero_infinity/rank00000: step {whole_step} is whole"
    assert note is None or re.search(left, note)
    trainer = fit(tmp_path, Regression(), points(), small(), "last")
    assert_same(trainer.strategy.lightning_module_state_dict(), whole(tmp_path))
    trainer.strategy.close()


def test_a_folder_that_is_held_by_another_process(tmp_path):
    ready, done = os.pipe(), os.pipe()

    class Wait(pl.Callback):
        def on_train_batch_end(self, *_):
            os.write(ready[1], b"x")
            os.read(done[0], 1)

    path = str(tmp_path / "nvme")

    def train(*callbacks):
        return fit(
            tmp_path, Regression(), points(), small(nvme_path=path), callbacks=list(callbacks)
        )

    child = fork(lambda: train(Wait()))
    os.read(ready[0], 1)
    with pytest.raises(RuntimeError, match=rf"nvme_path='{path}.*pid {child}\) is writing"):
        train()
    os.kill(child, 9)
    os.waitpid(child, 0)
    for descriptor in (*ready, *done):
        os.close(descriptor)
    trainer = train()  # a dead one holds nothing, and had committed nothing
    assert trainer.global_step == 6
    trainer.strategy.close()


def test_leftovers_of_a_crash_are_swept(tmp_path):
    folder = tmp_path / "zero_infinity" / "rank00000"
    folder.mkdir(parents=True)
    for name in ("00000.0.block", "00099.1.block", "committed.new", "gradients"):
        (folder / name).write_bytes(b"x" * 5000)
    (folder / "notes.txt").write_text("mine")
    fit(tmp_path, Regression(), points(), small()).strategy.close()
    names = {path.name for path in folder.iterdir()}
    assert "notes.txt" in names
    assert not {"00099.1.block", "committed.new"} & names


class TestSmallDisk:
    """No room, at set-up and in mid-step."""

    def test_at_set_up(self, tmp_path, monkeypatch):
        """Needed and free bytes are told, and what was made is gone."""
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        match = r"nvme_path=None\): the files of rank00000.*bytes are needed and 100 are free"
        with pytest.raises(ValueError, match=match):
            fit(tmp_path, Regression(), points(), small())
        assert not list((tmp_path / "zero_infinity" / "rank00000").glob("*.block"))

    def test_for_gradients(self, tmp_path, monkeypatch):
        """Each block has room, and a window of the gradients of all has none."""
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        match = r"nvme_path=None\): the files of rank00000.*bytes are needed and 10,000 are free"
        with pytest.raises(ValueError, match=match):
            fit(tmp_path, Regression(), points(), small(update_in_backward=False))

    def test_for_the_optimizer(self, tmp_path, monkeypatch):
        """The parameters have room, and the moments have none."""
        usage, allocated = shutil.disk_usage(tmp_path), []
        allocate = store.ShardStore.allocate

        def and_then_full(self, state_bytes=None):
            free = 10_000 if state_bytes else usage.free
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
            allocated.append(state_bytes)
            return allocate(self, state_bytes)

        monkeypatch.setattr(store.ShardStore, "allocate", and_then_full)
        with pytest.raises(ValueError, match=r"all blocks take [\d,]+ bytes.*10,000 are free"):
            fit(tmp_path, Regression(partial(torch.optim.AdamW, lr=1)), points(), small())
        assert len(allocated) == 2

    def test_a_file_that_is_too_large(self, tmp_path):
        """EFBIG, of the system: no file of this process may grow beyond a page."""

        def refused():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            with pytest.raises(ValueError, match=r"File too large"):
                fit(tmp_path, Regression(), points(), small())

        assert in_child(refused) == 0

    def test_in_mid_step(self, tmp_path):
        """Files may not grow any more; the state of StableAdamW comes with its first step."""

        class Limit(pl.Callback):
            def on_train_batch_start(self, *_):
                folder = tmp_path / "zero_infinity" / "rank00000"
                size = max(path.stat().st_size for path in folder.glob("*.block"))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        def refused():
            build = partial(StableAdamW, lr=1e-2)
            strategy = small(memory_limit="4MB")  # gradients stay there
            with pytest.raises(OSError, match=r"bytes are needed.*File too large") as error:
                fit(tmp_path, Regression(build), points(), strategy, callbacks=[Limit()])
            notes = getattr(error.value, "__notes__", ["no step was committed"])
            assert "no step was committed" in notes[0]

        assert in_child(refused) == 0

    def test_of_a_mounted_filesystem(self, tmp_path):
        """The same of a real one that is full in mid-run, where mounting is allowed."""
        place = tmp_path / "disk"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("may not mount; the tests above limit the size of files")
        try:
            run_until_full(tmp_path, place)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)


def run_until_full(tmp_path, place):
    strategy = partial(small, nvme_path=str(place / "nvme"))

    class Fill(pl.Callback):
        """Somebody else fills the disk behind the third step: no record can be written."""

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                with (place / "other").open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(4096))

    with pytest.warns(UserWarning, match="is on tmpfs, so its files are memory"):  # noqa: SIM117
        with pytest.raises(OSError, match="No space left") as error:
            fit(tmp_path, Regression(), points(), strategy(), callbacks=[Fill()])
    for note in getattr(error.value, "__notes__", []):
        assert "is whole there: go on with fit(ckpt_path='last')" in note
    (place / "other").unlink()
    trainer = fit(tmp_path, Regression(), points(), strategy(), "last")
    assert_same(trainer.strategy.lightning_module_state_dict(), whole(tmp_path))
    trainer.strategy.close()


class TestDamage:
    """Files that are not as they were written."""

    @pytest.fixture
    def folder(self, tmp_path):
        fit(tmp_path, Regression(), points(), small(), max_steps=3).strategy.close()
        return tmp_path / "zero_infinity" / "rank00000"

    def test_a_truncated_shard(self, tmp_path, folder):
        record = read_record(folder)
        os.truncate(folder / f"00001.{record.slots['parts.1']}.block", 4096)
        with pytest.raises(ValueError, match=r"00001.*is damaged: it has 4,096 of [\d,]+.*Step 3"):
            fit(tmp_path, Regression(), points(), small(), "last")

    def test_a_missing_shard(self, tmp_path, folder):
        record = read_record(folder)
        (folder / f"00001.{record.slots['parts.1']}.block").unlink()
        with pytest.raises(ValueError, match=r"00001.*is damaged: it has 0 of [\d,]+ bytes"):
            fit(tmp_path, Regression(), points(), small(), "last")

    @pytest.mark.parametrize("ckpt_path", ["last", None])
    def test_a_damaged_record(self, tmp_path, folder, ckpt_path):
        data = bytearray((folder / "committed").read_bytes())
        data[100] ^= 1
        (folder / "committed").write_bytes(data)
        with pytest.raises(ValueError, match=r"rank00000/committed is damaged"):
            fit(tmp_path, Regression(), points(), small(), ckpt_path)
        trainer = fit(tmp_path, Regression(), points(), small(overwrite=True))
        trainer.strategy.close()

    @pytest.mark.parametrize("change", ["width", "depth", "wrap_policy"])
    def test_another_model_or_layout(self, tmp_path, folder, change):
        module = Regression(width=24 if change == "width" else 20)
        if change == "depth":
            del module.parts[3]
        policy = ["Linear"] if change == "wrap_policy" else None
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match=r"step 3 (is )?of another model"):
            fit(tmp_path, module, points(), small(wrap_policy=policy), "last")
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        changed = {name for name in before if after.get(name) != before[name]}
        assert changed <= {".lightning_align.lock", "gradients"}


class Spoils(Regression):
    """Its third batch has a gradient that is no number."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 else loss


@pytest.mark.parametrize(
    "build",
    [
        partial(StableAdamW, lr=1e-2),
        partial(Muon, lr=1e-2),
        partial(GaLoreAdamW, lr=1e-2, rank=4, update_proj_gap=2),
    ],
    ids=lambda build: build.func.__name__,
)
def test_a_gradient_that_is_no_number_touches_nothing_on_disk(tmp_path, build):
    before, after = {}, {}

    class Watch(pl.Callback):
        def content(self, trainer):
            trainer.strategy._engine.finish_updates()  # of the step before
            trainer.strategy._engine.store.settle_all()
            files = (tmp_path / "zero_infinity" / "rank00000").glob("*.block")
            return {path.name: path.read_bytes() for path in files}

        def on_train_batch_start(self, trainer, _, batch, batch_idx):
            if batch_idx == 2:
                before.update(self.content(trainer))

        def on_train_batch_end(self, trainer, _, outputs, batch, batch_idx):
            if batch_idx == 2:
                after.update(self.content(trainer))

    theirs = Spoils(build)
    fit(tmp_path, theirs, points())
    trainer = fit(tmp_path, Spoils(build), points(), small(), callbacks=[Watch()])
    assert before
    assert after == before
    found = trainer.strategy.lightning_module_state_dict()
    assert all(value.isfinite().all() for value in found.values())
    assert_same(found, theirs.state_dict())
    trainer.strategy.close()


def test_one_that_raises_leaves_the_step_before_it(tmp_path):
    build = partial(StableAdamW, lr=1e-2, on_nonfinite="raise")
    with pytest.raises(FloatingPointError) as error:
        fit(tmp_path, Spoils(build), points(), small())
    for note in getattr(error.value, "__notes__", []):
        assert "step 2 is whole there" in note
    trainer = fit(tmp_path, Regression(build), points(), small(), "last")  # without the bad batch
    theirs = Regression(build)
    fit(tmp_path, theirs, points())
    assert_same(trainer.strategy.lightning_module_state_dict(), theirs.state_dict())
    trainer.strategy.close()
