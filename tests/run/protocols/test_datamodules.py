"""Questions of a run's datamodule, and the answer of one that knows nothing of us."""

from typing import Any

import lightning.pytorch as pl

import lightning_align as la
from lightning_align.run.protocols import (
    began_elsewhere,
    seed_of,
    separates_documents,
    tokenizer_of,
)
from tests.helpers.answers import text, trainer_of


def test_a_run_without_a_datamodule_and_one_that_knows_nothing() -> None:
    for trainer in (trainer_of(), trainer_of(datamodule=pl.LightningDataModule())):
        assert tokenizer_of(trainer) is None
        assert seed_of(trainer) is None
        assert not separates_documents(trainer)
        assert not began_elsewhere(trainer)
    assert tokenizer_of(None) is None


def test_a_run_with_a_datamodule_of_ours() -> None:
    data: Any = text()
    trainer = trainer_of(datamodule=data)
    assert tokenizer_of(trainer) is data.tokenizer
    assert seed_of(trainer) == data.seed == 0
    assert not separates_documents(trainer)
    data.separate_documents = True
    assert separates_documents(trainer)
    assert not began_elsewhere(trainer)  # there is no loader yet
    data.train_sampler = la.data.PositionSampler(4, 1, position=lambda: data.position)
    assert not began_elsewhere(trainer)  # it was not begun
    iter(data.train_sampler)
    assert not began_elsewhere(trainer)
    data.skipped = 2
    assert began_elsewhere(trainer)
