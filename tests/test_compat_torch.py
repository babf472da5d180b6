"""What we rely on in private APIs of torch, on the pinned version."""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from lightning_align._compat_torch import BeforeDraws, torch_pipeline_rank


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


def test_every_draw_into_a_tensor_is_announced_and_nothing_else() -> None:
    weight, seen = nn.Parameter(torch.empty(4, 4)), []
    with torch.no_grad(), BeforeDraws(lambda tensor: seen.append(tensor.data_ptr())):
        nn.init.kaiming_uniform_(weight)
        weight.zero_()
        weight[1:].normal_()
        nn.init.trunc_normal_(weight)
    row = weight.stride(0) * weight.element_size()
    assert seen == [weight.data_ptr(), weight.data_ptr() + row, weight.data_ptr()]
