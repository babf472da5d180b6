"""A pipeline under PipelineStrategy and on torch alone, step by step in turn, for benchmarks."""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.utils.data import DataLoader

from tests.helpers.ranks import ForkedRanks

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


class Logged(pl.LightningModule):
    """The user's side: nothing but a loss."""

    def __init__(self, net: nn.Sequential, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net, self.make_optimizer = net, make_optimizer

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = loss_of(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class RawPipeline:
    """torch.distributed.pipelining, as its documentation has it.

    Args:
        schedule: torch's name of the schedule.
        stages: All stages, of which this rank takes every ``pp``-th.
        rank: This rank.
        pp: Number of ranks.
        num_microbatches: Of each batch.
        make_optimizer: Of parameters.
    """

    def __init__(
        self,
        schedule: str,
        stages: Sequence[nn.Module],
        rank: int,
        pp: int,
        num_microbatches: int,
        make_optimizer: MakeOptimizer,
    ) -> None:
        mine = [
            PipelineStage(stages[index], index, len(stages), torch.device("cpu"))
            for index in range(rank, len(stages), pp)
        ]
        self.is_first, self.is_last = rank == 0, rank == pp - 1
        self.schedule = get_schedule_class(schedule)(
            mine if len(mine) > 1 else mine[0], num_microbatches, loss_fn=loss_of
        )
        self.optimizer = make_optimizer([p for stage in mine for p in stage.submod.parameters()])

    def step(self, batch: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        inputs = [batch[0]] if self.is_first else []
        target = batch[1] if self.is_last else None
        losses: list[Tensor] = []
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        self.optimizer.step()


class Alternate(pl.Callback):
    """After each step of Lightning's loop, one of torch's; seconds of both, and of CPU time."""

    def __init__(self, raw: RawPipeline) -> None:
        self.raw = raw
        self.pairs: list[tuple[float, float]] = []
        self.cpu: list[tuple[float, float]] = []
        self.started = self.cpu_started = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        distributed.barrier()
        now = time.perf_counter()
        ours, cpu = now - self.started, time.process_time()
        with torch._C.DisableTorchFunction():  # not as a hook of ours, which is looked at
            self.raw.step(args[3])
        distributed.barrier()
        self.pairs.append((ours, time.perf_counter() - now))
        self.cpu.append((cpu - self.cpu_started, time.process_time() - cpu))
        self.started, self.cpu_started = time.perf_counter(), time.process_time()


def fit(
    module: pl.LightningModule, strategy: Any, rank: int, pp: int, batches: Any, *callbacks: Any
) -> None:
    """Train on the ranks that are there, with nothing else on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=pp,
        strategy=strategy,
        plugins=[ForkedRanks(rank, pp)],
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
