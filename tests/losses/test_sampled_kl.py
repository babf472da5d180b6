"""KL from samples: against the exact value in a world that can be enumerated."""

import itertools
import math

import pytest
import torch

from lightning_align.losses import kl_from_sums, kl_sums

TOKENS, LENGTH = 4, 3


def chain(seed):
    """Log-probabilities of the next token given the one before; the first row is the prompt's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS + 1, TOKENS, generator=generator, dtype=torch.float64).log_softmax(1)


def logps(model, texts):
    before = torch.cat([torch.full((len(texts), 1), TOKENS), texts[:, :-1]], dim=1)
    return model[before, texts]


def sampled(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    texts = torch.zeros(count, 0, dtype=torch.long)
    for _ in range(LENGTH):
        before = texts[:, -1] if texts.shape[1] else torch.full((count,), TOKENS)
        new = torch.multinomial(model[before].exp(), 1, generator=generator)
        texts = torch.cat([texts, new], dim=1)
    return texts


def exact(policy, reference):
    texts = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
    ours, theirs = logps(policy, texts).sum(1), logps(reference, texts).sum(1)
    return float((ours.exp() * (ours - theirs)).sum())


def estimate(policy, reference, texts):
    mask = torch.ones_like(texts)
    return kl_from_sums(kl_sums(logps(policy, texts), logps(reference, texts), mask))


def test_both_estimators_are_unbiased_and_k3_is_the_quieter_one():
    """64 texts in all, so the KL is known; 20,000 samples, four standard errors."""
    policy = chain(0)
    reference = (policy + 0.3 * chain(1)).log_softmax(1)
    found = estimate(policy, reference, sampled(policy, 20_000))
    truth = exact(policy, reference)
    assert abs(found.kl - truth) < 4 * found.standard_error
    assert abs(found.k1 - truth) < 4 * found.k1_standard_error
    assert found.standard_error < found.k1_standard_error / 2
    assert 20 * found.standard_error < truth  # the test has power
    assert found.per_token == pytest.approx(found.kl / LENGTH)
    assert found.num_completions == 20_000


def test_the_standard_error_is_that_of_repeated_estimates():
    """Spread of 200 estimates from 100 samples each, known to 5 % itself; four of these."""
    policy, reference = chain(2), chain(3)
    each = [estimate(policy, reference, sampled(policy, 100, seed)) for seed in range(200)]
    spread = torch.tensor([found.kl for found in each]).std().item()
    told = torch.tensor([found.standard_error for found in each]).mean().item()
    assert told == pytest.approx(spread, rel=0.2)


def test_on_given_texts_it_estimates_something_else():
    """The texts of the reference: why the KL of a run is not taken on its pairs."""
    policy, reference = chain(2), chain(3)
    found = estimate(policy, reference, sampled(reference, 20_000))
    assert abs(found.kl - exact(policy, reference)) > 10 * found.standard_error


def test_known_numbers_with_a_mask():
    """Two texts of 2 and 1 tokens, log r = -log 2, log 3 and -log 4; what is masked may be inf.

    k3 is r - 1 - log r: 1/2 - 1 + log 2, 3 - 1 - log 3 and 1/4 - 1 + log 4.
    """
    policy = torch.zeros(2, 2)
    reference = torch.tensor([[-math.log(2), math.log(3)], [-math.log(4), -math.inf]])
    found = kl_from_sums(kl_sums(policy, reference, torch.tensor([[1, 1], [1, 0]])))
    k3 = (math.log(2) - 0.5) + (2 - math.log(3)), math.log(4) - 0.75
    k1 = math.log(2) - math.log(3), math.log(4)
    assert found.kl == pytest.approx(sum(k3) / 2)
    assert found.k1 == pytest.approx(sum(k1) / 2)
    assert found.standard_error == pytest.approx(
        abs(k3[0] - k3[1]) / 2
    )  # s / sqrt(2), s = d/sqrt 2
    assert found.per_token == pytest.approx(sum(k3) / 3)


def test_parts_add_up_and_equal_models_have_none():
    policy, reference, texts = chain(0), chain(1), sampled(chain(0), 50)
    ours, theirs = logps(policy, texts), logps(reference, texts)
    parts = [
        kl_sums(ours[part], theirs[part], torch.ones_like(texts[part]))
        for part in (slice(0, 3), slice(3, 50))
    ]
    together, whole = kl_from_sums(parts[0] + parts[1]), estimate(policy, reference, texts)
    assert together.kl == pytest.approx(whole.kl, rel=1e-12)
    assert together.standard_error == pytest.approx(whole.standard_error, rel=1e-9)
    same = estimate(policy, policy, texts)
    assert (same.kl, same.standard_error, same.k1) == (0, 0, 0)


def test_one_completion_has_no_known_error_and_none_no_estimate():
    text = sampled(chain(0), 1)
    assert estimate(chain(0), chain(1), text).standard_error == math.inf
    with pytest.raises(ValueError, match="must be of completions"):
        kl_from_sums(torch.zeros(6, dtype=torch.float64))
