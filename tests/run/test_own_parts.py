"""Parts of a sharded model, taken and put back; in a fit see tests/laws/test_rewind.py."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_align import GaLoreAdamW, Muon
from lightning_align.run.own_parts import restore_state, snapshot_state
from tests.helpers.ranks import run_ranks
from tests.run.test_capture import exact


class Net(nn.Module):
    """An odd number of rows, a tied matrix, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 6, bias=False)
        self.tied = nn.Linear(6, 5, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.second(self.first(x)) + self.second(self.tied(x))


def step(net: nn.Module, optimizer: Optimizer, rank: int) -> None:
    net(torch.full((2, 6), 1.0 + rank)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def bits(net: nn.Module, optimizer: Optimizer) -> Any:
    return exact((net.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: Muon([{"params": [x for x in p if x.ndim > 1], "use_muon": True}], lr=0.1),
        lambda p: GaLoreAdamW([{"params": [x for x in p if x.ndim > 1], "rank": 2}], lr=0.1),
    ],
    ids=["AdamW", "Muon", "GaLoreAdamW"],  # the last one's state is of another shape
)
def test_what_was_taken_is_put_back_to_the_bit_and_trains_on(make: Any) -> None:
    def on_a_rank(rank: int) -> None:
        net = Net()
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        optimizer = make(list(net.parameters()))
        strategy: Any = SimpleNamespace(lightning_module=net, optimizers=[optimizer])
        step(net, optimizer, rank)
        taken = copy.deepcopy(snapshot_state(strategy))
        weights, then = list(net.parameters()), bits(net, optimizer)
        step(net, optimizer, rank)
        expected = bits(net, optimizer)
        for _ in range(2):
            restore_state(strategy, copy.deepcopy(taken))
            assert bits(net, optimizer) == then
            step(net, optimizer, rank)
            assert bits(net, optimizer) == expected
        assert all(a is b for a, b in zip(weights, net.parameters(), strict=True))  # in place

    run_ranks(on_a_rank)


def test_hooks_see_names_and_shapes_and_a_rank_holds_its_part_alone() -> None:
    def on_a_rank(rank: int) -> tuple[dict[str, Any], bool, int]:
        net = Net()
        whole = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        strategy: Any = SimpleNamespace(lightning_module=net, optimizers=[optimizer])
        taken = snapshot_state(strategy)
        assert {name: tuple(v.shape) for name, v in taken["state_dict"].items()} == whole
        parts = next(
            value for name, value in taken["optimizer_states"][0].items() if "parts" in name
        )
        plain = not any(isinstance(each, DTensor) for each in parts.values())
        return {name: tuple(part.shape) for name, part in parts.items()}, plain, len(whole)

    (first, plain, count), (second, _, _) = run_ranks(on_a_rank)
    assert plain
    assert len(first) == count - 1  # all but the buffer
    assert (first["first.weight"], second["first.weight"]) == ((3, 6), (2, 6))
