"""Where an operation belongs, in forward, in backward and in between."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_align.planner.records import Trace
from lightning_align.planner.trace import tracing


class Scaled(nn.Module):
    """A custom function, a parameter of its own, and a layer that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(self.layer(x).sin()) * self.scale


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.add(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].add(gradients[0])


def traced(model: nn.Module, run: Any) -> Trace:
    with tracing(model, list(model.parameters())) as trace:
        run()
    return trace


def scopes(trace: Trace, name: str) -> list[tuple[str, str]]:
    found = [(r.phase, r.scope[-1] if r.scope else "-") for r in trace.records if r.name == name]
    return sorted(found)


def test_backward_belongs_to_the_module_whose_forward_made_the_node() -> None:
    model = nn.Sequential(Scaled(), nn.Identity(), Scaled())
    trace = traced(model, lambda: model(torch.ones(2, 4)).sum().backward())
    assert scopes(trace, "aten.sin") == [("forward", "0"), ("forward", "2")]
    assert scopes(trace, "aten.cos") == [("backward", "0"), ("backward", "2")]
    adds = [("backward", "0"), ("backward", "2"), ("forward", "0"), ("forward", "2")]
    assert scopes(trace, "aten.add") == adds  # of the custom function, both ways
    assert {place for _, place in scopes(trace, "aten.mm")} == {"0.layer", "2.layer"}
    assert scopes(trace, "aten.sum")[-1] == ("forward", "-")


def test_accumulating_a_gradient_belongs_to_the_owner_of_the_parameter() -> None:
    model = nn.Sequential(Scaled(), Scaled())

    def run() -> None:
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()

    adds = [r for r in traced(model, run).records if r.name == "aten.add_"]
    assert sorted(record.scope for record in adds) == [("0",), ("0.layer",), ("1",), ("1.layer",)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_runs_between_layers_belongs_to_their_parent(
    use_reentrant: bool,
) -> None:
    """Custom functions run without gradients even there."""
    model = nn.ModuleDict({"block": Scaled()})
    block: Any = model["block"]

    def run() -> None:
        x = torch.ones(2, 4, requires_grad=True)
        checkpoint(block.forward, x, use_reentrant=use_reentrant).sum().backward()

    again = [r for r in traced(model, run).records if r.phase == "recompute"]
    assert [(r.name, r.scope[-1]) for r in again][:3] == [
        ("aten.mm", "block.layer"),
        ("aten.sin", "block"),
        ("aten.add", "block"),
    ]


def test_backward_inside_of_a_forward_is_told_apart() -> None:
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scaled()

        def forward(self, x: Tensor) -> None:
            self.inner(x).sum().backward()
            x.neg()

    model = Trains()
    trace = traced(model, lambda: model(torch.ones(2, 4)))
    assert scopes(trace, "aten.cos") == [("backward", "inner")]
    assert scopes(trace, "aten.neg") == [("forward", "")]


def test_a_module_that_is_not_the_models_has_no_name() -> None:
    model, other = Scaled(), nn.Linear(4, 4, bias=False)
    trace = traced(model, lambda: other(torch.ones(2, 4)))
    assert scopes(trace, "aten.mm") == [("forward", "-")]


@pytest.mark.parametrize("named", [True, False])
def test_forward_in_the_closure_of_a_step_is_no_update(named: bool) -> None:
    """A custom function that no module calls runs without gradients, as an update does."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

    def closure() -> Tensor:
        loss = Doubled.apply(model(torch.ones(2, 4))).sum()
        loss.backward()
        with torch.no_grad():
            model.weight.grad.mul_(2)  # as clipping does
        return loss

    options = {"closure": closure} if named else {}
    trace = traced(model, partial(optimizer.step, *(() if named else (closure,)), **options))
    assert scopes(trace, "aten.add") == [("backward", "-"), ("forward", "-")]
    assert scopes(trace, "aten.mul_") == [("optimizer", "-")]
    assert [phase for phase, _ in scopes(trace, "aten.add_")] == ["optimizer"]
