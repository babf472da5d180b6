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
from tests.helpers.curriculum import by_length, linear
from tests.helpers.spiky import Told
from tests.laws.members import (
    CALLBACKS,
    DATAMODULES,
    MODULES,
    OPTIMIZERS,
    STRATEGIES,
    Member,
    build,
)
from tests.laws.runs import Outcome, Run, on_its_data, with_arguments
from tests.laws.test_resume import resumes
from tests.laws.test_rewind import guard
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


# Order, size and corpora of batches


def parts(material: Path, data: Member, **what: Any) -> Member:
    """A curriculum over the samples of some data, even numbers before odd ones."""
    folders = {"data": str(material), "run": ""}
    module = build(data.spec, folders)
    module.prepare_data()
    module.setup("fit")
    values = [1 + sample % 2 + sample // 8 for sample in range(len(module.train_dataset))]
    given: dict[str, Any] = {}
    if what.get("order"):
        most = max(values)
        levels = {"min_difficulty": 2, "max_difficulty": most, "schedule_type": "fixed_linear"}
        schedule = {"total_curriculum_step": 8, "difficulty_step": 1}
        given["order"] = {
            "difficulties": values,
            "scheduler": {**levels, "schedule_config": schedule},
        }
    if sizes := what.get("batch_size"):
        growing = {"difficulty": list(sizes), "max_step": [2, 5]}
        given["batch_size"] = {
            "scheduler": {
                "min_difficulty": sizes[0],
                "max_difficulty": sizes[-1],
                "schedule_type": "fixed_discrete",
                "schedule_config": growing,
            }
        }
    if what.get("mixture"):
        steps, weights = [0, 5], dict(zip(module.corpora, ([3, 1], [1, 3]), strict=True))
        given["mixture"] = {"steps": steps, "weights": weights, "interpolate": True}
    spec = {**MEMBER.spec, "init_args": {**given, "filename": None}}
    return replace(MEMBER, spec=spec, refuses={})


GROWING = (1, 2, 4)  # samples of a batch and rank
BY_NAME = {data.name: data for data in DATAMODULES}
STREAMS = {
    "order": ("TextDataModule", {"order": True}),
    "order of conversations": ("ConversationDataModule", {"order": True}),
    "order of pairs": ("PreferenceDataModule", {"order": True}),
    "order and size": (
        "TextDataModule, separate documents",
        {"order": True, "batch_size": GROWING},
    ),
    "mixture and size": ("TextDataModule, mixture", {"mixture": True, "batch_size": GROWING}),
}


@pytest.mark.parametrize("position", [4, 5])
@pytest.mark.parametrize("name", STREAMS)
def test_which_samples_come_resumes_inside_a_level_and_at_its_change(
    name: str, position: int, tmp_path: Path, material: Path, reference: Reference
) -> None:
    """Batch sizes 1, 2 and 4 begin with batches 0, 2 and 5; so do levels of difficulty, nearly."""
    named, what = STREAMS[name]
    data = BY_NAME[named]
    module = next(module for module in MODULES if module.batches == data.batches)
    member = parts(material, data, **what)
    run = Run(module, data, callbacks=(member,), accumulate=2)
    resumes(run, tmp_path, material, reference(run), position)


def test_workers_run_ahead_of_a_change_of_level(
    tmp_path: Path, material: Path, reference: Reference
) -> None:
    data = BY_NAME["TextDataModule"]
    member = parts(material, data, order=True, batch_size=GROWING)
    ahead = replace(data, spec=with_arguments(data.spec, num_workers=2))
    run = Run(MODULES[0], data, callbacks=(member,))
    resumes(replace(run, data=ahead), tmp_path, material, reference(run), position=4)


def test_two_ranks_have_the_order_of_one(
    tmp_path: Path, material: Path, reference: Reference
) -> None:
    (ddp,) = [strategy for strategy in STRATEGIES if strategy.name == "ddp"]
    data = BY_NAME["TextDataModule"]
    run = Run(MODULES[0], data, callbacks=(parts(material, data, order=True),))
    equals_one_process(run, ddp, tmp_path, material, reference)


def test_two_ranks_have_the_growth_and_the_corpora_of_one(tmp_path: Path, material: Path) -> None:
    """Batches of 2, 4 and 8 samples over all ranks, of corpora whose weights change in each."""
    (ddp,) = [strategy for strategy in STRATEGIES if strategy.name == "ddp"]
    data = BY_NAME["TextDataModule, mixture"]

    def losses(name: str, ranks: int, **options: Any) -> tuple[dict[int, float], ...]:
        sizes = [2 * size // ranks for size in GROWING]
        member = parts(material, data, mixture=True, batch_size=sizes)
        run = Run(MODULES[0], data, (member,), batch_size=sizes[-1], dropout=False, **options)
        (tmp_path / name).mkdir()
        return run.fit(tmp_path / name, material).losses

    (expected,) = losses("one", 1)
    first, second = losses("two", 2, strategy=ddp, devices=2)
    assert len(expected) > 6
    # fp32 sums over some hundred tokens in another order; each rank has its part of the sum
    assert {n: first[n] + second[n] for n in first} == pytest.approx(expected, rel=1e-5)


IN_BUCKETS = replace(
    MEMBER,
    spec={
        **MEMBER.spec,
        "init_args": {
            "length": {
                "mode": "bucket",
                "least": 4,
                "scheduler": linear(total=6, least=4, most=16, each=4),
            },
            "filename": None,
        },
    },
    refuses={},
)


@pytest.mark.parametrize("parted", ["order and size", "buckets"])
def test_a_rewind_lands_on_the_same_batches(parted: str, tmp_path: Path, material: Path) -> None:
    if parted == "buckets":
        data, member = BY_NAME["TextDataModule, separate documents"], IN_BUCKETS
    else:
        data = BY_NAME["TextDataModule"]
        member = parts(material, data, order=True, batch_size=GROWING)
    run = Run(MODULES[0], data, callbacks=(member,))

    def outcome(name: str, told: Told, guarding: SpikeGuard) -> Outcome:
        (tmp_path / name).mkdir()
        return run.fit(tmp_path / name, material, extra=[guarding, told])

    notes = Told()
    ours = outcome("ours", notes, guard(5, back=3))
    assert notes.ranges
    assert ours == outcome("theirs", Told(notes.ranges), guard(back=3))


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


def alarms(curriculum: Curriculum, module: Any = None, max_steps: int = 400, **options: Any) -> int:
    pl.seed_everything(1, verbose=False)
    guard = SpikeGuard("log", preview_tokens=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curriculum, guard],
    )
    trainer.fit(module or Summed(), **options)
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


def test_buckets_that_take_turns_raise_no_alarm(material: Path) -> None:
    """Batches of several lengths in turn, the longest of which grow at steps 100 and 140."""
    scheduler = {
        "min_difficulty": 4,
        "max_difficulty": 16,
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [4, 8, 16], "max_step": [100, 140]},
    }
    length = {"mode": "bucket", "least": 4, "scheduler": scheduler}
    curriculum = Curriculum(length=length, preflight=False, filename=None)
    folders = {"data": str(material), "run": ""}
    data = build(BY_NAME["TextDataModule, separate documents"].spec, folders)
    module = build(MODULES[0].spec, folders)
    assert alarms(curriculum, module, max_steps=200, datamodule=data) == 0
