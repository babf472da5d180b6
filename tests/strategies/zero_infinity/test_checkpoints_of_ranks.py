"""Checkpoints of several ranks, of which each links what it has."""

from __future__ import annotations

import errno
import shutil
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_align import AsyncCheckpoint, ExactResume, Muon, SavePretrained
from lightning_align.checkpointing.snapshot import HostBuffer
from lightning_align.mapped import source_of
from lightning_align.modules import PretrainModule
from lightning_align.offload import linked
from lightning_align.offload.store import ShardStore
from tests.helpers.offloaded import ADAMW, Regression, assert_same, batches, points, small, text
from tests.helpers.ranks import end_of_ranks, run_ranks
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.zero_infinity.test_ranks import fit


class SaveAt(pl.Callback):
    """Saves a folder, and the same state as a file that rank 0 has gathered."""

    def __init__(self, batch, folder):
        self.batch, self.folder = batch, folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            for links in (True, False):
                trainer.strategy.save_distributed_checkpoint = links
                trainer.save_checkpoint(self.folder / ("links" if links else "file"))


def run(folder, rank, build, data, *callbacks, size=2, ckpt_path=None, **options):
    strategy = small(timeout=timedelta(seconds=60), overwrite=True)
    callbacks = [ExactResume(), *callbacks]
    trainer = fit(
        folder,
        rank,
        build(),
        data(),
        strategy,
        ckpt_path,
        size=size,
        callbacks=callbacks,
        **options,
    )
    state = dict(trainer.strategy.lightning_module_state_dict())
    states = trainer.strategy.optimizer_state(trainer.optimizers[0])
    trainer.strategy.close()
    return state, states


def regression():
    return Regression(schedule=True)


MUON = partial(Muon, lr=1e-2)


def language(optimizer=MUON):
    return PretrainModule(TINY_MODELS["llama_tied"](), optimizer=optimizer)


rows = partial(points, 4)


@pytest.mark.parametrize(
    ("build", "data", "window"),
    [
        pytest.param(regression, rows, 1, id="cut anywhere"),
        pytest.param(regression, rows, 2, id="in an open window", marks=pytest.mark.slow),
        pytest.param(language, text, 1, id="whole matrices"),
    ],
)
def test_a_folder_of_two_ranks_has_what_rank_0_would_have_gathered(tmp_path, build, data, window):
    options = {"accumulate_grad_batches": window}
    saves = SaveAt(2, tmp_path)
    whole = run_ranks(lambda rank: run(tmp_path, rank, build, data, saves, **options), 2, 120)[0]
    ranks = sorted(path.name for path in (tmp_path / "links").glob("rank*"))
    assert ranks == ["rank00000", "rank00001"]
    found = linked.read(tmp_path / "links", "test", weights_only=True)
    expected = torch.load(tmp_path / "file", weights_only=True)
    assert found.keys() == expected.keys()
    assert_same(found["state_dict"], expected["state_dict"])
    assert_same(found["optimizer_states"], expected["optimizer_states"])
    # Two ranks go on from it, to the bit.
    goes_on = {**options, "ckpt_path": tmp_path / "links"}
    ended = run_ranks(lambda rank: run(tmp_path, rank, build, data, **goes_on), 2, 120)[0]
    assert_same(ended, whole)
    if window == 1:  # and so does one, but not with the files of one
        one = run_ranks(lambda rank: run(tmp_path, rank, build, data, size=1, **goes_on), 1, 120)
        assert one[0][1]["state"].keys() == whole[1]["state"].keys()
        shutil.rmtree(tmp_path / "links/rank00001")
        with pytest.raises(ValueError, match=r"the files of 1 rank\(s\) are missing"):
            linked.read(tmp_path / "links", "test", weights_only=True)


def tensors_in(value):
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return [value] if isinstance(value, torch.Tensor) and value.numel() > 1 else []


@pytest.mark.parametrize("tile_numel", [None, pytest.param(200, marks=pytest.mark.slow)])
def test_what_rank_0_gathers_for_a_file_is_in_none_of_its_memory(tmp_path, tile_numel):
    """Neither for a file of the Trainer nor for one of AsyncCheckpoint."""

    def saved(rank):
        copied, copy_ = [], HostBuffer.copy

        def note(self, tensors, state=None):
            copied.append(copy_(self, tensors, state))
            return copied[-1]

        HostBuffer.copy = note
        strategy = small(tile_numel=tile_numel, save_distributed_checkpoint=False)
        save = AsyncCheckpoint(tmp_path / "async", every_n_train_steps=6)
        options = {"callbacks": [save], "enable_checkpointing": True}
        trainer = fit(tmp_path, rank, Regression(), rows(), strategy, **options)
        trainer.save_checkpoint(tmp_path / "file.ckpt")
        state = strategy.lightning_module_state_dict()
        states = strategy.optimizer_state(trainer.optimizers[0])
        assert bool(state) == bool(states) == (rank == 0)
        found = [*tensors_in(state), *tensors_in(states.get("state", {}))]
        shown = [tensor for tensor in found if source_of(tensor)]
        assert len(shown) == len(found) - 2 * (rank == 0)  # but for running mean and variance
        kept = [tensor.clone() for tensor in found]
        strategy.close()
        assert len(copied) == (2 if rank == 0 else 0)
        assert sum(copied) < 5000  # counters of steps, running means
        return kept

    expected = run_ranks(saved, timeout_s=120)[0]
    for path in (tmp_path / "file.ckpt", next((tmp_path / "async").glob("*.ckpt"))):
        ours = torch.load(path)
        found = [*tensors_in(ours["state_dict"]), *tensors_in(ours["optimizer_states"][0]["state"])]
        assert_same(found, expected)


def test_no_rank_waits_for_one_whose_disk_is_full_while_it_gathers(tmp_path):
    """On a disk of which the second block to be set aside takes the rest."""

    def run(rank):
        calls, set_aside = [], ShardStore.set_aside

        def full(store, tensors):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, "full", str(store.folder))
            return set_aside(store, tensors)

        ShardStore.set_aside = full
        strategy = small(timeout=timedelta(seconds=30), save_distributed_checkpoint=False)
        save = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2)
        options = {"callbacks": [save], "enable_checkpointing": True}
        fit(tmp_path, rank, Regression(), rows(), strategy, **options)

    ended = end_of_ranks(run, timeout_s=60)
    assert not any(end.stuck for end in ended)
    assert "OSError: [Errno 28] full" in ended[0].error
    assert "rank 0" in ended[1].error


def test_one_ranks_folder_is_read_by_two(tmp_path):
    saves = SaveAt(2, tmp_path)
    run_ranks(lambda rank: run(tmp_path, rank, regression, rows, saves, size=1), 1, 120)
    ends = [
        run_ranks(
            lambda rank: run(tmp_path, rank, regression, rows, ckpt_path=tmp_path / name),  # noqa: B023
            2,
            120,
        )[0]
        for name in ("links", "file")
    ]
    assert_same(*ends)


def test_what_a_hook_makes_of_parts_is_refused(tmp_path):
    class Halves(Regression):
        def on_save_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            state["half"] = state["parts.0.0.weight"].half()

    def train(rank):
        with pytest.raises(Exception, match=r"'state_dict/half'.*has no values|rank . has failed"):
            run(tmp_path, rank, Halves, rows, SaveAt(0, tmp_path))

    run_ranks(train, 2, 60)
    assert not (tmp_path / "links").exists()


@pytest.mark.slow
@pytest.mark.parametrize("build", [language, partial(language, ADAMW)], ids=["whole", "cut"])
def test_a_folder_of_save_pretrained_is_of_the_weights_of_the_run(tmp_path, build):
    """Which neither rank has as a whole in its memory."""
    folder = tmp_path / "model"
    save = SavePretrained(str(folder))
    state = run_ranks(lambda rank: run(tmp_path, rank, build, text, save)[0], 2, 120)[0]
    trained, first = (TINY_MODELS["llama_tied"]().eval() for _ in range(2))
    trained.load_state_dict({n.removeprefix("model."): value for n, value in state.items()})
    tokens = batches()[0]["input_ids"][None]
    ours = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    assert torch.equal(ours, trained(tokens).logits)
    assert not torch.allclose(ours, first(tokens).logits, atol=0.1)
