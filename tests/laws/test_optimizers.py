"""Laws of an optimizer alone, on a few parameters."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws import broken
from tests.laws.composition import note
from tests.laws.members import OPTIMIZERS, Member, build, spec
from tests.laws.test_callbacks import same

SHAPES = ((6, 4), (4, 6), (5,), ())
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def start(member: Member, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Any]:
    """The same parameters every time, and an optimizer over them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]
    return parameters, build(member.spec, {})(parameters)


def steps(parameters: list[nn.Parameter], optimizer: Any, numbers: range) -> list[Tensor]:
    """The parameters after the steps ``numbers``; the gradients of step n are always the same."""
    for number in numbers:
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def is_deterministic(member: Member) -> None:
    ours, theirs = (steps(*start(member), range(3)) for _ in range(2))
    assert all(map(torch.equal, ours, theirs)), "two runs differ"


def keeps_dtypes(member: Member) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parameters, optimizer = start(member, dtype)
        steps(parameters, optimizer, range(2))
        assert {parameter.dtype for parameter in parameters} == {dtype}, "a dtype has changed"


def leaves_alone_what_has_no_gradient(member: Member) -> None:
    parameters, optimizer = start(member)
    before = parameters[0].detach().clone()
    steps(parameters[1:], optimizer, range(2))
    assert torch.equal(parameters[0], before), "it moved"
    assert not optimizer.state.get(parameters[0]), "it has a state"


def leaves_all_alone_without_gradients(member: Member) -> None:
    """A step that somebody has left out: moments, counts and decay stand still, and the next one
    is as if it had not been."""
    parameters, optimizer = start(member)
    weights = steps(parameters, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    for parameter in parameters:
        parameter.grad = None
    optimizer.step()
    assert all(map(torch.equal, weights, parameters)), "a weight moved"
    assert same(optimizer.state_dict(), before), "the state moved"
    ours = steps(parameters, optimizer, range(3, 6))
    theirs = steps(*start(member), range(6))
    assert all(map(torch.equal, ours, theirs)), "the steps that follow are others"


def skips_a_non_finite_gradient(member: Member) -> None:
    for value in (float("nan"), float("inf")):
        parameters, optimizer = start(member)
        before = steps(parameters, optimizer, range(2))
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
        assert all(map(torch.equal, before, parameters)), "the weights changed"
        after = steps(parameters, optimizer, range(2, 3))
        assert all(value.isfinite().all() for value in after), "the state is spoilt"


def goes_on_after_a_huge_gradient(member: Member) -> None:
    """1e21 is finite, and its square is not in fp32."""
    parameters, optimizer = start(member)
    steps(parameters, optimizer, range(2))
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e21)
    optimizer.step()
    ends = []
    for sign in (1.0, -1.0):
        copied, resumed = copy.deepcopy((parameters, optimizer))
        for parameter in copied:
            parameter.grad = torch.full_like(parameter, sign)
        resumed.step()
        ends.append([parameter.detach() for parameter in copied])
    assert all(value.isfinite().all() for value in ends[0]), "the weights are spoilt"
    assert not any(map(torch.equal, *ends)), "a weight follows its gradient no more"


def has_plain_state(member: Member) -> None:
    parameters, optimizer = start(member)
    steps(parameters, optimizer, range(2))
    reloaded(optimizer.state_dict())


def resumes(member: Member) -> None:
    expected = steps(*start(member), range(5))
    parameters, optimizer = start(member)
    steps(parameters, optimizer, range(3))
    again, fresh = start(member)
    for parameter, value in zip(again, parameters, strict=True):
        parameter.data.copy_(value.data)
    fresh.load_state_dict(reloaded(optimizer.state_dict()))
    ours = steps(again, fresh, range(3, 5))
    assert all(map(torch.equal, ours, expected)), "the run after a load differs"


def honours_hooks_of_loading(member: Member) -> None:
    parameters, optimizer = start(member)
    steps(parameters, optimizer, range(2))

    def cleared(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {
            key: {n: torch.zeros_like(v) if n in MOMENTS else v for n, v in value.items()}
            for key, value in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(cleared)
    optimizer.load_state_dict(reloaded(optimizer.state_dict()))
    moments = [v for p in parameters for n, v in optimizer.state[p].items() if n in MOMENTS]
    assert len(moments) >= len(parameters), "it has no moments"
    assert not any(moment.any() for moment in moments), "what the hook did is undone"


def refuses_other_shapes(member: Member) -> None:
    parameters, optimizer = start(member)
    steps(parameters, optimizer, range(1))
    others = [nn.Parameter(torch.zeros(7, 3)) for _ in SHAPES]
    other = build(member.spec, {})(others)
    refused = False
    try:  # no step: with a state of another size, torch's fused kernels write beyond it
        other.load_state_dict(optimizer.state_dict())
    except ValueError:
        refused = True
    assert refused, "a state of other shapes was taken"


def reloaded(state: Any) -> Any:
    """``state`` as a checkpoint gives it back, loaded as plain data."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


Law = Callable[[Member], None]
LAWS: dict[str, Law] = {
    "deterministic": is_deterministic,
    "dtypes are kept": keeps_dtypes,
    "without a gradient nothing moves": leaves_alone_what_has_no_gradient,
    "without any gradient the state stays": leaves_all_alone_without_gradients,
    "a non-finite gradient is skipped": skips_a_non_finite_gradient,
    "goes on after a gradient of 1e21": goes_on_after_a_huge_gradient,
    "state loads as plain data": has_plain_state,
    "resumes": resumes,
    "hooks of loading are honoured": honours_hooks_of_loading,
    "a state of other shapes is refused": refuses_other_shapes,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_optimizers(optimizer: Member, law: str) -> None:
    if law in optimizer.exempt:
        with pytest.raises(AssertionError):
            LAWS[law](optimizer)
        note("Optimizers alone", law, optimizer.name, f"no: {optimizer.exempt[law]}")
    else:
        LAWS[law](optimizer)
        note("Optimizers alone", law, optimizer.name, "yes")


BROKEN: dict[str, tuple[str, type[Exception]]] = {
    "deterministic": ("NoisyAdamW", AssertionError),
    "dtypes are kept": ("WideningAdamW", AssertionError),
    "without a gradient nothing moves": ("GreedyAdamW", AssertionError),
    "without any gradient the state stays": ("CountingAdamW", AssertionError),
    "a non-finite gradient is skipped": ("ForgetfulAdamW", AssertionError),
    "goes on after a gradient of 1e21": ("ForgetfulAdamW", AssertionError),
    "state loads as plain data": ("PicklingAdamW", pickle.UnpicklingError),
    "resumes": ("ForgetfulAdamW", AssertionError),
    "hooks of loading are honoured": ("StubbornAdamW", AssertionError),
    "a state of other shapes is refused": ("ObligingSGD", AssertionError),
}


@pytest.mark.parametrize("law", LAWS)
def test_the_law_fails_where_it_is_broken(law: str) -> None:
    name, error = BROKEN[law]
    member = Member(name, spec(broken.HERE + name, lr=0.1))
    with pytest.raises(error):
        LAWS[law](member)
