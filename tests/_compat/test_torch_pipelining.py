"""What we rely on in torch.distributed.pipelining, on the pinned version."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from lightning_align._compat import torch_pipelining
from lightning_align._compat.torch_pipelining import torch_pipeline_rank
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize("name", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_the_actions_of_a_rank_are_those_that_torch_runs(name: str) -> None:
    theirs = get_schedule_ops(name, 4, 8)
    for rank in range(4):
        flat = [
            str(part)
            for action in theirs[rank]
            if action is not None
            for part in (action.sub_actions or (action,))
        ]
        assert [str(action) for action in torch_pipeline_rank(name, rank, 4, 8, 2)] == flat


def test_lean_stage_holds_buffers_only_in_flight() -> None:
    """torch calls what it overrides: without that, buffers for all micro-batches would be there."""

    def run(rank: int) -> Any:
        inputs = torch.empty(2, 3, device="meta", requires_grad=True)
        stage = torch_pipelining.LeanStage(
            nn.Linear(3, 3),
            rank,
            2,
            torch.device("cpu"),
            lambda stage, microbatch: nullcontext(),
            input_args=(inputs,),
            output_args=(inputs,),
        )
        schedule = distributed.pipelining.ScheduleGPipe(
            stage, 4, loss_fn=lambda output, target: output.sum(), scale_grads=False
        )
        held: list[int] = []
        call = stage.forward_one_chunk

        def counting(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            infos = [info for infos in stage.args_recv_info.values() for info in infos]
            held.append(sum(info.buffer is not None for info in infos))
            return output

        stage.forward_one_chunk = counting  # type: ignore[method-assign]
        schedule.step(*([torch.ones(8, 3)] if rank == 0 else []), target=torch.zeros(8))
        infos = [
            info
            for kind in (stage.args_recv_info, stage.grad_recv_info)
            for infos in kind.values()
            for info in infos
        ]
        return held, sum(info.buffer is not None for info in infos)

    first, second = run_ranks(run)
    assert first == ([0] * 4, 0)
    assert second == ([1, 2, 3, 4], 0)
