"""Values of all parameters: gathered, edited and copied while their blocks are away."""

import pytest
import torch

from tests.helpers.offloaded_network import network, offloaded


@pytest.mark.parametrize("by", ["name", "parameter"])
def test_what_is_gathered_is_there_for_a_while(tmp_path, by):
    module = network()
    expected = module[2][0].weight.detach().clone()
    engine = offloaded(tmp_path, module)
    wanted = "2.0.weight" if by == "name" else module[2][0].weight
    with engine.whole.gathered([wanted]):
        assert torch.equal(module[2][0].weight, expected)
        with pytest.raises(RuntimeError, match="while it is not in memory"):
            module[1][0].weight.isnan()
        with torch.no_grad():
            module[2][0].weight.zero_()
    with pytest.raises(RuntimeError, match="while it is not in memory"):
        module[2][0].weight.isnan()
    assert torch.equal(engine.whole.values()[module[2][0].weight], expected)
    engine.close()


def test_edits_are_stored_if_they_are_to_be(tmp_path):
    module = network()
    engine = offloaded(tmp_path, module)
    with engine.whole.gathered(modify=True), torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.fill_(number)
    values = engine.whole.values()
    assert all((values[p] == number).all() for number, p in enumerate(module.parameters()))
    engine.close()
