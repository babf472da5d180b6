"""litdata's streams, which have no indices: lengths and sizes of batches, and resuming."""

from pathlib import Path
from typing import Any

import litdata
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align.data.streams import StreamBatches
from tests.helpers.resumable import Fit, Plain, model_checkpoint, resumes

pytestmark = pytest.mark.peer


def row(index: int) -> torch.Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(index))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 rows in chunks of 5."""
    folder = tmp_path_factory.mktemp("litdata")
    writer = litdata.streaming.writer.BinaryWriter(str(folder), chunk_size=5)
    for index in range(24):
        writer.add_item(index, row(index))
    writer.done()
    writer.merge()
    return str(folder)


class Loads(Plain):
    def __init__(self, folder: str, loader: str) -> None:
        super().__init__()
        self.folder, self.loader = folder, loader

    def train_dataloader(self) -> Any:
        stream = litdata.StreamingDataset(self.folder, shuffle=True, seed=3)
        if self.loader == "growing":
            return DataLoader(StreamBatches(stream, lambda n: 2 + n // 3), batch_size=None)
        return litdata.StreamingDataLoader(stream, batch_size=4, num_workers=0)


def test_a_run_is_resumed_in_the_epoch_by_the_state_of_its_loader(
    tmp_path: Path, folder: str
) -> None:
    """In that epoch: litdata takes the next one for the rest of it, unless it is told of its end,

    and where a loader has a length Lightning asks for no more than that.
    """
    trainer = {"max_epochs": 1}
    resumes(
        Fit(tmp_path, lambda: Loads(folder, "its own"), model_checkpoint, trainer=trainer), 2, 4
    )


def test_a_run_with_growing_batches_is_resumed_from_any_batch(tmp_path: Path, folder: str) -> None:
    resumes(Fit(tmp_path, lambda: Loads(folder, "growing"), model_checkpoint), 2, 7)


def test_batches_grow(folder: str) -> None:
    stream = litdata.StreamingDataset(folder, shuffle=False)
    batches = [*StreamBatches(stream, lambda n: n + 1)]
    assert [len(batch) for batch in batches] == [1, 2, 3, 4, 5, 6, 3]
    assert torch.equal(torch.cat(batches), torch.stack([row(index) for index in range(24)]))
