"""Each step of docs/dpo_derivation.md, in a world of 8 prompts with 1296 responses each.

Everything is a sum over all responses, in float64: what is equal on paper is equal to rounding.
"""

import pytest
import torch

from lightning_align.losses import preference_loss
from tests.helpers.enumerable_world import (
    PLACES,
    PROMPTS,
    SYMBOLS,
    World,
    all_responses,
    kl,
    random_world,
)

BETAS = (0.3, 1.0, 3.0)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random_policies(count):
    generator = torch.Generator().manual_seed(1)
    shape = count, PROMPTS, SYMBOLS**PLACES
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def all_pairs(values_Y):
    """Of every ordered pair of responses: the value of the first and that of the second, (Y, Y)."""
    return torch.broadcast_tensors(values_Y.unsqueeze(1), values_Y.unsqueeze(0))


def loss_on_exact_preferences(logps_Y, world, prompt, beta, weights_YY=None):
    """DPO's loss over all pairs of one prompt, each as often as it is preferred that way round."""
    rewards_Y, ref_logps_Y = (
        table[prompt].to(logps_Y.dtype) for table in (world.rewards, world.ref_logps)
    )
    preferred_YY = torch.sigmoid(torch.sub(*all_pairs(rewards_Y)))
    losses_YY = preference_loss(*all_pairs(logps_Y), *all_pairs(ref_logps_Y), beta=beta)
    weighted_YY = preferred_YY * losses_YY
    return (weighted_YY if weights_YY is None else weights_YY * weighted_YY).mean()


def test_every_response_is_there_once():
    responses = {tuple(response) for response in all_responses().tolist()}
    assert len(responses) == 1296
    assert all(len(r) == 4 and set(r) <= set(range(6)) for r in responses)


@pytest.mark.parametrize("beta", BETAS)
def test_step_1_what_a_policy_lacks_is_its_kl_to_the_optimum(beta):
    """J(pi) = beta log Z - beta KL(pi || pi*) for every policy, and so pi* is best."""
    world = random_world()
    best, log_z = world.optimum(beta)
    policies = torch.stack([*random_policies(3), world.ref_logps, best])
    lacking = kl(policies, best).mean(-1)
    expected = beta * log_z.mean() - beta * lacking
    torch.testing.assert_close(world.objective(policies, beta), expected, **EXACT)
    assert lacking[-1].abs() < 1e-12
    assert (lacking[:-1] > 0.01).all()


@pytest.mark.parametrize("beta", BETAS)
def test_step_2_the_optimum_tells_the_reward_up_to_a_number_for_each_prompt(beta):
    world = random_world()
    best, log_z = world.optimum(beta)
    implicit = beta * (best - world.ref_logps)
    rebuilt = implicit + beta * log_z.unsqueeze(-1)
    torch.testing.assert_close(rebuilt, world.rewards, **EXACT)


def test_step_3_the_partition_function_cancels_in_a_pair():
    """Margins of implicit rewards are those of rewards; and a reward that is shifted by prompt has
    the same optimum, though another Z."""
    world, beta = random_world(), 0.3
    best, log_z = world.optimum(beta)
    implicit = beta * (best - world.ref_logps)
    for implicit_Y, rewards_Y in zip(implicit, world.rewards, strict=True):
        off_YY = torch.sub(*all_pairs(implicit_Y)) - torch.sub(*all_pairs(rewards_Y))
        assert off_YY.abs().max() < 1e-12
    shift = torch.arange(PROMPTS, dtype=torch.float64)
    shifted = World(world.rewards + shift.unsqueeze(-1), world.ref_logps)
    torch.testing.assert_close(shifted.optimum(beta)[0], best, **EXACT)
    torch.testing.assert_close(shifted.optimum(beta)[1] - log_z, shift / beta, **EXACT)


def test_step_4_the_loss_of_a_pair_is_the_log_likelihood_of_its_preference():
    """At the optimum the loss is -log of the probability with which the pair was preferred."""
    world, beta = random_world(), 0.3
    best, _ = world.optimum(beta)
    losses = preference_loss(*all_pairs(best[0]), *all_pairs(world.ref_logps[0]), beta=beta)
    preferred = torch.sigmoid(torch.sub(*all_pairs(world.rewards[0])))
    torch.testing.assert_close((-losses).exp(), preferred, **EXACT)


ALL_PROMPTS = [
    0,
    1,
    *(pytest.param(prompt, marks=pytest.mark.slow) for prompt in range(2, PROMPTS)),
]


@pytest.mark.parametrize("prompt", ALL_PROMPTS)
def test_step_5_the_minimiser_on_exact_preferences_is_the_optimum(prompt):
    """Fitted from the reference, of which the optimum is 3 nats away, on all 1.7 M pairs of a
    prompt: no log-probability of a response is off by 1e-3."""
    world, beta = random_world(), 0.3
    best = world.optimum(beta)[0][prompt]
    assert kl(best, world.ref_logps[prompt]) > 2
    # In float32, which is good for 2e-5 here. The scale makes the curvature about 1.
    logits = world.ref_logps[prompt].float().requires_grad_()
    scale = 8 * logits.numel() / beta**2
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=13, history_size=13, tolerance_grad=0, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_on_exact_preferences(logits.log_softmax(-1), world, prompt, beta)
        (scale * loss).backward()
        return scale * loss

    optimizer.step(closure)
    found = logits.detach().double().log_softmax(-1)
    assert (found - best).abs().max() < 1e-3


def test_step_5_the_optimum_is_a_minimum_whichever_pairs_are_asked_about():
    """The gradient is zero for any weights of pairs, and moving away costs something."""
    world, beta = random_world(), 0.3
    generator = torch.Generator().manual_seed(2)
    half_YY = torch.rand(1296, 1296, generator=generator, dtype=torch.float64)
    weights_YY = half_YY + half_YY.T  # a pair is asked about, whatever the answer will be
    logits = world.optimum(beta)[0][0].requires_grad_()
    loss = loss_on_exact_preferences(logits.log_softmax(-1), world, 0, beta, weights_YY)
    loss.backward()
    assert logits.grad.abs().max() < 1e-15
    reference = world.ref_logps[0]
    assert loss_on_exact_preferences(reference, world, 0, beta, weights_YY) > loss + 0.05


def drawn_pairs(count=64):
    """Prompt, chosen and rejected response of some pairs."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(PROMPTS, (count,), generator=generator)
    return prompts, *torch.randint(SYMBOLS**PLACES, (2, count), generator=generator)


def test_step_6_the_gradient_of_a_table_is_the_formula():
    """-beta sigmoid(-beta h) (grad log pi(w) - grad log pi(l)), where of a softmax the gradients of
    log pi(w) and log pi(l) differ by 1 at w and by -1 at l."""
    world, beta = random_world(), 0.3
    prompts, chosen, rejected = drawn_pairs()
    logits = random_policies(1)[0].requires_grad_()
    logps, ref = logits.log_softmax(-1), world.ref_logps
    pairs = (prompts, chosen), (prompts, rejected)
    scores = [table[pair] for table in (logps, ref) for pair in pairs]
    preference_loss(*scores, beta=beta).mean().backward()

    implicit = beta * (logps.detach() - ref)
    too_low = torch.sigmoid(implicit[pairs[1]] - implicit[pairs[0]])  # large where ranked wrongly
    expected = torch.zeros_like(logits)
    expected.index_put_(pairs[0], -beta * too_low / len(prompts), accumulate=True)
    expected.index_put_(pairs[1], beta * too_low / len(prompts), accumulate=True)
    torch.testing.assert_close(logits.grad, expected, **EXACT)


def test_step_6_the_gradient_of_a_network_is_the_formula():
    """The same where weights are shared: an autoregressive network, one pair at a time."""
    world, beta = random_world(), 0.3
    prompts, chosen, rejected = drawn_pairs(4)
    torch.manual_seed(4)
    width = PROMPTS + PLACES * (SYMBOLS + 1)  # the symbol of each place, or that it has none yet
    network = torch.nn.Sequential(
        torch.nn.Linear(width, 16), torch.nn.Tanh(), torch.nn.Linear(16, SYMBOLS)
    ).double()
    weights = list(network.parameters())

    def logp(prompt, response):
        symbols = all_responses()[response]
        prefixes = torch.stack([symbols.where(torch.arange(4) < i, SYMBOLS) for i in range(4)])
        seen = torch.nn.functional.one_hot(prefixes, SYMBOLS + 1).flatten(1)
        prompt_row = torch.nn.functional.one_hot(prompt, PROMPTS).expand(4, -1)
        logits = network(torch.cat([prompt_row, seen], -1).double())
        return logits.log_softmax(-1)[torch.arange(4), symbols].sum()

    expected = [torch.zeros_like(weight) for weight in weights]
    for prompt, w, l in zip(prompts, chosen, rejected, strict=True):
        logps, ref = (logp(prompt, w), logp(prompt, l)), world.ref_logps[prompt]
        margin = beta * (logps[0] - logps[1] - ref[w] + ref[l])
        factor = -beta * torch.sigmoid(-margin).item() / len(prompts)
        rises = torch.autograd.grad(logps[0], weights), torch.autograd.grad(logps[1], weights)
        for total, up, down in zip(expected, *rises, strict=True):
            total += factor * (up - down)

    sides = [
        torch.stack([logp(*one) for one in zip(prompts, side, strict=True)])
        for side in (chosen, rejected)
    ]
    refs = [world.ref_logps[prompts, side] for side in (chosen, rejected)]
    preference_loss(*sides, *refs, beta=beta).mean().backward()
    for weight, formula in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, formula, **EXACT)


def test_step_7_what_is_in_no_pair_is_free():
    """Half of the responses are in pairs. Their probabilities all fall to a third, the mass goes to
    the other half, and the loss is the same: nothing in it holds the chosen ones up."""
    world, beta = random_world(), 0.3
    reference = world.ref_logps[0]
    seen = torch.arange(1296) % 2 == 0
    rest = 1 - reference.exp()[seen].sum() / 3
    log_share = (rest / reference.exp()[~seen].sum()).log()
    moved = torch.where(seen, reference - torch.tensor(3.0).double().log(), reference + log_share)
    assert moved.exp().sum().item() == pytest.approx(1)
    weights = torch.outer(seen, seen).double()
    losses = [loss_on_exact_preferences(p, world, 0, beta, weights) for p in (reference, moved)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)


def test_step_7_one_answer_to_each_pair_has_no_minimiser():
    """Asked once, a pair has a winner: DPO's loss falls with every margin, IPO's has a least."""
    margins = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros_like(margins)
    dpo = preference_loss(margins, *[zeros] * 3, beta=0.3)
    ipo = preference_loss(margins, *[zeros] * 3, beta=0.05, loss_type="ipo")
    (dpo_slopes,) = torch.autograd.grad(dpo.sum(), margins)
    (ipo_slopes,) = torch.autograd.grad(ipo.sum(), margins)
    assert (dpo_slopes < 0).all()
    assert ipo_slopes.sign().tolist() == [-1, 0, 1]


def test_step_7_ipo_has_an_optimum_of_its_own():
    """On all pairs of the reference IPO's gradient vanishes at ref exp(win rate / tau) / Z."""
    world, tau = random_world(), 0.05
    logits = world.ipo_optimum(tau)[0].requires_grad_()
    reference = world.ref_logps[0]
    logps = logits.log_softmax(-1)
    losses = preference_loss(*all_pairs(logps), *all_pairs(reference), loss_type="ipo", beta=tau)
    preferred = torch.sigmoid(torch.sub(*all_pairs(world.rewards[0])))
    drawn = torch.outer(reference.exp(), reference.exp())
    (drawn * preferred * losses).sum().backward()
    assert logits.grad.abs().max() < 1e-14
