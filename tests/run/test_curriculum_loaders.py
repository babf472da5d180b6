"""Curricula in loaders of one's own: samplers without a position, and streams without indices."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_align.data.bucket_sampler import BucketSampler
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.sampler import PositionSampler
from lightning_align.data.streams import StreamBatches
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import Fit, Plain, async_checkpoint, model_checkpoint, resumes
from tests.helpers.stateful import StatefulLoader
from tests.run.test_samplers import ROWS, OwnLoader

PACE = {
    "min_difficulty": 8,
    "max_difficulty": 24,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 12, "difficulty_step": 4},
}
FORKED = {"multiprocessing_context": "fork"}


class Numbers(IterableDataset[torch.Tensor]):
    """Rows without indices, shuffled by the global generator."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = range(first, 24, step)
        yield from (ROWS[own[place]] for place in torch.randperm(len(own)).tolist())


class InOrder(IterableDataset[torch.Tensor]):
    """Rows without indices and without a state, the same at every iteration."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(ROWS)


class WithState(Numbers):
    def __init__(self) -> None:
        self.next, self.order = 0, []

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not self.order:
            self.order = torch.randperm(24).tolist()
        while self.next < 24:
            self.next += 1
            yield ROWS[self.order[self.next - 1]]
        self.next, self.order = 0, []

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.order = state["next"], state["order"]


def size(n: int) -> int:
    return 2 + n // 4


class Loads(Plain):
    """Its batches come from one of several loaders; it writes down which rows they are."""

    def __init__(self, loader: str, folder: Path | None = None) -> None:
        super().__init__()
        self.loader, self.folder = loader, folder

    def ranks(self) -> dict[str, int]:
        return {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}

    def train_dataloader(self) -> Any:
        curriculum = CurriculumSampler(range(1, 25), PACE, 4, **self.ranks())
        plain = PositionSampler(22, 4, **self.ranks())
        buckets = BucketSampler([9, 7, 8], [8, 16, 32], 2, **self.ranks())
        batches = {"batch_size": None}
        stream = {"batch_size": None}
        return {
            "curriculum": lambda: DataLoader(ROWS, sampler=curriculum, **batches),
            "workers": lambda: DataLoader(
                ROWS, sampler=curriculum, num_workers=2, **batches, **FORKED
            ),
            "own": lambda: OwnLoader(curriculum),
            "two": lambda: [
                DataLoader(ROWS, sampler=each, **batches) for each in (curriculum, plain)
            ],
            "shuffled too": lambda: [
                DataLoader(ROWS, sampler=curriculum, **batches),
                DataLoader(ROWS, 4, shuffle=True),
            ],
            "stateful": lambda: StatefulLoader(ROWS, sampler=plain, **batches),
            "stateful curriculum": lambda: StatefulLoader(ROWS, sampler=curriculum, **batches),
            "buckets": lambda: DataLoader(ROWS, sampler=buckets, **batches),
            "stream": lambda: DataLoader(StreamBatches(Numbers(), size), **stream),
            "stream, workers": lambda: DataLoader(
                StreamBatches(Numbers(), size), num_workers=2, **stream, **FORKED
            ),
            "stream, stateful": lambda: StatefulLoader(StreamBatches(InOrder(), size), **stream),
            "stateful stream": lambda: StatefulLoader(StreamBatches(WithState(), size), **stream),
        }[self.loader]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = torch.cat(batch) if isinstance(batch, list) else batch
        if self.folder is not None:
            with (self.folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps(rows[:, 0].tolist()) + "\n")
        return self.loss(rows)


SAMPLERS = [
    *("curriculum", "workers", "own", "two", "shuffled too"),
    *("stateful", "stateful curriculum", "buckets"),
]
STREAMS = ["stream", "stream, workers", "stream, stateful", "stateful stream"]
FEW = ("curriculum", "stateful")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in SAMPLERS + STREAMS
    ],
)
def test_a_run_is_resumed_from_any_batch(tmp_path: Path, name: str) -> None:
    resumes(Fit(tmp_path, lambda: Loads(name), model_checkpoint), 2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curriculum", "stateful stream"])
def test_limited_epochs_and_async_checkpoints_are_resumed(tmp_path: Path, name: str) -> None:
    trainer = {"limit_train_batches": 4}
    resumes(Fit(tmp_path, lambda: Loads(name), async_checkpoint, trainer=trainer), 2, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["curriculum", "workers", "buckets"])
def test_on_two_ranks_as_well(tmp_path: Path, name: str) -> None:
    def on(rank: int) -> None:
        trainer = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        resumes(Fit(tmp_path, lambda: Loads(name), model_checkpoint, trainer=trainer), 2, 4)

    run_ranks(on)


@pytest.mark.parametrize(
    "name", ["curriculum", *(pytest.param(n, marks=pytest.mark.slow) for n in ("workers", "own"))]
)
def test_batches_of_a_run_are_those_of_its_sampler(tmp_path: Path, name: str) -> None:
    """Over three epochs: no default of 0 begins the curriculum anew."""
    Fit(tmp_path, lambda: Loads(name, tmp_path)).run()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    sampler = CurriculumSampler(range(1, 25), PACE, 4)
    assert rows == [ROWS[sampler.batch(n), 0].tolist() for n in range(3 * len(sampler))]


@pytest.mark.parametrize(
    "name", ["stream", *(pytest.param(n, marks=pytest.mark.slow) for n in STREAMS[1:])]
)
def test_batches_of_a_stream_grow_over_all_epochs(tmp_path: Path, name: str) -> None:
    Fit(tmp_path, lambda: Loads(name, tmp_path)).run()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    first = torch.sort(ROWS[:, 0]).values.tolist()
    epochs: list[list[float]] = [[]]
    for n, batch in enumerate(rows):
        if len(epochs[-1]) == 24:
            epochs.append([])
        assert len(batch) == size(n) or len(epochs[-1]) + size(n) > 24 - 2 * size(n)
        epochs[-1] += batch
    assert [sorted(epoch) for epoch in epochs] == [first] * 3
