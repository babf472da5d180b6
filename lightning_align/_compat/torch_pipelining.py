"""Private APIs of torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from typing_extensions import override


def torch_pipeline_rank(
    schedule: str, rank: int, pp: int, num_microbatches: int, num_stages_per_rank: int
) -> list[Any]:
    """The actions that torch's schedule class makes for one rank, without stages or processes.

    ``get_schedule_ops`` answers the same question, but it also plans the communication of all
    ranks, which takes a second for 32 of them and grows with the square.
    """
    maker = object.__new__(schedules.get_schedule_class(schedule))
    rounds = max(1, num_microbatches // pp)
    maker.__dict__.update(
        pp_group_size=pp,
        n_local_stages=num_stages_per_rank,
        num_stages=pp * num_stages_per_rank,
        number_of_rounds=rounds,
        microbatches_per_round=num_microbatches // rounds,
        _n_microbatches=num_microbatches,
    )
    actions = maker._calculate_single_rank_operations(rank)
    # An overlapped forward and backward is a pair of actions under one that has no number.
    return [
        part
        for action in actions
        if action is not None
        for part in (action.sub_actions or (action,))
    ]


class LeanStage(PipelineStage):
    """torch's stage, with a receive buffer only while its micro-batch is in flight.

    torch allocates buffers for all micro-batches at once: memory that grows with their number even
    under 1F1B.

    Args:
        submodule: What the stage runs.
        stage_index: Place in the chain of stages, counted from 0.
        num_stages: Stages in all.
        device: Where it runs.
        around_backward: Makes the context for the backward of a micro-batch.
        **metadata: ``input_args``, ``output_args`` and ``group`` of torch's stage.
    """

    def __init__(
        self,
        submodule: nn.Module,
        stage_index: int,
        num_stages: int,
        device: torch.device,
        around_backward: Callable[[int, int], AbstractContextManager[None]],
        **metadata: Any,
    ) -> None:
        super().__init__(submodule, stage_index, num_stages, device, **metadata)
        self.around_backward = around_backward

    def prepare_forward(self, num_microbatches: int) -> None:
        """Be ready for ``forward_one_chunk`` without a schedule; shapes must have been given."""
        self._stage_meta.inputs = self._user_meta.inputs
        self._stage_meta.outputs = self._user_meta.outputs
        self._setup_forward_recv_info(num_microbatches, False)
        self._setup_forward_send_info()

    def free_forward(self, chunk_id: int) -> None:
        """Forget a micro-batch that no backward will follow."""
        self.fwd_cache.pop(chunk_id, None)
        _free(self.args_recv_info[chunk_id])

    @override
    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    @override
    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    @override
    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.around_backward(self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _free(self.args_recv_info[bwd_chunk_id])
        _free(self.grad_recv_info.get(bwd_chunk_id, ()))

    @override
    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        for infos in self.args_recv_info.values():
            _free(infos)

    @override
    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        for infos in self.grad_recv_info.values():
            _free(infos)

    def _allocate(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if not info.is_root_arg and info.buffer is None and info.tensor_meta is not None:
                meta = info.tensor_meta
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)


def _free(infos: Iterable[Any]) -> None:
    for info in infos:
        info.buffer = None


def load_schedule_csv(
    path: str, stages: list[Any], num_microbatches: int, loss_fn: Callable[..., Any]
) -> Any:
    """Torch's runtime for the actions of a CSV file."""
    make: Any = schedules._PipelineScheduleRuntime
    schedule = make(stages, num_microbatches, loss_fn=loss_fn, scale_grads=False)
    schedule._load_csv(path)
    return schedule
