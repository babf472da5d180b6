import json
from pathlib import Path

import lightning.pytorch as pl
import torch


class Recorder(pl.LightningModule):
    """Learns nothing, and writes down the first column and the labels of every batch it is given.

    Tests number the first token of every sample, so that the column tells which samples they were.
    """

    def __init__(self, folder, key="input_ids"):
        super().__init__()
        self.folder = Path(folder)
        self.key = key
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def _record(self, name, batch):
        first = batch[self.key][:, 0].tolist()
        learns = (batch["labels"] != -100).any(1).tolist() if "labels" in batch else None
        with (self.folder / f"{name}-{self.global_rank}.jsonl").open("a") as stream:
            stream.write(json.dumps({"samples": first, "learns": learns}) + "\n")
        return self.weight * 1.0

    def training_step(self, batch, batch_idx):
        return self._record("train", batch)

    def validation_step(self, batch, batch_idx):
        self._record("val", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recorded(folder, name, rank=0):
    path = Path(folder) / f"{name}-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(folder, name, rank=0):
    return [record["samples"] for record in recorded(folder, name, rank)]


def trainer(folder, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": folder,
            **options,
        }
    )
