"""Several drives: files striped over those of a rank, and all of them found again."""

import warnings
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import ExactResume
from lightning_align.checkpointing.files import Folder
from lightning_align.checkpointing.lock import FolderLock
from lightning_align.offload import striped
from lightning_align.offload.tuning import FILE, IOSettings
from lightning_align.strategies.zero_infinity import set_up
from lightning_align.strategies.zero_infinity.set_up import run_folders
from tests.helpers.offloaded import Regression, assert_same, compare, fit, points, small


@pytest.fixture
def drives(tmp_path, monkeypatch):
    monkeypatch.setattr(striped, "STRIPE", 4096)  # blocks are small
    return [str(tmp_path / name) for name in ("first", "second")]


def run(tmp_path, strategy, ckpt_path=None, **options):
    data = points()
    return fit(tmp_path, Regression(), data, strategy, ckpt_path, **options)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}], ids=["plain", "clipped"])
def test_training_on_two_drives_is_that_of_memory(tmp_path, drives, options):
    data = points()
    module = Regression
    compare(tmp_path, module, data, small(nvme_path=drives), **options)
    parts = [tmp_path / name / "rank00000" for name in ("first", "second")]
    names = [{path.name for path in part.glob("*.block")} for part in parts]
    assert names[0] == names[1]
    assert all(path.stat().st_size for part in parts for path in part.glob("*.0.block"))
    assert [(part / "committed").exists() for part in parts] == [True, False]


def test_a_run_goes_on_with_all_its_drives_in_their_order(tmp_path, drives):
    run(tmp_path, small(nvme_path=drives), max_steps=3).strategy.close()
    with pytest.raises(ValueError, match=r"is one of 2 folders.*and 1 are given"):
        run(tmp_path, small(nvme_path=drives[:1]), "last")
    with pytest.raises(ValueError, match="holds step 3 of an earlier run"):
        run(tmp_path, small(nvme_path=drives))
    other = [drives[0], str(tmp_path / "third")]
    with pytest.raises(ValueError, match=r"third.*is not folder 1 of 2.*a drive is missing"):
        run(tmp_path, small(nvme_path=other), "last")
    trainer = run(tmp_path, small(nvme_path=drives), "last")
    assert_same(
        trainer.strategy.lightning_module_state_dict(), run(tmp_path, "auto").model.state_dict()
    )
    trainer.strategy.close()


def test_folders_of_an_earlier_run_in_another_order_are_not_swept(tmp_path, drives):
    run(tmp_path, small(nvme_path=drives), max_steps=3).strategy.close()
    with pytest.raises(ValueError, match=r"first.*holds step 3 of an earlier run"):
        run(tmp_path, small(nvme_path=drives[::-1]), "last")
    other = [str(tmp_path / "third"), drives[1]]
    for folders in (other, drives[1:]):
        with pytest.raises(ValueError, match=r"second.*holds a part of an earlier run"):
            run(tmp_path, small(nvme_path=folders), "last")
    run(tmp_path, small(nvme_path=drives), "last").strategy.close()
    run(tmp_path, small(nvme_path=other, overwrite=True)).strategy.close()


def test_leftovers_of_a_run_that_has_committed_nothing_are_swept(tmp_path, drives):
    run(tmp_path, small(nvme_path=drives), max_steps=1).strategy.close()
    (tmp_path / "first" / "rank00000" / "committed").unlink()
    run(tmp_path, small(nvme_path=drives)).strategy.close()


def test_a_checkpoint_of_striped_files_is_of_its_moment(tmp_path, drives):
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    saving = {"enable_checkpointing": True, "callbacks": [save]}
    strategy = small(nvme_path=drives)
    run(tmp_path, strategy, **saving)
    expected = {k: v.clone() for k, v in strategy.lightning_module_state_dict().items()}
    strategy.close()
    path = tmp_path / "step=2.ckpt"
    for after in ("auto", small(nvme_path=drives, overwrite=True)):
        trainer = run(tmp_path, after, path, callbacks=[ExactResume()])
        assert_same(trainer.strategy.lightning_module_state_dict(), expected)
    after.close()


def test_a_live_run_holds_each_of_its_folders(tmp_path, drives):
    folder = tmp_path / "second" / "rank00000"
    folder.mkdir(parents=True)
    lock = FolderLock(Folder(folder))
    lock.acquire()
    with pytest.raises(RuntimeError, match="is writing"):
        run(tmp_path, small(nvme_path=drives))
    lock.release()
    run(tmp_path, small(nvme_path=drives)).strategy.close()  # the first was let go


@pytest.mark.parametrize(
    ("ranks", "paths", "expected"),
    [
        (1, 2, [[0, 1]]),
        (2, 2, [[0], [1]]),
        (3, 2, [[0], [1], [0]]),
        (2, 4, [[0, 2], [1, 3]]),
        (2, 1, [[0], [0]]),
    ],
)
def test_ranks_take_one_drive_after_the_other(tmp_path, ranks, paths, expected):
    roots = [str(tmp_path / str(number)) for number in range(paths)]
    for rank, numbers in enumerate(expected):
        of_rank = SimpleNamespace(
            nvme_path=roots, num_processes=ranks, local_rank=rank, node_rank=0
        )
        folders = run_folders(of_rank, None)
        assert folders == [tmp_path / str(number) / f"rank{rank:05d}" for number in numbers]


def test_block_size_and_threads_are_measured_where_that_is_worth_it(tmp_path, monkeypatch):
    strategy = small()
    run(tmp_path, strategy).strategy.close()
    assert strategy.io_settings == IOSettings(4 << 20, 2)
    assert not (tmp_path / "zero_infinity" / FILE).exists()
    monkeypatch.setattr(set_up, "WORTH_TUNING", 1)
    monkeypatch.setattr("lightning_align.offload.tuning.SECONDS", 0.02)
    strategy = small(overwrite=True, thread_count=3)
    run(tmp_path, strategy)
    assert strategy.io_settings.thread_count == strategy._engine.threads.count == 3
    assert strategy.io_settings.block_size == strategy._engine.threads.block_size
    assert strategy.io_settings.bandwidth > 0
    assert (tmp_path / "zero_infinity" / FILE).exists()
    strategy.close()
    remembered = small(overwrite=True, thread_count=3)
    run(tmp_path, remembered).strategy.close()
    assert remembered.io_settings == strategy.io_settings


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_files_that_are_memory_are_told_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(set_up, "filesystem", lambda _: kind)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(tmp_path, small(nvme_path=str(tmp_path / "nvme"))).strategy.close()
    found = [str(warning.message) for warning in told if "files are memory" in str(warning.message)]
    assert len(found) == (kind == "tmpfs")
