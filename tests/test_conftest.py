"""What every test is given and gives back."""

import os

import lightning.pytorch as pl


def test_runs_set_an_environment() -> None:
    pl.seed_everything(3)
    os.environ["MASTER_PORT"] = "1"
    os.environ.pop("OMP_NUM_THREADS")


def test_the_next_test_finds_none_of_it() -> None:
    assert "MASTER_PORT" not in os.environ
    assert "PL_GLOBAL_SEED" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == "1"
