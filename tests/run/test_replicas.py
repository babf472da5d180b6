"""Replicas are not ranks: what a strategy says of its own counts."""

import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_align.run.replicas import (
    added_up,
    is_spread,
    replica,
    scale_gradients,
    total_grad_norm,
)
from lightning_align.strategies.pipeline.strategy import PipelineStrategy
from tests.helpers.ranks import run_ranks


def one_process() -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_one_process_is_the_only_replica() -> None:
    assert replica(one_process()) == (1, 0)


def test_ranks_of_ddp_are_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # the environment sets it
    environment = LightningEnvironment()
    environment.set_global_rank(3)
    cpus = [torch.device("cpu")] * 2
    strategy = DDPStrategy(parallel_devices=cpus, cluster_environment=environment)
    strategy.num_nodes = 2
    trainer: Any = SimpleNamespace(distributed_sampler_kwargs=strategy.distributed_sampler_kwargs)
    assert replica(trainer) == (4, 3)


def test_ranks_of_a_pipeline_are_one_replica() -> None:
    strategy = object.__new__(PipelineStrategy)
    trainer: Any = SimpleNamespace(distributed_sampler_kwargs=strategy.distributed_sampler_kwargs)
    assert replica(trainer) == (1, 0)


def test_the_norm_is_over_all_gradients_that_there_are() -> None:
    module = nn.ParameterList([torch.zeros(2), torch.zeros(1, 1), torch.zeros(5)])
    trainer = one_process()
    assert total_grad_norm(trainer, module) == 0
    module[0].grad, module[1].grad = torch.tensor([1.0, 2.0]), torch.tensor([[2.0]])
    assert total_grad_norm(trainer, module) == 3
    module[1].grad = torch.tensor([[math.nan]])
    assert total_grad_norm(trainer, module).isnan()


def test_rows_of_a_sparse_gradient_that_occur_twice_are_added() -> None:
    """1 + 2 in one row and 4 in another: a norm of 5."""
    module = nn.Embedding(4, 1, sparse=True)
    (module(torch.tensor([1, 1, 3])).flatten() * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    trainer = one_process()
    assert total_grad_norm(trainer, module) == 5
    scale_gradients(trainer, module, torch.tensor(0.5))
    assert total_grad_norm(trainer, module) == 2.5


def test_a_strategy_that_spreads_the_model_says_the_norm_itself() -> None:
    class Spreads:
        def total_grad_norm(self) -> torch.Tensor:
            return torch.tensor(7.0)

    trainer: Any = SimpleNamespace(strategy=Spreads())
    assert total_grad_norm(trainer, nn.Linear(1, 1)) == 7


def test_a_sum_over_ranks_waits_for_no_barrier(monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a barrier")

    def on_a_rank(rank: int) -> list[float]:
        with monkeypatch.context() as patched:
            patched.setattr(torch.distributed, "barrier", refuse)
            return list(added_up(torch.tensor([1.0, float(rank)])).tolist())

    assert run_ranks(on_a_rank, world_size=3) == [[3.0, 3.0]] * 3


def test_a_model_is_spread_if_any_parameter_is_elsewhere() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert not is_spread(module)
    module[1].bias = nn.Parameter(torch.empty(2, device="meta"))
    assert is_spread(module)
    assert not is_spread(module[0])
    module[0].register_buffer("later", torch.empty(2, device="meta"))
    assert not is_spread(module[0])
