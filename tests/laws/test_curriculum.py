"""Curriculum over all optimizers, data and strategies, killed and resumed, and with SpikeGuard."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_align import Curriculum, SpikeGuard
from tests.helpers.curriculum import by_length
from tests.laws.members import CALLBACKS, DATAMODULES, MODULES, OPTIMIZERS, STRATEGIES, Member
from tests.laws.runs import Outcome, Run, on_its_data
from tests.laws.test_resume import resumes
from tests.laws.test_strategies import equals_one_process

pytestmark = pytest.mark.slow  # `make test-laws` runs them

(MEMBER,) = [member for member in CALLBACKS if member.name == "Curriculum"]
TRUNCATES = replace(
    MEMBER,
    spec={
        **MEMBER.spec,
        "init_args": {
            **MEMBER.spec["init_args"],
            "length": {**MEMBER.spec["init_args"]["length"], "mode": "truncate"},
        },
    },
)
TEXT = [data for data in DATAMODULES if data.name.startswith("TextDataModule")]
Reference = Callable[[Run], Outcome]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_resumes_with_any_optimizer(
    optimizer: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    run = replace(on_its_data(MODULES[0]), callbacks=(MEMBER,), optimizer=optimizer, accumulate=2)
    resumes(run, tmp_path, material, reference(run), position=5)


@pytest.mark.parametrize("position", [2, 4, 5, 7, 9])
def test_resumes_inside_a_length_at_its_change_and_at_an_epochs_end(
    position: int, tmp_path: Path, material: Path, reference: Reference
) -> None:
    """Lengths 4, 8, 12 and 16 begin with batches 0, 2, 5 and 8; an epoch has 9."""
    run = replace(on_its_data(MODULES[0]), callbacks=(TRUNCATES,), accumulate=2)
    resumes(run, tmp_path, material, reference(run), position)


@pytest.mark.parametrize("data", TEXT, ids=str)
def test_resumes_on_any_text(
    data: Member, tmp_path: Path, material: Path, reference: Reference
) -> None:
    run = Run(MODULES[0], data, callbacks=(MEMBER,), accumulate=2)
    resumes(run, tmp_path, material, reference(run), position=5)


@pytest.mark.parametrize("data", TEXT[:2], ids=str)
@pytest.mark.parametrize("member", [MEMBER, TRUNCATES], ids=["reshape", "truncate"])
@pytest.mark.parametrize("name", ["ddp", "pipeline"])
def test_two_ranks_equal_one_process_through_changes_of_length(
    name: str,
    member: Member,
    data: Member,
    tmp_path: Path,
    material: Path,
    reference: Reference,
) -> None:
    (strategy,) = [strategy for strategy in STRATEGIES if strategy.name == name]
    run = Run(MODULES[0], data, callbacks=(member,))
    equals_one_process(run, strategy, tmp_path, material, reference)


class Summed(pl.LightningModule):
    """A loss that is a sum over the row: its level rises with the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.head(self.embedding(batch["input_ids"][:, :-1])).flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(logits, targets, reduction="sum") / len(batch["labels"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(32, (400, 8, 169), generator=generator)
        return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=None)


def alarms(curriculum: Curriculum) -> int:
    pl.seed_everything(1, verbose=False)
    guard = SpikeGuard("log", preview_tokens=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curriculum, guard],
    )
    trainer.fit(Summed())
    return len(guard.report.incidents)


def test_twenty_planned_changes_raise_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [8 * number for number in range(1, 22)]
    scheduler = {
        "min_difficulty": 8,
        "max_difficulty": 168,
        "schedule_type": "fixed_discrete",
        "schedule_config": {
            "difficulty": lengths,
            "max_step": [100 + 12 * number for number in range(20)],
        },
    }
    assert alarms(by_length(scheduler=scheduler)) == 0
    monkeypatch.setattr(Curriculum, "planned_change", lambda *_: None)
    assert alarms(by_length(scheduler=scheduler)) > 0
