"""How processes are started, and how they come to draw the same."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_align import PipelineStrategy
from lightning_align._compat.lightning_processes import ScriptLauncher
from lightning_align.strategies import failure
from lightning_align.strategies.launching import agree_on_generators, join_ranks, launcher
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_other_generators_become_those_of_rank_0() -> None:
    def agree(rank: int) -> tuple[float, float, float]:
        seeded(5 + rank)
        agree_on_generators(CPU)
        return draws()

    one, other = run_ranks(agree)
    assert one == other
    seeded(5)
    assert one == draws()


def test_generators_of_one_seed_are_left_where_they_are() -> None:
    """They may have drawn already: to begin anew would repeat it."""

    def agree(_: int) -> tuple[Any, Any]:
        seeded(5)
        first = draws()
        agree_on_generators(CPU)
        return first, draws()

    seeded(5)
    assert run_ranks(agree) == [(draws(), draws())] * 2


def test_ranks_are_counted_over_machines() -> None:
    """The second process of the second machine, with two on each."""

    class Environment(LightningEnvironment):
        def set_global_rank(self, rank: int) -> None:
            counted.append(("rank", rank))

        def set_world_size(self, size: int) -> None:
            counted.append(("world", size))

    counted: list[tuple[str, int]] = []
    fields = {"num_processes": 2, "num_nodes": 2, "node_rank": 1, "local_rank": 1}
    strategy = SimpleNamespace(cluster_environment=Environment(), global_rank=3, **fields)

    def join(_: int) -> tuple[Any, int]:
        join_ranks(strategy)
        return counted, rank_zero_only.rank

    strategy.root_device, strategy.process_group_backend, strategy.timeout = CPU, None, None
    assert run_ranks(join, 1) == [([("rank", 3), ("world", 4)], 3)]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_processes_are_forked_or_spawned_by_lightning(start_method: str) -> None:
    ours = launcher(PipelineStrategy(start_method=start_method))
    assert ours._start_method == start_method


def test_a_script_ends_on_all_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(failure, "end_together", ended.append)
    environment = SimpleNamespace(creates_processes_externally=True)
    fields = {"start_method": "popen", "num_processes": 2, "num_nodes": 1, "global_rank": 1}
    ours = launcher(SimpleNamespace(cluster_environment=environment, **fields))
    assert isinstance(ours, ScriptLauncher)
    assert ours.launch(lambda: "result") == "result"
    assert ended == [1]
