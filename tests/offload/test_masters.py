"""fp32 masters of parameters in bf16, against a loop that keeps them in memory."""

import copy

import pytest
import torch

from lightning_align.offload import masters
from tests.offload.test_engine import network, offloaded


def batches(steps=8):
    return torch.randn(steps, 2, 5, 6, generator=torch.Generator().manual_seed(1)).bfloat16()


def train_with_masters(module, build):
    """Mixed precision as in arXiv:1710.03740, figure 1."""
    kept = [p.detach().float() for p in module.parameters()]
    optimizer = build(kept)
    for step in batches():
        for x in step:
            module(x).square().mean().backward()
        for master, parameter in zip(kept, module.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(kept, module.parameters(), strict=True):
                parameter.copy_(master)
    return kept, optimizer


BUILDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "SGD without state": lambda p: torch.optim.SGD(p, lr=1e-3),
}


@pytest.mark.parametrize("early", [False, True], ids=["after backward", "in backward"])
@pytest.mark.parametrize("name", BUILDS)
def test_training_is_that_of_a_loop_with_masters(tmp_path, name, early):
    theirs = network().bfloat16()
    ours = copy.deepcopy(theirs)
    kept, _ = train_with_masters(theirs, BUILDS[name])
    engine = offloaded(tmp_path, ours)
    optimizer = BUILDS[name](ours.parameters())
    engine.optimize_with(optimizer, fresh=True, has_masters=True)
    for step in batches():
        for number, x in enumerate(step):
            with engine.forward():
                loss = ours(x).square().mean()
            with engine.backward(updates=early and number == 1):
                loss.backward()
        engine.updates.step()
    values, states = engine.whole.values(), engine.updates.state()["state"]
    for number, (key, parameter) in enumerate(ours.named_parameters()):
        assert values[parameter].dtype == torch.bfloat16
        assert torch.equal(values[parameter], theirs.get_parameter(key)), key
        assert torch.equal(states[number][masters.KEY], kept[number]), key
    engine.close()


def test_what_is_lost_in_half_precision_adds_up_in_masters():
    """A thousand updates of 2 ** -12 are 1/4; half the distance of numbers above 1 is 2 ** -8."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    half, state = parameter.data, {}
    for _ in range(1024):
        masters.lift(parameter, state)
        with torch.no_grad():
            parameter += 2**-12
        masters.round_off(parameter, state, half)
    assert parameter.item() == 1.25
    assert parameter.data.data_ptr() == half.data_ptr()


def test_a_state_that_was_cast_is_what_it_was():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    state = {"exp_avg": torch.full((3,), 1 / 3), "step": torch.tensor(2.0), masters.KEY: 0.1}
    groups = optimizer.state_dict()["param_groups"]
    known = masters.without_masters({0: state})
    optimizer.load_state_dict({"state": known, "param_groups": groups})
    found = {0: optimizer.state[parameter]}
    assert found[0].keys() == {"exp_avg", "step"}
    assert found[0]["exp_avg"].dtype == torch.bfloat16
    masters.put_back({0: {**state, masters.KEY: torch.ones(3)}}, found)
    assert torch.equal(found[0]["exp_avg"], state["exp_avg"])
    assert torch.equal(found[0][masters.KEY], torch.ones(3))


def test_a_state_of_masters_is_loaded_without_a_cast_of_it():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    state = {"exp_avg": torch.full((3,), 1 / 3), "step": torch.tensor(2.0)}
    shapes = masters.outlines({0: state}, {0: parameter})
    assert shapes[0]["exp_avg"].untyped_storage().nbytes() == 2
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": shapes, "param_groups": groups})
    found = {0: optimizer.state[parameter]}
    assert found[0]["exp_avg"].untyped_storage().nbytes() == 2
    masters.put_back({0: state}, found)
    assert found[0]["exp_avg"] is state["exp_avg"]
    assert found[0]["step"] == 2
