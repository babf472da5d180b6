"""Rows of text in the loggers that take them, read back from what they wrote."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_align.reports.texts import log_rows
from tests.helpers.wandb_reader import read_wandb_run

ROWS = [
    {"step": 3, "prompt": "It is", "text": " a “truth”\n# no heading"},
    {"step": 3, "prompt": "She", "text": " *said*"},
]


def log(root: Any, *loggers: Any, **options: Any) -> list[str]:
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=root, logger=list(loggers), barebones=False, **options
    )
    return log_rows(trainer, "samples", ROWS, filename="samples.jsonl")


@pytest.mark.parametrize("loggers", [[], [CSVLogger], ["dummy"]])
def test_file_gets_what_no_logger_takes(tmp_path: Path, loggers: Any) -> None:
    made = [DummyLogger() if kind == "dummy" else kind(tmp_path) for kind in loggers]
    path = tmp_path / "samples.jsonl"
    assert log(tmp_path, *made) == log(tmp_path, *made) == [str(path)]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ROWS * 2
    assert "“truth”" in lines[0]


def test_object_store_gets_whole_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores such as GCS cannot append."""
    store = MemoryFileSystem()
    appended = MemoryFileSystem.open

    def no_append(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        assert "a" not in mode
        return appended(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "open", no_append)
    assert log("memory://run") == log("memory://run") == ["memory://run/samples.jsonl"]
    lines = store.cat_file("/run/samples.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == ROWS * 2
    store.rm("/run", recursive=True)


def test_tensorboard_shows_text_as_it_is(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    assert log(tmp_path, logger) == ["TensorBoardLogger as 'samples'"]
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (event,) = events.Tensors("samples/text_summary")
    (text,) = event.tensor_proto.string_val
    assert "text\n\n     a “truth”\n    # no heading\n" in text.decode()
    assert "prompt\n\n    She\n\ntext\n\n     *said*" in text.decode()
    assert not (tmp_path / "samples.jsonl").exists()


def test_an_offline_wandb_run_holds_the_table(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path, project="test")
    assert log(tmp_path, logger) == ["WandbLogger as 'samples'"]
    (path,) = [path for path in read_wandb_run(tmp_path).media if path.suffix == ".json"]
    table = json.loads(path.read_text())
    assert table["columns"] == ["step", "prompt", "text"]
    assert table["data"] == [list(row.values()) for row in ROWS]
