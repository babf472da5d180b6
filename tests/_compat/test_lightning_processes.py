"""Private APIs that a strategy of several processes needs."""

from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed, nn

from lightning_align import PipelineStrategy
from lightning_align._compat import lightning_processes, torch_modules
from tests.helpers.ranks import ForkedRanks, run_ranks


def test_launchers_are_those_of_lightning() -> None:
    by_script = lightning_processes.ScriptLauncher(LightningEnvironment(), 2, 1, lambda: None)
    # What Lightning asks for when it ends processes on Ctrl-C.
    assert "_SubprocessScriptLauncher" in [base.__name__ for base in type(by_script).__bases__]
    inside = []

    @contextmanager
    def whole():
        inside.append("begin")
        yield
        inside.append("end")

    forking = lightning_processes.multiprocessing_launcher(PipelineStrategy(), "fork", whole)
    assert type(forking).__name__ == "_MultiProcessingLauncher"
    assert forking._start_method == "fork"
    # The method that reads the module's state has its old name.
    kind: Any = type(forking)
    assert forking._collect_rank_zero_results.args[1].__func__ is kind._collect_rank_zero_results
    with pytest.raises(AttributeError):
        forking._collect_rank_zero_results(None, None)
    assert inside == ["begin"]


def test_processes_that_are_there_already_end_together_too() -> None:
    order: list[Any] = []
    environment = ForkedRanks(0, 2)
    launcher = lightning_processes.ScriptLauncher(environment, 2, 1, lambda: order.append("end"))
    result = launcher.launch(lambda value: order.append(value) or "result", 5, trainer=None)
    assert (result, order) == ("result", [5, "end"])


def test_set_rank_is_what_rank_zero_only_asks() -> None:
    before = rank_zero_only.rank
    try:
        lightning_processes.set_rank(3)
        assert rank_zero_only.rank == 3
    finally:
        lightning_processes.set_rank(before)


def test_join_process_group_leaves_one_that_is_there() -> None:
    def join(rank: int) -> Any:
        group = distributed.group.WORLD
        environment = ForkedRanks(rank, 2)
        device = torch.device("cpu")
        lightning_processes.join_process_group(environment, device, None, timedelta(seconds=9))
        return distributed.group.WORLD is group, distributed.get_backend()

    assert run_ranks(join) == [(True, "gloo")] * 2


@pytest.mark.parametrize("has_gradient", [True, False])
def test_share_overflow_counts_that_of_another_rank(has_gradient: bool) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    lightning_processes.share_overflow(scaler, lambda found: found.add_(1.0))
    scaler.scale(weight.sum()).backward()
    if not has_gradient:
        weight.grad = None
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1.0, 1.0], "the step was not skipped"
    assert scaler.get_scale() == 2.0


def test_default_store_holds_what_a_rank_puts_there() -> None:
    def put(rank: int) -> bytes:
        store = torch_modules.default_store()
        if rank == 0:
            store.set("key", "value")
        distributed.barrier()
        return bytes(store.get("key"))

    assert run_ranks(put) == [b"value"] * 2


def test_reduce_in_place_is_a_mean_over_ranks() -> None:
    def reduce(rank: int) -> tuple[float, float]:
        values = torch.tensor([rank + 1.0, rank + 1.0])
        mean = lightning_processes.reduce_in_place(values[:1], None, "mean")
        total = lightning_processes.reduce_in_place(values[1:], None, "sum")
        return float(mean), float(total)

    assert run_ranks(reduce) == [(1.5, 3.0)] * 2
    alone = torch.tensor([2.0])
    assert lightning_processes.reduce_in_place(alone, None, "mean") is alone
