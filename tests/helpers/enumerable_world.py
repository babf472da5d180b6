"""A world so small that every response can be counted: exact rewards, exact KL, the exact optimum.

A policy is the table of its log-probabilities of all responses to all prompts.

Shapes: X prompts, L places of a response, S symbols, Y = S ** L responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PROMPTS, SYMBOLS, PLACES = 8, 6, 4


def all_responses(symbols: int = SYMBOLS, places: int = PLACES) -> Tensor:
    """Every response once, (Y, L), as the digits of its number."""
    powers_L = symbols ** torch.arange(places - 1, -1, -1)
    return torch.arange(symbols**places).unsqueeze(1) // powers_L % symbols


def random_reward(generator: torch.Generator, prompts: int = PROMPTS) -> Tensor:
    """Rewards of all responses, (X, Y): of symbols in their places, and of neighbours.

    Half of what a symbol is worth in its place depends on the prompt. The standard deviation is 1.
    """
    responses_YL = all_responses()
    of_place_XLS = torch.randn(prompts, PLACES, SYMBOLS, generator=generator, dtype=torch.float64)
    of_place_XLS += torch.randn(PLACES, SYMBOLS, generator=generator, dtype=torch.float64)
    of_pair_SS = torch.randn(SYMBOLS, SYMBOLS, generator=generator, dtype=torch.float64)
    rewards_XY = of_place_XLS[:, torch.arange(PLACES), responses_YL].sum(-1)
    rewards_XY += of_pair_SS[responses_YL[:, :-1], responses_YL[:, 1:]].sum(-1)
    return rewards_XY / rewards_XY.std()


@dataclass(frozen=True, eq=False)
class World:
    """Prompts of equal frequency, the reward of each response, and the reference.

    Attributes:
        rewards: True rewards, (X, Y).
        ref_logps: Log-probabilities of the reference, (X, Y); each row's probabilities sum to 1.
    """

    rewards: Tensor
    ref_logps: Tensor

    def optimum(self, beta: float | Tensor) -> tuple[Tensor, Tensor]:
        """The policy that has the most reward less beta times KL, (X, Y), and log Z, (X,)."""
        unnormalised_XY = self.ref_logps + self.rewards / beta
        log_z_X = unnormalised_XY.logsumexp(-1)
        return unnormalised_XY - log_z_X.unsqueeze(-1), log_z_X

    @cached_property
    def win_rates(self) -> Tensor:
        """How often a response is preferred to one of the reference, by Bradley-Terry, (X, Y)."""
        rewards = zip(self.rewards, self.ref_logps.exp(), strict=True)
        return torch.stack([torch.sigmoid(r.unsqueeze(1) - r) @ p for r, p in rewards])

    def ipo_optimum(self, tau: float | Tensor) -> Tensor:
        """Where IPO ends on all pairs of the reference (arXiv:2310.12036, Eq. 7), (X, Y)."""
        return (self.ref_logps + self.win_rates / tau).log_softmax(-1)

    def reward(self, logps_XY: Tensor) -> Tensor:
        """Expected reward of a policy, of each in a stack (..., X, Y)."""
        return (logps_XY.exp() * self.rewards).sum(-1).mean(-1)

    def kl(self, logps_XY: Tensor) -> Tensor:
        """KL(policy || reference) in nats, a mean over prompts."""
        return kl(logps_XY, self.ref_logps).mean(-1)

    def objective(self, logps_XY: Tensor, beta: float) -> Tensor:
        """What DPO, PPO and REINFORCE want to be large: reward less beta times KL."""
        return self.reward(logps_XY) - beta * self.kl(logps_XY)

    def frontier(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        """KL and reward of the optimum at each beta, which no policy exceeds at that KL."""
        optima = torch.stack([self.optimum(beta)[0] for beta in betas])
        return self.kl(optima), self.reward(optima)


def kl(logps_Y: Tensor, other_logps_Y: Tensor) -> Tensor:
    """KL of the first distribution to the second, in nats, over the last dimension."""
    return (logps_Y.exp() * (logps_Y - other_logps_Y)).sum(-1)


def random_world(seed: int = 0) -> World:
    """A world whose reference is a table of numbers drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    rewards_XY = random_reward(generator)
    logits_XY = torch.randn(rewards_XY.shape, generator=generator, dtype=torch.float64)
    return World(rewards_XY, logits_XY.log_softmax(-1))
