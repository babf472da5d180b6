"""What snapshots take is said, and refused where it is not there."""

import logging
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from lightning_align.callbacks.spikes import memory
from lightning_align.callbacks.spikes.memory import MEMORY, available_memory, state_nbytes
from tests.helpers.spiky import Regression, batches
from tests.modules.test_pretrain import fit

PARAMETERS = 4 * 8 + 8 + 8 + 1
Usage = namedtuple("Usage", "free")


def trainer(module: Any = None, **options: Any) -> Any:
    return fit(module or Regression(), batches(1), **options)


def test_of_an_optimizer_with_a_state_it_counts_and_of_another_adamws_is_taken() -> None:
    module = Regression(optimizer=torch.optim.SGD)
    assert state_nbytes(trainer(module)) == {MEMORY: 3 * 4 * PARAMETERS}
    steps = 4 * 4  # a counter for each parameter
    assert state_nbytes(trainer()) == {MEMORY: 3 * 4 * PARAMETERS + steps}


def test_tied_weights_count_once_and_those_of_other_ranks_not_at_all() -> None:
    module = Regression(optimizer=torch.optim.SGD)
    module.tied = nn.Linear(4, 8)
    module.tied.weight = module.net[0].weight
    module.elsewhere = nn.Linear(1000, 1000, device="meta")
    found = state_nbytes(trainer(Regression(optimizer=torch.optim.SGD)))[MEMORY]
    built = trainer(Regression(optimizer=torch.optim.SGD))
    built.strategy._lightning_module = module
    assert state_nbytes(built)[MEMORY] == found + 8 * 4  # a bias


def test_memory_that_is_not_there_is_refused_by_its_bytes(monkeypatch: Any) -> None:
    ran = trainer()
    nbytes = state_nbytes(ran)[MEMORY]
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * nbytes)
    memory.check_room(ran, "SpikeGuard", 3)
    with pytest.raises(ValueError, match=rf"SpikeGuard\(snapshots=4\).*take {5 * nbytes:,} bytes"):
        memory.check_room(ran, "SpikeGuard", 4)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.check_room(ran, "SpikeGuard", 4)  # who does not know refuses nothing


def test_bytes_of_each_rank_are_said(caplog: Any) -> None:
    ran = trainer()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        memory.check_room(ran, "SpikeGuard", 3)
    assert (
        f"3 snapshot(s) are kept, each of about {state_nbytes(ran)[MEMORY]:,} bytes" in caplog.text
    )


def test_disk_that_is_not_there_is_refused_by_its_folder(monkeypatch: Any) -> None:
    ran = trainer()
    monkeypatch.setattr(memory, "state_nbytes", lambda _: {MEMORY: 0, "/drive": 10})
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: Usage(29))
    with pytest.raises(ValueError, match=r"take 30 bytes of /drive .*and 29 are left"):
        memory.check_room(ran, "SpikeGuard", 2)


def test_memory_of_this_machine_is_known_where_the_system_says_it() -> None:
    found = available_memory()
    assert found is None or found > 1 << 20
