"""The state of a whole model, put together on rank 0 out of stages and taken apart again."""

import warnings
from typing import Any

import torch
from torch import nn

from lightning_align.strategies.pipeline.ownership import Ownership
from lightning_align.strategies.pipeline.whole_state import (
    complete_first_rank,
    gather_module,
    gather_optimizer,
    load_module,
    load_optimizer,
    names_of,
)
from tests.helpers.ranks import run_ranks
from tests.strategies.pipeline.test_ownership import Module, owned


def whole() -> Any:
    """A module after two steps in one process, and its optimizer."""
    module: Any = Module()
    optimizer = adamw(module)
    for factor in (1.0, 2.0):
        for number, parameter in enumerate(module.parameters()):
            parameter.grad = torch.full_like(parameter, factor * (number + 1))
        optimizer.step()
    return module, optimizer


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """Two groups, the second parameter alone in the first of them."""
    parameters = list(module.parameters())
    alone = parameters.pop(1)
    return torch.optim.AdamW([{"params": [alone], "lr": 0.5}, {"params": parameters}], lr=0.1)


def spread() -> tuple[Any, Ownership, torch.optim.AdamW]:
    """The same on stages: each rank steps what it has."""
    module, ownership = owned()
    ownership.leave_others_on_meta()
    optimizer = adamw(module)
    for factor in (1.0, 2.0):
        for number, parameter in enumerate(module.parameters()):
            if not parameter.is_meta:
                parameter.grad = torch.full_like(parameter, factor * (number + 1))
        optimizer.step()
    return module, ownership, optimizer


def assert_equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_rank_0_gets_the_state_of_one_process() -> None:
    def gather(rank: int) -> tuple[bool, bool]:
        _, ownership, optimizer = spread()
        states = gather_module(ownership), gather_optimizer(ownership, optimizer)
        if rank == 0:
            module, theirs = whole()
            assert list(states[0]) == list(module.state_dict())
            assert_equal(dict(states[0]), dict(module.state_dict()))
            assert_equal(states[1], theirs.state_dict())
            assert states[0]["last.weight"] is states[0]["first.weight"]
        return bool(states[0]), bool(states[1])

    assert run_ranks(gather) == [(True, True), (False, False)]


def test_rank_0_may_have_the_whole_module_in_the_end() -> None:
    def complete(rank: int) -> list[str]:
        module, ownership, _ = spread()
        complete_first_rank(ownership)
        if rank == 0:
            assert_equal(dict(module.state_dict()), dict(whole()[0].state_dict()))
        return sorted(name for name, p in module.named_parameters() if p.is_meta)

    assert run_ranks(complete) == [[], ["third.bias", "third.weight"]]


def test_each_rank_loads_what_is_here_and_goes_on_from_it() -> None:
    state, optimizer_state = (part.state_dict() for part in whole())

    def load(rank: int) -> list[str]:
        module, ownership = owned()
        ownership.leave_others_on_meta()
        optimizer = adamw(module)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is not here is no mistake
            load_module(module, state, strict=True)
        load_optimizer(ownership, optimizer, optimizer_state)
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                assert parameter not in optimizer.state
                continue
            assert_equal(parameter.detach(), state[name])
            number = names_of(ownership, optimizer).index(name)
            assert_equal(optimizer.state[parameter], optimizer_state["state"][number])
        return names_of(ownership, optimizer)

    names = ["first.weight", "scale", "second.weight", "second.bias", "third.weight", "third.bias"]
    assert run_ranks(load) == [names, names]
