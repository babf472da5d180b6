"""Many small networks that are trained as one: every weight has a first dimension for the runs.

A policy reads the prompt and the symbols so far, one-hot, and has one distribution for the next
symbol; the value of PPO reads the same, the reward model a whole response. All have two hidden
layers of WIDTH. Weights are shared by prompts and prefixes, so what is learned of one response
moves others: a table of probabilities would learn nothing of what it was not shown.

Shapes: R runs, N rows, F features, X prompts, Y responses, L places, S symbols; C = X * 259
contexts, each a prompt and what has been said so far.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

sys.path.append(str(Path(__file__).parents[2]))  # tests.helpers

from tests.helpers.enumerable_world import PLACES, PROMPTS, SYMBOLS, all_responses

WIDTH = 64
CLIP = 1.0  # norm of the gradient of a run
Weights = list[Tensor]

# Prefixes by number: the empty one, those of one symbol, of two, of three.
FIRST_OF_LENGTH = torch.tensor([0, 1, 7, 43])
PREFIXES = 259


def _context_features() -> Tensor:
    """Of every context: prompt, symbol of each place before the last, number of them; (C, F)."""
    rows = []
    for length in range(PLACES):
        symbols_NL = all_responses(SYMBOLS, length) if length else torch.zeros(1, 0).long()
        seen = F.one_hot(symbols_NL, SYMBOLS).flatten(1)
        unseen = torch.zeros(len(seen), (PLACES - 1 - length) * SYMBOLS).long()
        place = F.one_hot(torch.tensor(length), PLACES).expand(len(seen), -1)
        rows.append(torch.cat([seen, unseen, place], 1))
    prefixes = torch.cat(rows).repeat(PROMPTS, 1)
    prompts = F.one_hot(torch.arange(PROMPTS), PROMPTS).repeat_interleave(PREFIXES, 0)
    return torch.cat([prompts, prefixes], 1).float()


def _response_features() -> Tensor:
    """Of every prompt with every response, for the reward model, (X * Y, F)."""
    responses = F.one_hot(all_responses(), SYMBOLS).flatten(1).repeat(PROMPTS, 1)
    prompts = F.one_hot(torch.arange(PROMPTS), PROMPTS)
    return torch.cat([prompts.repeat_interleave(SYMBOLS**PLACES, 0), responses], 1).float()


CONTEXTS = _context_features()
WHOLE = _response_features()
SYMBOLS_YL = all_responses()
# The prefix before each place of a response, by number within its prompt, (Y, L).
PREFIX_YL = FIRST_OF_LENGTH + torch.stack(
    [torch.arange(SYMBOLS**PLACES) // SYMBOLS ** (PLACES - i) for i in range(PLACES)], 1
)


def initial(features: int, outputs: int, generators: list[torch.Generator]) -> Weights:
    """Weights of a network for each generator; the last layer is zero."""

    def draw(rows: int, columns: int) -> Tensor:
        scale = rows**-0.5
        return torch.stack([torch.randn(rows, columns, generator=g) * scale for g in generators])

    runs = len(generators)
    first = draw(features, WIDTH) * (features / PLACES) ** 0.5  # about PLACES features are 1
    layers = [first, torch.zeros(runs, 1, WIDTH), draw(WIDTH, WIDTH), torch.zeros(runs, 1, WIDTH)]
    return [*layers, torch.zeros(runs, WIDTH, outputs), torch.zeros(runs, 1, outputs)]


def outputs(weights: Weights, features_RNF: Tensor) -> Tensor:
    """What each run's network says of its rows, (R, N, outputs)."""
    hidden = features_RNF
    for weight, bias in (weights[:2], weights[2:4]):
        hidden = F.relu(torch.baddbmm(bias, hidden, weight))
    return torch.baddbmm(weights[5], hidden, weights[4])


def policy_table(weights: Weights) -> Tensor:
    """Log-probabilities of all responses to all prompts, (R, X, Y), float64."""
    runs = len(weights[0])
    logits = outputs(weights, CONTEXTS.expand(runs, -1, -1)).double()
    logps = logits.log_softmax(-1).view(runs, PROMPTS, PREFIXES, SYMBOLS)
    return logps[:, :, PREFIX_YL, SYMBOLS_YL].sum(-1)


def contexts_of(prompts: Tensor, responses: Tensor) -> Tensor:
    """Numbers of the contexts of each place of the responses, (..., L)."""
    return prompts.unsqueeze(-1) * PREFIXES + PREFIX_YL[responses]


def symbol_logps(weights: Weights, contexts_RNL: Tensor, responses_RN: Tensor) -> Tensor:
    """Log-probability of each symbol of the responses, (R, N, L)."""
    logits = outputs(weights, CONTEXTS[contexts_RNL.flatten(1)])
    logps = logits.log_softmax(-1).view(*contexts_RNL.shape, SYMBOLS)
    return logps.gather(-1, SYMBOLS_YL[responses_RN].unsqueeze(-1)).squeeze(-1)


def values(weights: Weights, contexts_RNL: Tensor) -> Tensor:
    """PPO's estimate of the reward to come in each context, (R, N, L)."""
    return outputs(weights, CONTEXTS[contexts_RNL.flatten(1)]).view(contexts_RNL.shape)


@torch.no_grad()
def sample(weights: Weights, prompts_RN: Tensor, uniforms_RNL: Tensor) -> Tensor:
    """Responses, (R, N), drawn symbol by symbol with the given numbers between 0 and 1."""
    said = torch.zeros_like(prompts_RN)
    for place in range(PLACES):
        contexts = prompts_RN * PREFIXES + FIRST_OF_LENGTH[place] + said
        shares = outputs(weights, CONTEXTS[contexts]).softmax(-1).cumsum(-1)
        symbols = (shares < uniforms_RNL[..., place, None]).sum(-1).clamp(max=SYMBOLS - 1)
        said = said * SYMBOLS + symbols
    return said


class Adam:
    """Adam with a learning rate for each run, each run's gradient clipped by its own norm.

    Args:
        weights: Of all runs; they are changed in place.
        lrs: Peak learning rates.
        steps: After which the rate is 0: up in a twentieth of them, then linearly down.
    """

    def __init__(self, weights: Weights, lrs: Tensor, steps: int) -> None:
        self.weights = [weight.requires_grad_() for weight in weights]
        self.lrs, self.steps, self.taken = lrs.view(-1, 1, 1), steps, 0
        self.first = [torch.zeros_like(weight) for weight in weights]
        self.second = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """One step down a loss that is a sum over runs."""
        gradients = torch.autograd.grad(loss, self.weights)
        norms = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0).sqrt()
        scale = (CLIP / norms.clamp(min=CLIP)).view(-1, 1, 1)
        warmup = max(1, self.steps // 20)
        pace = min((self.taken + 1) / warmup, (self.steps - self.taken) / (self.steps - warmup))
        self.taken += 1
        rate = self.lrs * pace * (1 - 0.999**self.taken) ** 0.5 / (1 - 0.9**self.taken)
        for weight, gradient, m, v in zip(
            self.weights, gradients, self.first, self.second, strict=True
        ):
            gradient = gradient * scale
            m.lerp_(gradient, 0.1)
            v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            weight.sub_(rate * m / (v.sqrt() + 1e-8))
