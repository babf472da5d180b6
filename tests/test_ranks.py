"""The helper that forks ranks tells how they end."""

import os
import signal
import time

import pytest
import torch
from torch import distributed

from tests.helpers.ranks import end_of_ranks, run_ranks


def test_ranks_are_one_group_and_return_by_rank() -> None:
    def total(rank: int) -> tuple[int, torch.Tensor]:
        value = torch.tensor([float(rank + 1)])
        distributed.all_reduce(value)
        return rank, value

    assert run_ranks(total, 3) == [(rank, torch.tensor([6.0])) for rank in range(3)]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_traceback_of_the_failing_rank_is_raised(failing: int) -> None:
    def fail(rank: int) -> None:
        if rank == failing:
            raise KeyError("the cause")
        time.sleep(30)

    with pytest.raises(RuntimeError, match="the cause") as caught:
        run_ranks(fail, timeout_s=20, grace_s=0.2)
    assert str(caught.value).index("the cause") < str(caught.value).index(f"rank {1 - failing}:")


def test_stuck_and_killed_ranks_end() -> None:
    def stick(rank: int) -> None:
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    stuck, killed = end_of_ranks(stick, timeout_s=1, group=False)
    assert stuck.stuck
    assert (killed.exit_code, killed.stuck) == (-signal.SIGKILL, False)
    assert stuck.seconds < 5
