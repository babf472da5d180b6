"""What every test is given and gives back."""

import gc
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader

# Lightning gives a forked process as many threads as there are cores, unless this says otherwise;
# with another number of threads sums are rounded in another order.
os.environ["OMP_NUM_THREADS"] = "1"
# Forking after a multi-threaded backward hangs; after a single-threaded one it does not.
torch.set_num_threads(1)
# A drawn example may take as long as a busy machine makes it take.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Exempt what has been imported from garbage collection.

    Each full collection would look at all of it, a second long, and a forked process would copy
    what it looks at.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_run_of_wandb_outlives_its_test() -> Iterator[None]:
    """A WandbLogger goes on with whatever run is open in the process."""
    yield
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        wandb.finish()


@pytest.fixture(autouse=True)
def _no_test_leaves_its_environment() -> Iterator[None]:
    """Runs set MASTER_PORT and LOCAL_RANK: a script that a later test starts would wait there."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # that a fixture of the module has left, which trains
    before = dict(os.environ)
    yield
    for name in {*os.environ, *before} - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(autouse=True)
def _no_test_leaves_a_process_group() -> Iterator[None]:
    """Lightning leaves the one of a run, and a process that is forked later could make no other."""
    yield
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _no_test_leaves_loaders_that_are_watched() -> Iterator[None]:
    """Lightning notes how loaders are made in a hook, for ever if the hook raises."""
    yield
    for cls in (DataLoader, *DataLoader.__subclasses__()):
        for name in ("__init__", "__setattr__", "__delattr__"):
            if (saved := f"__old{name}") in vars(cls):
                setattr(cls, name, vars(cls)[saved])
                delattr(cls, saved)
