"""The methods that benchmarks/dpo_frontier compares are what their names say."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.enumerable_world import PLACES, SYMBOLS, all_responses

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[2] / "benchmarks/dpo_frontier"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the benchmark, whose names are then free again."""
    before, names = set(sys.modules), ("methods", "networks", "report", "frontier")
    path = list(sys.path)
    sys.path[:0] = [str(SCRIPTS)]
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in names})
    finally:
        sys.path[:] = path
        for name in {*names} - before:
            sys.modules.pop(name, None)


def test_a_context_is_the_prompt_and_what_was_said(scripts):
    """Of response 3 1 4 1 to prompt 5 the third symbol is read off (5, 3 1), in place 2."""
    response = torch.tensor(3 * 216 + 1 * 36 + 4 * 6 + 1)
    contexts = scripts.networks.contexts_of(torch.tensor(5), response)
    prompt, said, place = scripts.networks.CONTEXTS[contexts[2]].split([8, 18, 4])
    assert prompt.argmax() == 5
    assert said.view(3, SYMBOLS).nonzero().tolist() == [[0, 3], [1, 1]]
    assert place.nonzero().tolist() == [[2]]


def test_samples_are_as_frequent_as_the_table_says(scripts):
    world, weights = scripts.frontier.reference()
    count = 200_000
    uniforms = torch.rand(1, count, PLACES, generator=torch.Generator().manual_seed(0))
    prompts = torch.full((1, count), 3)
    drawn = scripts.networks.sample(weights, prompts, uniforms)[0]
    found = torch.bincount(drawn, minlength=SYMBOLS**PLACES) / count
    expected = world.ref_logps[3].exp()
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-6).all()
    for place in range(PLACES):  # and each place by itself, far more exactly
        symbols = all_responses()[:, place]
        share = torch.zeros(SYMBOLS, dtype=torch.float64).index_add(0, symbols, expected - found)
        assert share.abs().max() < 0.006


def test_advantages_are_those_of_the_definition(scripts):
    """A(t) = sum over k of lambda^k (r + V' - V)(t + k), with no value behind the last symbol."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 1, 1, 4, generator=generator, dtype=torch.float64)
    r, v = rewards.flatten().tolist(), [*values.flatten().tolist(), 0.0]
    surprises = [r[t] + v[t + 1] - v[t] for t in range(4)]
    expected = [sum(0.9**k * surprises[t + k] for k in range(4 - t)) for t in range(4)]
    found = scripts.methods.advantages_of(rewards, values, 0.9).flatten()
    assert found.tolist() == pytest.approx(expected)
    # With lambda 1 they are the returns less the values, whatever those are.
    returns = [sum(r[t:]) - v[t] for t in range(4)]
    found = scripts.methods.advantages_of(rewards, values, 1.0).flatten()
    assert found.tolist() == pytest.approx(returns)


@pytest.mark.parametrize("method", ["DPO", "PPO, learned reward", "REINFORCE, true reward"])
def test_a_run_is_the_same_alone_and_among_others(scripts, method):
    """Beside runs of another seed, beta and a learning rate that ruins them."""
    settings = [(0.3, 0.5, 3), (1.0, 2e-3, 2), (0.3, 1e-3, 2)]
    together = scripts.methods.run(method, scripts.frontier.study(settings, 1e-2, 16))
    alone = scripts.methods.run(method, scripts.frontier.study(settings[1:2], 1e-2, 16))
    for name in ("rewards", "kls"):
        assert together[name][1] == pytest.approx(alone[name][0], rel=1e-4)


@pytest.mark.parametrize("method", ["PPO, true reward", "REINFORCE, true reward"])
def test_what_knows_the_reward_comes_near_the_frontier(scripts, method):
    """Nine tenths of the optimum's gain within 256 steps: no peer is crippled."""
    world, _ = scripts.frontier.reference()
    found = scripts.methods.run(method, scripts.frontier.study([(0.3, 8e-3, 9)], 1e-2, 256))
    gain = found["rewards"][0][-1] - 0.3 * found["kls"][0][-1] - world.reward(world.ref_logps)
    most = 0.3 * world.optimum(0.3)[1].mean() - world.reward(world.ref_logps)
    assert gain > 0.9 * most
