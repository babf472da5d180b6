"""What a Curriculum orders must be what the training loader draws."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_align.callbacks.curriculum import checks
from lightning_align.data.sampler import PositionSampler

ROWS = list(range(8))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(ROWS)


class Pairs(BatchSampler):
    """Somebody's own."""


def run(monkeypatch: pytest.MonkeyPatch, loader: Any, sampler: Any = None) -> None:
    loaders = SimpleNamespace(flattened=[loader])
    monkeypatch.setattr(checks, "train_loaders", lambda trainer: loaders)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(train_sampler=sampler, position=0))
    checks.check_orders(trainer, ["order"])


def test_the_datamodules_own_sampler_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = PositionSampler(8, 2)
    run(monkeypatch, DataLoader(ROWS, sampler=sampler, batch_size=None), sampler)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream()), "a stream has no indices: what comes next is its own"),
        (
            lambda: DataLoader(ROWS, batch_sampler=Pairs(SequentialSampler(ROWS), 2, False)),
            "its batch_sampler, Pairs, has the say in what is in a batch",
        ),
        (lambda: DataLoader(ROWS, 2, shuffle=True), "its sampler, RandomSampler, is not the"),
        (lambda: [1, 2], "list does not draw from the datamodule's sampler"),
    ],
)
def test_others_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, loader: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"Curriculum\(order='train_dataloader: .*{message}"):
        run(monkeypatch, loader(), PositionSampler(8, 2))


def test_nothing_is_asked_of_a_curriculum_that_orders_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks.check_orders(SimpleNamespace(), [])  # type: ignore[arg-type]
