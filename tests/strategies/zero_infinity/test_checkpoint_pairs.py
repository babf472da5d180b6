"""Every strategy reads what every other one has saved, bit for bit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import ExactResume, PipelineStrategy
from tests.helpers.offloaded import small
from tests.helpers.pipelines import Batches, Run
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.strategies.pipeline.test_checkpoints import SaveAt, equal

STEPS = 2


@dataclass(frozen=True)
class Kind:
    """A strategy, on so many ranks."""

    name: str
    ranks: int = 1
    folder: bool = False  # what it saves
    tile_numel: int | None = None

    def build(self, folder: Path) -> Any:
        if self.name == "zero_infinity":
            saved = {"save_distributed_checkpoint": self.folder, "tile_numel": self.tile_numel}
            return small(nvme_path=str(folder / "nvme"), overwrite=True, **saved)
        if self.name == "pipeline":
            schedule = {"schedule": "GPipe", "num_microbatches": 4}
            return PipelineStrategy(**schedule, save_distributed_checkpoint=self.folder)
        return self.name

    def run(self, model: str, folder: Path, rank: int, *callbacks: pl.Callback, **fit: Any) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        several = {"plugins": [ForkedRanks(rank, self.ranks)]} if self.name != "auto" else {}
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=self.ranks,
            strategy=self.build(folder),
            default_root_dir=folder,
            max_epochs=1,
            max_steps=STEPS + 1 if fit else STEPS,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[ExactResume(), *callbacks],
            **several,
        )
        module = Run(model).module()
        masked = model != "chain"
        batches = DataLoader(Batches(4 * STEPS, masked=masked), batch_size=None)
        trainer.fit(module, batches, **fit)

    def on_ranks(self, model: str, folder: Path, callback: Any, **fit: Any) -> None:
        run_ranks(lambda rank: self.run(model, folder, rank, callback, **fit), self.ranks)


class SaveAtStart(pl.Callback):
    """Saves what was read, before a step changes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


WRITERS = {
    "auto": Kind("auto"),
    "pipeline, folder": Kind("pipeline", 2, folder=True),
    "zero, folder": Kind("zero_infinity", folder=True),
    "zero, file": Kind("zero_infinity"),
}
READERS = {
    "auto": Kind("auto"),
    "ddp": Kind("ddp", 2),
    "pipeline, 1 rank": Kind("pipeline", 1),
    "pipeline, 2 ranks": Kind("pipeline", 2),
    "zero": Kind("zero_infinity"),
}
PAIRS = [
    *(("zero, folder", reader) for reader in READERS),
    *((writer, "zero") for writer in WRITERS if writer != "zero, folder"),
    ("zero, file", "pipeline, 2 ranks"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where a writer has saved, and what its own kind reads there."""

    @cache
    def write(model: str, name: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(f"{model} {name}".replace(", ", "_"))
        WRITERS[name].on_ranks(model, folder, SaveAt(STEPS, folder / "saved"))
        kind = WRITERS[name]
        itself = Kind(kind.name, kind.ranks)
        return folder / "saved", read(model, itself, folder, folder / "saved")

    return write


def read(model: str, kind: Kind, folder: Path, path: Path) -> Any:
    """What a strategy has after it has read a checkpoint, as one file."""
    kind.on_ranks(model, folder, SaveAtStart(folder / "found"), ckpt_path=path, weights_only=True)
    return torch.load(folder / "found", weights_only=True)


# One is tied, the other is not of ours.
@pytest.mark.parametrize("model", ["gpt2", pytest.param("chain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_what_one_saves_the_other_reads(written, tmp_path, model, writer, reader):
    path, expected = written(model, writer)
    assert path.is_dir() == ("folder" in writer)
    found = read(model, READERS[reader], tmp_path, path)
    assert expected["global_step"] == found["global_step"] == STEPS
    assert equal(found["state_dict"], expected["state_dict"])
    assert equal(found["optimizer_states"], expected["optimizer_states"])
    assert found["optimizer_states"][0]["state"][0]["exp_avg"].any()


@pytest.mark.slow
def test_a_folder_of_a_pipeline_is_not_read_into_tiles(written, tmp_path):
    path, _ = written("chain", "pipeline, folder")
    with pytest.raises(RuntimeError, match=r"weights are cut into tiles.*consolidate_checkpoint"):
        read("chain", Kind("zero_infinity", tile_numel=16), tmp_path, path)
