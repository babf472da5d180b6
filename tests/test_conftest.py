"""What every test is given and gives back."""

import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]


def test_runs_set_an_environment() -> None:
    pl.seed_everything(3)
    os.environ["MASTER_PORT"] = "1"
    os.environ.pop("OMP_NUM_THREADS")


def test_the_next_test_finds_none_of_it() -> None:
    assert "MASTER_PORT" not in os.environ
    assert "PL_GLOBAL_SEED" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.fixture(scope="module")
def _trained() -> None:
    """As fixtures do that train once for the tests of a file: it is set up before all others."""
    pl.seed_everything(3)


@pytest.mark.usefixtures("_trained")
def test_a_fixture_of_the_module_leaves_no_seed() -> None:
    assert "PL_GLOBAL_SEED" not in os.environ


class Refusing(BoringModel):
    def train_dataloader(self) -> DataLoader[object]:
        raise ValueError("no data")


def test_lightning_watches_loaders_for_ever_once_a_hook_has_raised() -> None:
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="no data"):
        trainer.fit(Refusing())
    assert hasattr(DataLoader.__init__, "__wrapped__")


def test_the_next_test_has_loaders_that_nobody_watches() -> None:
    assert not hasattr(DataLoader.__init__, "__wrapped__")
    assert not [name for name in vars(DataLoader) if name.startswith("__old__")]
