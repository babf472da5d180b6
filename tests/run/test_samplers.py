"""A PositionSampler in anybody's loader follows the run, or is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Sampler

from lightning_align.data.batch_sizes import BatchSizes
from lightning_align.data.curriculum_sampler import CurriculumSampler
from lightning_align.data.mixture_schedule import MixtureSchedule
from lightning_align.data.sampler import PositionSampler
from lightning_align.run.position import batches_consumed
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.resumable import (
    Fit,
    WithValidation,
    async_checkpoint,
    model_checkpoint,
    resumes,
)

ROWS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Reversed(Sampler[list[int]]):
    """Somebody's own wrapper."""

    def __init__(self, inner: PositionSampler) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[list[int]]:
        return ([*reversed(indices)] for indices in self.inner)


class OwnLoader:
    """Somebody's own loader."""

    def __init__(self, sampler: PositionSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (ROWS[indices] for indices in self.sampler)


def by(sampler: Any, **options: Any) -> Any:
    return DataLoader(ROWS, sampler=sampler, batch_size=None, **options)


class Loads(WithValidation):
    """Its batches come from one of several loaders; it notes which rows they are."""

    def __init__(self, loader: str) -> None:
        super().__init__()
        self.loader = loader
        self.first: list[float] = []

    def sampler(self, *, followed: bool = False, batch_size: int = 4) -> PositionSampler:
        trainer = self.trainer
        position = (lambda: batches_consumed(trainer)) if followed else None
        ranks = {"num_replicas": trainer.world_size, "rank": trainer.global_rank}
        return PositionSampler(24, batch_size, position=position, **ranks)

    def growing(self) -> PositionSampler:
        """Batches of 2, from the fifth on of 4, of corpora whose weights change in each."""
        size, rank = self.trainer.world_size, self.trainer.global_rank
        sizes = BatchSizes([(0, 2 // size), (5, 4 // size)])
        weights = MixtureSchedule([16, 8], [[3, 1], [1, 3]], [0, 12], interpolate=True)
        ranks = {"num_replicas": size, "rank": rank}
        return PositionSampler(24, 4 // size, batch_sizes=sizes, mixture=weights, **ranks)

    def easy_first(self) -> CurriculumSampler:
        """The rows in their order are easy before hard; three join at each of eight steps."""
        size, rank = self.trainer.world_size, self.trainer.global_rank
        linear = {"total_curriculum_step": 8, "difficulty_step": 3}
        pace = {"min_difficulty": 6, "max_difficulty": 24, "schedule_type": "fixed_linear"}
        scheduler = {**pace, "schedule_config": linear}
        return CurriculumSampler(
            [*range(1, 25)], scheduler, 4 // size, num_replicas=size, rank=rank
        )

    def train_dataloader(self) -> Any:
        plain = DataLoader(ROWS, batch_size=8, shuffle=True)
        return {
            "plain": lambda: by(self.sampler()),
            "growing": lambda: by(self.growing()),
            "easy first": lambda: by(self.easy_first(), num_workers=0),
            "easy first, workers": lambda: by(
                self.easy_first(), num_workers=2, multiprocessing_context="fork"
            ),
            "workers": lambda: by(self.sampler(), num_workers=1, multiprocessing_context="fork"),
            "wrapped": lambda: by(Reversed(self.sampler())),
            "wrapped, followed": lambda: by(Reversed(self.sampler(followed=True))),
            "own": lambda: OwnLoader(self.sampler()),
            "own, followed": lambda: OwnLoader(self.sampler(followed=True)),
            "fixed": lambda: by(PositionSampler(24, 4, position=lambda: 0)),
            "two": lambda: [by(self.sampler()), by(self.sampler(batch_size=8))],
            "shorter": lambda: CombinedLoader(
                [by(self.sampler()), by(self.sampler(batch_size=8))], "min_size"
            ),
            "mixed": lambda: [by(self.sampler()), plain],
            "mixed, followed": lambda: [by(self.sampler(followed=True)), plain],
        }[self.loader]()

    def val_dataloader(self) -> Any:
        return by(self.sampler())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        rows = torch.cat(batch) if isinstance(batch, list) else batch
        self.first.append(float(rows[0, 0]))
        return self.loss(rows)


LOADERS = [
    *("plain", "workers", "wrapped", "wrapped, followed", "own", "own, followed", "fixed"),
    *("two", "shorter", "mixed", "mixed, followed"),
]


FEW = ("plain", "wrapped, followed", "two", "mixed, followed")


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in LOADERS if n not in FEW)]
)
def test_a_sampler_of_ours_in_any_loader_is_resumed(tmp_path: Path, name: str) -> None:
    positions = (2, 4) if name == "shorter" else (2, 8)
    resumes(Fit(tmp_path, lambda: Loads(name), model_checkpoint), *positions)


def test_limited_epochs_and_async_checkpoints_are_resumed(tmp_path: Path) -> None:
    trainer = {"limit_train_batches": 4}
    resumes(Fit(tmp_path, lambda: Loads("two"), async_checkpoint, trainer=trainer), 2, 6)


def test_on_two_ranks_as_well(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        trainer = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        resumes(Fit(tmp_path, lambda: Loads("plain"), model_checkpoint, trainer=trainer), 2, 4)

    run_ranks(on)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("growing", (3, 9)),  # before the size changes, and at the end of the first pass
        pytest.param("growing", (5, 13), marks=pytest.mark.slow),
        ("easy first", (3, 8)),  # amid the levels, and behind the last
        pytest.param("easy first, workers", (1, 6), marks=pytest.mark.slow),
    ],
)
def test_what_changes_with_time_is_resumed(
    tmp_path: Path, name: str, positions: tuple[int, int]
) -> None:
    resumes(Fit(tmp_path, lambda: Loads(name), model_checkpoint), *positions)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["growing", "easy first"])
def test_what_changes_with_time_is_resumed_on_two_ranks(tmp_path: Path, name: str) -> None:
    def on(rank: int) -> None:
        trainer = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        resumes(Fit(tmp_path, lambda: Loads(name), model_checkpoint, trainer=trainer), 3, 8)

    run_ranks(on)


@pytest.mark.parametrize("name", ["plain", "wrapped", "own", "mixed"])
def test_no_two_epochs_have_the_same_order(tmp_path: Path, name: str) -> None:
    module = Loads(name)
    Fit(tmp_path, lambda: module).run()
    first, second, third = module.first[:6], module.first[6:12], module.first[12:]
    assert first != second != third != first


def test_the_same_rows_on_every_rank_are_refused(tmp_path: Path) -> None:
    class Alone(Loads):
        def train_dataloader(self) -> Any:
            return by(PositionSampler(24, 4))

    def on(rank: int) -> None:
        trainer = {"devices": 2, "strategy": "ddp", "plugins": [ForkedRanks(rank, 2)]}
        with pytest.raises(
            ValueError, match=r"PositionSampler\(num_replicas, rank=\(1, 0\)\): .*2"
        ):
            Fit(tmp_path, lambda: Alone("plain"), trainer=trainer).run()

    run_ranks(on)
