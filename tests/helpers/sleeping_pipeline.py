"""A real pipeline of torch's whose stages sleep: waiting can be measured on a busy machine."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from lightning_align.pipelining import Event
from tests.helpers.ranks import run_ranks

Log = list[tuple[str, int, float, float]]  # kind, stage, start, end


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BD: Tensor, stage: "SleepingStage") -> Tensor:
        ctx.stage = stage
        stage.sleep("F", stage.forward_s)
        return x_BD.clone()

    @staticmethod
    def backward(ctx, gradient_BD: Tensor) -> tuple[Tensor, None]:
        ctx.stage.sleep("B", ctx.stage.backward_s)
        return gradient_BD.clone(), None


class SleepingStage(nn.Module):
    """Sleeps in its forward and in its backward, and notes when."""

    def __init__(self, stage_index: int, forward_s: float, backward_s: float, log: Log) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.stage_index, self.log = stage_index, log
        self.forward_s, self.backward_s = forward_s, backward_s

    def sleep(self, kind: str, seconds: float) -> None:
        start = time.monotonic()  # one clock for all processes of a machine
        time.sleep(seconds)
        self.log.append((kind, self.stage_index, start, time.monotonic()))

    def forward(self, x_BD: Tensor) -> Tensor:
        return _Sleep.apply(x_BD * self.weight, self)


def sleeping_steps(
    schedule: str,
    pp: int,
    num_microbatches: int,
    num_stages_per_rank: int = 1,
    *,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    steps: int = 1,
) -> list[list[Event]]:
    """Timelines of ``steps`` steps of torch's own schedule on ``pp`` gloo ranks, sorted by rank."""

    def run(rank: int) -> list[Log]:
        log: Log = []
        stages = [
            PipelineStage(
                SleepingStage(index, forward_s[index], backward_s[index], log),
                index,
                pp * num_stages_per_rank,
                torch.device("cpu"),
            )
            for index in range(rank, pp * num_stages_per_rank, pp)
        ]
        of_torch = get_schedule_class(schedule)
        many = issubclass(of_torch, PipelineScheduleMulti)
        runtime = of_torch(
            stages if many else stages[0],
            num_microbatches,
            loss_fn=lambda output, target: (output - target).pow(2).mean(),
            scale_grads=False,
        )
        inputs = (torch.ones(num_microbatches, 1, requires_grad=True),) if rank == 0 else ()
        logs = []
        for _ in range(1 + steps):  # the first one also infers shapes
            distributed.barrier()
            log.clear()
            runtime.step(*inputs, target=torch.zeros(num_microbatches, 1))
            logs.append(list(log))
        return logs[1:]

    of_ranks = run_ranks(run, pp, timeout_s=120.0)
    return [
        [event for rank in range(pp) for event in _numbered(rank, of_ranks[rank][step])]
        for step in range(steps)
    ]


def _numbered(rank: int, log: Log) -> list[Event]:
    """Microbatches go through a stage in the order of their numbers, in these schedules."""
    seen: dict[tuple[str, int], int] = {}
    events = []
    for kind, stage, start, end in log:
        microbatch = seen.get((kind, stage), 0)
        seen[kind, stage] = microbatch + 1
        events.append(Event(rank, kind, stage, microbatch, start, end))
    return events


def step_time(events: list[Event]) -> float:
    """From the first action of any rank to the end of the last one, in seconds."""
    return max(event.end_s for event in events) - min(event.start_s for event in events)
