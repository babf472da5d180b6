"""The methods of the study, each for all its runs at once: DPO, IPO, SFT, PPO and REINFORCE.

A run is a beta, a learning rate and a seed. All that is drawn in a run depends on its seed alone:
pairs, their order, the numbers behind samples. Every method takes STEPS optimizer steps, each on
BATCH completions, from the weights of the reference.

Shapes: see networks.py; P pairs of a batch, N completions of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from networks import (
    CONTEXTS,
    WHOLE,
    Adam,
    Weights,
    contexts_of,
    initial,
    outputs,
    policy_table,
    sample,
    symbol_logps,
    values,
)
from torch import Tensor

from lightning_align.losses import preference_loss
from tests.helpers.enumerable_world import PLACES, PROMPTS, SYMBOLS, World

STEPS, BATCH = 256, 128  # completions; half as many pairs
PAIRS = 8192  # of a seed, drawn from the reference and labelled once
EVERY = 8  # steps between measurements
# PPO: a rollout is gone through EPOCHS times in MINIBATCHES.
EPOCHS, MINIBATCHES, RATIO_CLIP, GAE_LAMBDA = 4, 2, 0.2, 0.95
VALUE_LR = 3e-3


@dataclass(frozen=True, eq=False)
class Study:
    """What the runs of a batch share, and what tells them apart.

    Attributes:
        world: Rewards and reference.
        ref_weights: Weights of the reference, of one run.
        betas: Of each run.
        lrs: Peak learning rate of each.
        seeds: Of each.
        rm_lr: Peak learning rate of reward models.
        tau_of: IPO's tau for each beta.
        steps: Optimizer steps.
    """

    world: World
    ref_weights: Weights
    betas: Tensor
    lrs: Tensor
    seeds: list[int]
    rm_lr: float
    tau_of: dict[float, float]
    steps: int = STEPS

    @property
    def distinct(self) -> list[int]:
        return sorted(set(self.seeds))

    @property
    def seed_places(self) -> Tensor:
        """Place of each run's seed among the distinct ones."""
        return torch.tensor([self.distinct.index(seed) for seed in self.seeds])

    def generators(self, purpose: int) -> list[torch.Generator]:
        """One for each distinct seed; purposes do not share numbers."""
        return [torch.Generator().manual_seed(1000 * seed + purpose) for seed in self.distinct]

    def policy(self) -> Weights:
        """The reference's weights, once for each run."""
        return [weight.repeat(len(self.seeds), 1, 1) for weight in self.ref_weights]


# Data


def draw_pairs(world: World, count: int, generators: list[torch.Generator]) -> Tensor:
    """Prompt, chosen and rejected response of pairs of the reference, (G, 3, count).

    The label is drawn from the Bradley-Terry probability of the true rewards.
    """
    # One cumulative sum over all prompts: a number between x and x + 1 is a response to prompt x.
    upto = world.ref_logps.exp().flatten().cumsum(0)
    drawn = []
    for generator in generators:
        prompts = torch.randint(PROMPTS, (count,), generator=generator)
        numbers = torch.rand(3, count, generator=generator, dtype=torch.float64)
        places = torch.searchsorted(upto, prompts + numbers[:2]).clamp(max=len(upto) - 1)
        left, right = places.remainder(SYMBOLS**PLACES)
        preferred = torch.sigmoid(world.rewards[prompts, left] - world.rewards[prompts, right])
        left_wins = numbers[2] < preferred
        chosen, rejected = torch.where(left_wins, left, right), torch.where(left_wins, right, left)
        drawn.append(torch.stack([prompts, chosen, rejected]))
    return torch.stack(drawn)


def batches_of(pairs_G3N: Tensor, size: int, generators: list[torch.Generator]) -> Iterator[Tensor]:
    """Pairs in an order of chance, epoch after epoch, (G, 3, size)."""
    count = pairs_G3N.shape[-1]
    while True:
        orders = torch.stack([torch.randperm(count, generator=g) for g in generators])
        for first in range(0, count - size + 1, size):
            places = orders[:, None, first : first + size].expand(-1, 3, -1)
            yield pairs_G3N.gather(-1, places)


def pair_batches(study: Study, size: int, *, fresh: bool = False) -> Iterator[Tensor]:
    """Batches of each run's pairs, (3, R, size): prompts, chosen, rejected.

    Args:
        study: Its seeds decide.
        size: Pairs.
        fresh: New pairs in every batch, as if there were no end of labels.
    """
    count = study.steps * size if fresh else PAIRS
    pairs = draw_pairs(study.world, count, study.generators(0))
    for batch in batches_of(pairs, size, study.generators(1)):
        yield batch[study.seed_places].transpose(0, 1)


# Preferences


def logps_of(policy: Weights, prompts: Tensor, responses: Tensor) -> Tensor:
    return symbol_logps(policy, contexts_of(prompts, responses), responses).sum(-1)


def on_pairs(loss_type: str, *, fresh: bool = False) -> Callable[[Study], Iterator[Weights]]:
    """DPO (sigmoid) or IPO, with the package's own loss."""

    def train(study: Study) -> Iterator[Weights]:
        policy = study.policy()
        adam = Adam(policy, study.lrs, study.steps)
        betas = study.betas.tolist()
        if loss_type == "ipo":
            betas = [study.tau_of[beta] for beta in betas]
        groups = {b: torch.tensor([b == other for other in betas]) for b in sorted(set(betas))}
        batches = pair_batches(study, BATCH // 2, fresh=fresh)
        for prompts, chosen, rejected in batches:
            responses = torch.cat([chosen, rejected], 1)
            logps = logps_of(policy, prompts.repeat(1, 2), responses).chunk(2, 1)
            refs = [study.world.ref_logps[prompts, side].float() for side in (chosen, rejected)]
            loss = torch.zeros(())
            for beta, runs in groups.items():
                scores = [side[runs].flatten() for side in (*logps, *refs)]
                loss = loss + preference_loss(*scores, loss_type=loss_type, beta=beta).sum()
            adam.step(loss / (BATCH // 2))
            yield policy

    return train


def sft(study: Study) -> Iterator[Weights]:
    """Likelihood of the chosen responses, whatever beta is."""
    policy = study.policy()
    adam = Adam(policy, study.lrs, study.steps)
    for prompts, chosen, _ in pair_batches(study, BATCH):
        adam.step(-logps_of(policy, prompts, chosen).mean(1).sum())
        yield policy


# Rewards


def reward_models(study: Study, lr_G: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Rewards of all responses, (G, X, Y), from each seed's pairs (Bradley-Terry).

    Args:
        study: Its seeds' pairs are learned from, in as many steps and pairs as DPO's.
        lr_G: Peak learning rate of each.
        generators: Of the first weights.
    """
    weights = initial(WHOLE.shape[1], 1, generators)
    adam = Adam(weights, lr_G, study.steps)
    batches = batches_of(
        draw_pairs(study.world, PAIRS, study.generators(0)), BATCH // 2, study.generators(1)
    )
    for _ in range(study.steps):
        prompts, chosen, rejected = next(batches).transpose(0, 1)
        places = torch.cat([prompts, prompts], 1) * SYMBOLS**PLACES
        rewards = outputs(weights, WHOLE[places + torch.cat([chosen, rejected], 1)]).squeeze(-1)
        left, right = rewards.chunk(2, 1)
        adam.step(-torch.nn.functional.logsigmoid(left - right).mean(1).sum())
    with torch.no_grad():
        table = outputs(weights, WHOLE.expand(len(lr_G), -1, -1))
    return table.view(len(lr_G), PROMPTS, SYMBOLS**PLACES).double()


def rewards_of(study: Study, *, learned: bool) -> Tensor:
    """The reward that is optimized, of each run, (R, X, Y)."""
    if not learned:
        return study.world.rewards.expand(len(study.seeds), -1, -1).float()
    lr_G = torch.full((len(study.distinct),), study.rm_lr)
    return reward_models(study, lr_G, study.generators(2))[study.seed_places].float()


# Policy gradients


@dataclass(eq=False)
class Rollout:
    """Samples of the policy with what is known of them when they are drawn.

    Attributes:
        prompts, responses: (R, N); every prompt equally often.
        contexts: (R, N, L).
        logps, ref_logps: Of each symbol, (R, N, L).
        rewards: Of whole responses, (R, N).
    """

    prompts: Tensor
    responses: Tensor
    contexts: Tensor
    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor


class Sampler:
    """Draws rollouts; its numbers depend on the seed and on how often it was asked."""

    def __init__(self, study: Study, rewards_RXY: Tensor) -> None:
        self.study, self.rewards = study, rewards_RXY
        self.sources = study.generators(3)
        self.runs = torch.arange(len(study.seeds)).unsqueeze(1)
        with torch.no_grad():
            logits = outputs(study.ref_weights, CONTEXTS.unsqueeze(0))[0]
        self.ref_CS = logits.log_softmax(-1)

    @torch.no_grad()
    def draw(self, policy: Weights, count: int) -> Rollout:
        uniforms = torch.stack([torch.rand(count, PLACES, generator=g) for g in self.sources])
        prompts = (torch.arange(count) % PROMPTS).expand(len(self.study.seeds), -1)
        responses = sample(policy, prompts, uniforms[self.study.seed_places])
        contexts = contexts_of(prompts, responses)
        logps = symbol_logps(policy, contexts, responses)
        digits = responses.unsqueeze(-1) // SYMBOLS ** torch.arange(PLACES - 1, -1, -1) % SYMBOLS
        rewards = self.rewards[self.runs, prompts, responses]
        return Rollout(prompts, responses, contexts, logps, self.ref_CS[contexts, digits], rewards)


def advantages_of(rewards_RNL: Tensor, values_RNL: Tensor, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al., arXiv:1506.02438, Eq. 16), undiscounted."""
    advantage = torch.zeros_like(values_RNL[..., 0])
    following, found = torch.zeros_like(advantage), []
    for place in reversed(range(rewards_RNL.shape[-1])):
        surprise = rewards_RNL[..., place] + following - values_RNL[..., place]
        advantage = surprise + gae_lambda * advantage
        following = values_RNL[..., place]
        found.append(advantage)
    return torch.stack(found[::-1], -1)


def ppo(*, learned: bool) -> Callable[[Study], Iterator[Weights]]:
    """PPO (Schulman et al., arXiv:1707.06347) as for language models (Ouyang et al., 2203.02155).

    The reward of a symbol is -beta times its log-ratio to the reference, of the last one the reward
    of the response as well. Advantages are whitened over the rollout, ratios clipped; values are
    another network's, and not clipped.
    """

    def train(study: Study) -> Iterator[Weights]:
        policy, beta = study.policy(), study.betas.view(-1, 1, 1).float()
        critic = initial(CONTEXTS.shape[1], 1, study.generators(6))
        critic = [weight[study.seed_places] for weight in critic]
        adam = Adam(policy, study.lrs, study.steps)
        critic_adam = Adam(critic, torch.full_like(study.lrs, VALUE_LR), study.steps)
        sampler = Sampler(study, rewards_of(study, learned=learned))
        orders = study.generators(4)
        while True:
            rollout = sampler.draw(policy, BATCH * MINIBATCHES)
            rewards = -beta * (rollout.logps - rollout.ref_logps)
            rewards[..., -1] += rollout.rewards
            with torch.no_grad():
                before = values(critic, rollout.contexts)
            advantages = advantages_of(rewards, before, GAE_LAMBDA)
            returns = advantages + before
            center, spread = advantages.mean((1, 2), True), advantages.std((1, 2), keepdim=True)
            advantages = (advantages - center) / (spread + 1e-8)
            for _ in range(EPOCHS):
                order = [torch.randperm(BATCH * MINIBATCHES, generator=g) for g in orders]
                for part in torch.stack(order)[study.seed_places].chunk(MINIBATCHES, 1):
                    rows = part.unsqueeze(-1).expand(-1, -1, PLACES)
                    contexts, old, gain, target = (
                        table.gather(1, rows)
                        for table in (rollout.contexts, rollout.logps, advantages, returns)
                    )
                    logps = symbol_logps(policy, contexts, rollout.responses.gather(1, part))
                    ratio = (logps - old).exp()
                    clipped = ratio.clamp(1 - RATIO_CLIP, 1 + RATIO_CLIP)
                    adam.step(-torch.minimum(ratio * gain, clipped * gain).mean((1, 2)).sum())
                    error = values(critic, contexts) - target
                    critic_adam.step(error.square().mean((1, 2)).sum() / 2)
                    yield policy

    return train


def reinforce(*, learned: bool) -> Callable[[Study], Iterator[Weights]]:
    """REINFORCE on whole responses, each against the mean of the others of its prompt.

    The leave-one-out baseline is that of Ahmadian et al. (RLOO, arXiv:2402.14740, section 2.4);
    the KL is in the reward. Every batch is drawn anew.
    """

    def train(study: Study) -> Iterator[Weights]:
        policy, beta = study.policy(), study.betas.view(-1, 1).float()
        adam = Adam(policy, study.lrs, study.steps)
        sampler = Sampler(study, rewards_of(study, learned=learned))
        while True:
            rollout = sampler.draw(policy, BATCH)
            rewards = rollout.rewards - beta * (rollout.logps - rollout.ref_logps).sum(-1)
            by_prompt = rewards.view(len(rewards), -1, PROMPTS)
            others = by_prompt.shape[1] - 1
            gains = (by_prompt - by_prompt.mean(1, True)) * (others + 1) / others
            logps = symbol_logps(policy, rollout.contexts, rollout.responses).sum(-1)
            adam.step(-(gains.flatten(1) * logps).mean(1).sum())
            yield policy

    return train


METHODS: dict[str, Callable[[Study], Iterator[Weights]]] = {
    "DPO": on_pairs("sigmoid"),
    "IPO": on_pairs("ipo"),
    "SFT on chosen": sft,
    "PPO, learned reward": ppo(learned=True),
    "REINFORCE, learned reward": reinforce(learned=True),
    "PPO, true reward": ppo(learned=False),
    "REINFORCE, true reward": reinforce(learned=False),
    "DPO, endless pairs": on_pairs("sigmoid", fresh=True),
}


def run(method: str, study: Study) -> dict[str, object]:
    """Reward and KL of all runs every EVERY steps, exactly, and the CPU time of the steps."""
    rewards, kls, spent = [], [], 0.0
    trained = METHODS[method](study)
    for step in range(1, study.steps + 1):
        start = time.process_time()
        policy = next(trained)
        spent += time.process_time() - start
        if step % EVERY == 0:
            with torch.no_grad():
                logps = policy_table(policy)
            rewards.append(study.world.reward(logps))
            kls.append(study.world.kl(logps))
    return {
        "rewards": torch.stack(rewards, 1).tolist(),
        "kls": torch.stack(kls, 1).tolist(),
        "cpu_s": spent,
    }
