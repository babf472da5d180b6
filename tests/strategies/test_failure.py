"""The cause of a failure reaches every rank, also past the end of the rank that knew it."""

import os
import socket
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import distributed

from lightning_align.strategies import failure
from tests.helpers.covers import cover
from tests.helpers.pipelines import Run
from tests.helpers.ranks import end_of_ranks, run_ranks

RUN = Run("chain", {"schedule": "1F1B", "num_microbatches": 4}, steps=2, data={"masked": False})
HOOKS_OF_THE_END = ["on_train_end", "on_fit_end", "teardown"]


class FailIn(pl.Callback):
    """Fails on one rank in a hook that no collective operation follows."""

    def __init__(self, rank: int, hook: str) -> None:
        def fail(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_rank == rank:
                raise OSError("disk full")

        setattr(self, hook, fail)


@cover(hook=HOOKS_OF_THE_END, failing=[0, 1])
def test_a_rank_that_fails_after_its_last_step_fails_the_run(hook: str, failing: int) -> None:
    run = replace(RUN, callbacks=[lambda: FailIn(failing, hook)])
    ended = end_of_ranks(lambda rank: run.fit(rank), timeout_s=60)
    assert [end.exit_code for end in ended] == [1, 1]
    told = f"rank {1 - failing}, at the end of the run has lost its peer. The failure was at rank"
    assert f"{told} {failing}, between steps: OSError: disk full" in ended[1 - failing].error


def tcp_group(rank: int, port: int) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    failure.keep_second_store("127.0.0.1", num_nodes=1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_cause_outlives_the_rank_that_held_the_store(failing: int) -> None:
    port = free_port()

    def run(rank: int) -> None:
        tcp_group(rank, port)
        distributed.barrier()
        if rank == failing:
            failure.pipeline_error(f"rank {rank}, between steps", FileNotFoundError("no data"))
            os._exit(3)
        time.sleep(1)  # its process and its store are gone
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise failure.pipeline_error(f"rank {rank}", error) from None

    ended = end_of_ranks(run, 2, timeout_s=30, group=False)
    told = f"The failure was at rank {failing}, between steps: FileNotFoundError: no data"
    other = 1 - failing
    assert f"PipelineError: rank {other} has lost its peer. {told}" in ended[other].error


def test_a_cause_is_told_as_ones_own_where_nobody_failed_before() -> None:
    def run(rank: int) -> str:
        distributed.barrier()
        if rank == 1:
            time.sleep(0.5)
        return str(failure.pipeline_error(f"rank {rank}", OSError("disk full")))

    first, second = run_ranks(run)
    assert first == "rank 0: OSError: disk full"
    assert second == f"rank 1 has lost its peer. The failure was at {first}"


def test_what_one_rank_refuses_all_refuse() -> None:
    def run(rank: int) -> str:
        try:
            with failure.failing_together(distributed.group.WORLD):  # type: ignore[arg-type]
                if rank == 1:
                    raise ValueError("PipelineStrategy(model=...): must be whole")
        except ValueError as error:
            return str(error)
        return "accepted"

    assert run_ranks(run) == ["PipelineStrategy(model=...): must be whole"] * 2
