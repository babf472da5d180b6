"""Which group a message is for, and what FSDP's messages take."""

from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_align._compat.torch_messages import MessageClock, group_size
from tests.helpers.ranks import run_ranks


class Arguments(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] = args
        return func(*args, **(kwargs or {}))


def test_a_message_tells_its_group() -> None:
    def on_a_rank(rank: int) -> list[int]:
        group = distributed.new_group([0, 1])
        with Arguments() as mode:
            distributed.all_reduce(torch.ones(1))
            if rank < 2:
                distributed.all_reduce(torch.ones(1), group=group)
            distributed._functional_collectives.all_reduce(torch.ones(1), "sum", [0, 1, 2])
        return [group_size(args) for name, args in mode.seen.items() if "reduce" in name]

    (first, _, last) = run_ranks(on_a_rank, world_size=3)
    assert first == [2, 3]  # the last one of each name
    assert last == [3, 3]
    assert group_size(["sum", 1, torch.ones(1)]) == 1


def test_what_gathers_and_sums_is_timed_until_it_is_left_alone() -> None:
    def on_a_rank(rank: int) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for part in (*model, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        groups = [g for m in model.modules() for g in m._get_fsdp_state()._fsdp_param_groups]
        before = [(g._all_gather_comm, g._reduce_scatter_comm) for g in groups]
        clock = MessageClock([*model.modules(), nn.Linear(1, 1)])
        model(torch.ones(2, 4)).sum().backward()
        gathered = clock.seconds
        assert gathered > 0
        model(torch.ones(2, 4)).sum().backward()
        assert clock.seconds > gathered
        clock.stop()
        after = [(g._all_gather_comm, g._reduce_scatter_comm) for g in groups]
        assert list(map(id, sum(before, ()))) == list(map(id, sum(after, ())))
        known = clock.seconds
        model(torch.ones(2, 4)).sum().backward()
        assert clock.seconds == known

    run_ranks(on_a_rank)
