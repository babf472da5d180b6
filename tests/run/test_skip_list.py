"""A list that one run has written is followed by another one of the same data, or refused."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_align import SpikeGuard
from lightning_align.data.skip_list import write_skip_list
from lightning_align.run.skip_list import follow_skip_list, stream_of
from lightning_align.run.skipping import skipped_batches
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.run.test_capture import Calls, Everything, everything
from tests.run.test_skipping import GoesBack, Told, run


def writes(path: Path) -> pl.Callback:
    return Calls(
        "on_train_end",
        lambda trainer: write_skip_list(str(path), skipped_batches(trainer), stream_of(trainer)),
    )


def follows(path: Path) -> pl.Callback:
    return Calls("on_train_start", lambda trainer: follow_skip_list(trainer, str(path), "Guard"))


def test_a_new_run_leaves_out_what_another_one_went_back_for(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    run(everything, GoesBack((2, 4, 1)), writes(path))
    told, again = Told([(2, 5)]), Told([])
    assert run(everything, told) == run(everything, follows(path), again)
    assert told.positions == again.positions
    assert json.loads(path.read_text())["ranges"] == [[2, 5]]


class Other(Everything):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def train_dataloader(self) -> Any:
        made = super().train_dataloader()
        options = {"dataset": made.dataset, "batch_size": 4, "shuffle": True, **self.changes}
        return type(made)(**options)


@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        ({"batch_size": 5}, {}, "epoch was 6 and is 5"),
        ({"shuffle": False}, {}, "loaders was .*RandomSampler.* and is .*SequentialSampler"),
        ({}, {"limit_train_batches": 4}, "epoch was 6 and is 4"),
    ],
)
def test_the_list_of_other_data_is_refused(
    tmp_path: Path, changes: Any, options: Any, told: str
) -> None:
    path = tmp_path / "list.json"
    run(lambda: (Other(), [], None), writes(path), max_steps=1)
    with pytest.raises(ValueError, match=rf"^Guard\(skip_list=.*other data: {told}"):
        run(lambda: (Other(**changes), [], None), follows(path), max_steps=1, **options)


@pytest.mark.slow
def test_every_rank_follows_or_refuses_what_rank_zero_reads(tmp_path: Path) -> None:
    """Nobody else may have the file."""
    path = tmp_path / "list.json"
    stream = {"epoch": 3, "loaders": [], "seed": 3, "replicas": 2}

    def on(rank: int) -> None:
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        own = path if rank == 0 else tmp_path / "none.json"
        told = Told([])
        run(everything, follows(own), told, max_steps=2, **ranks)
        assert told.positions == [1, 2]
        with pytest.raises(ValueError, match=r"^Guard\(skip_list="):
            run(everything, follows(tmp_path / "none.json"), max_steps=2, **ranks)

    def note(rank: int) -> Any:
        found: list[Any] = []
        ranks = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        looks = Calls("on_train_start", lambda trainer: found.append(stream_of(trainer)))
        run(everything, looks, max_steps=1, **ranks)
        return found[0]

    one, other = run_ranks(note)
    assert one == other
    assert (one["epoch"], one["replicas"]) == (stream["epoch"], stream["replicas"])
    write_skip_list(str(path), [(0, 1)], one)
    run_ranks(on)


def test_spike_guard_follows_a_list_and_refuses_that_of_other_data(tmp_path: Path) -> None:
    path, other = tmp_path / "list.json", tmp_path / "other.json"
    run(everything, Told([(2, 5)]), writes(path), max_steps=1)
    body = json.loads(path.read_text())
    body["stream"]["seed"] += 1
    other.write_text(json.dumps(body))
    told, guarded = Told([(2, 5)]), Told([])
    ours = run(everything, SpikeGuard(action="log", skip_list=str(path)), guarded, max_epochs=1)
    assert ours == run(everything, told, max_epochs=1)
    assert guarded.positions == told.positions
    with pytest.raises(
        ValueError, match=r"^SpikeGuard\(skip_list=.*other data: seed was 4 and is 3"
    ):
        run(everything, SpikeGuard(skip_list=str(other)), max_epochs=1)
