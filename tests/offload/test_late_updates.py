"""Updates that wait for the next forward are those of their own step."""

import pytest
import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.late_updates import LateUpdates
from tests.offload.test_engine import network, offloaded, train


@pytest.fixture
def setting():
    """Three blocks, an optimizer, and what was done."""
    blocks = [Block(name, {name: nn.Parameter(torch.zeros(1))}) for name in "abc"]
    optimizer = torch.optim.SGD([p for b in blocks for p in b.parameters.values()], lr=1.0)
    done = []

    def update(block, phase, meanwhile):
        meanwhile()
        done.append((block.name, phase, float(optimizer.param_groups[0]["lr"])))

    def foresee(following):
        done.append(["foreseen", *(block.name for block in following)])

    late = LateUpdates(optimizer, update, foresee, lambda: done.append("all"))
    return blocks, optimizer, late, done


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_each_is_done_when_its_block_comes_with_the_settings_of_its_step(setting, kind):
    """Also where a scheduler fills the tensor of a learning rate anew."""
    (a, b, c), optimizer, late, done = setting
    group = optimizer.param_groups[0]
    group["lr"] = rate = kind(1.0)
    late.wait([a, b])
    if kind is float:
        group["lr"] = 0.5
    else:
        rate.fill_(0.5)
    late.do(c, "forward")  # it does not wait
    late.do(a, "forward")
    late.then(lambda: done.append("then"))
    assert group["lr"] == 0.5
    assert late.are_waiting
    late.finish()
    expected = [["foreseen", "b"], ("a", "forward", 1.0), ["foreseen"], ("b", "update", 1.0)]
    assert done == [*expected, "all", "then"]
    assert not late.are_waiting
    assert (group["lr"] is rate) is (kind is not float)


def test_what_is_to_follow_comes_at_once_where_nothing_waits(setting):
    _, _, late, done = setting
    late.then(lambda: done.append("then"))
    late.finish()
    assert done == ["then"]


def test_behind_one_that_fails_none_is_done_and_no_step_is_committed(setting):
    (a, b, _), _, late, done = setting
    late.wait([a, b])
    late.then(lambda: done.append("then"))
    late._update = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        late.do(a, "forward")
    late.finish()
    assert done == []


def test_blocks_are_updated_in_the_next_forward_or_when_somebody_looks(tmp_path):
    module = network()
    engine = offloaded(tmp_path, module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    engine.optimize_with(optimizer, fresh=True)
    first = next(module.parameters())

    def steps():
        return [int(optimizer.state[p]["step"]) for p in module.parameters()]

    train(module, optimizer, engine, steps=1)
    assert not optimizer.state[first]
    with engine.forward():
        module[0](torch.ones(1, 6))
    assert optimizer.state[first]["step"] == 1
    assert len(optimizer.state) < len(list(module.parameters()))  # of the others nothing yet
    engine.whole.values()
    assert steps() == [1] * 16
    train(module, optimizer, engine, steps=1)
    engine.store.commit(2, b"")
    assert steps() == [2] * 16
    engine.close()
