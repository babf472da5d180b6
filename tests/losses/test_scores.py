"""PairScores: log-ratios, margins, the terms of tokens, and what does not belong together."""

import pytest
import torch

from lightning_align.losses import CompletionLogps, CompletionScores, PairScores, pair_scores


def two_pairs():
    """Rows [chosen; rejected] of two pairs, three predicted positions each."""
    policy, reference = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    lengths, blank = torch.tensor([3, 2, 1, 3]), torch.zeros(4)
    return [
        CompletionLogps(tokens.sum(1), lengths, blank, blank, blank, tokens)
        for tokens in (policy, reference)
    ]


def test_margin_of_known_numbers():
    """Log-ratios -3 - (-5) = 2 of what was chosen and -6 - (-5) = -1 of the rest: a margin of 3."""
    sides = [CompletionScores(torch.tensor([x]), torch.tensor([-5.0])) for x in (-3.0, -6.0)]
    scores = PairScores(*sides)
    assert scores.chosen.logratios == 2
    assert scores.rejected.logratios == -1
    assert scores.margin == 3


def test_rows_become_pairs():
    policy, reference = two_pairs()
    scores = pair_scores(policy, reference)
    assert torch.equal(scores.chosen.logps, policy.logps_B[:2])
    assert torch.equal(scores.rejected.ref_logps, reference.logps_B[2:])
    assert scores.chosen.lengths.tolist() == [3, 2]
    assert torch.equal(scores.rejected.token_logps, policy.token_logps_BT[2:])
    assert torch.equal(scores.chosen.ref_token_logps, reference.token_logps_BT[:2])


def test_only_the_policy_keeps_gradients_and_its_tokens_do():
    """A loss over single tokens whose terms add up to the margin has the margin's gradient."""
    policy, reference = two_pairs()
    scores = pair_scores(policy, reference)
    tokens = scores.chosen.token_logps.sum() - scores.rejected.token_logps.sum()
    gradients = [
        torch.autograd.grad(of, policy.token_logps_BT, retain_graph=True)[0]
        for of in (tokens, scores.margin.sum())
    ]
    assert torch.equal(*gradients)
    for side in (scores.chosen, scores.rejected):
        assert not side.ref_logps.requires_grad
        assert not side.ref_token_logps.requires_grad


def completion(**changes):
    fields = {"logps": torch.zeros(2), "ref_logps": torch.zeros(2)}
    return CompletionScores(**(fields | changes))


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (
            {},
            {"logps": torch.zeros(3)},
            r"rejected_logps.shape=\(3,\)\): must be one for each pair",
        ),
        ({}, {"ref_logps": torch.zeros(2, 1)}, r"ref_rejected_logps.shape=\(2, 1\)\): must be"),
        (
            {"ref_logps": torch.zeros(())},
            {},
            r"ref_chosen_logps.shape=\(\)\): must be one for each",
        ),
        ({"lengths": torch.ones(2)}, {}, r"rejected_lengths=None\): both lengths must be given"),
        ({}, {"ref_token_logps": torch.ones(2, 4)}, r"ref_chosen_token_logps=None\): both"),
        (
            {"token_logps": torch.ones(2, 4)},
            {"token_logps": torch.ones(3, 4)},
            r"rejected_token_logps.shape=\(3, 4\)\): must be one for each pair",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(chosen, rejected, message):
    """Log-probabilities (P,) and (P, 1) would broadcast to P x P losses without a word."""
    with pytest.raises(ValueError, match=rf"PairScores\({message}"):
        PairScores(completion(**chosen), completion(**rejected))


def test_tokens_of_both_sides_may_differ_in_number():
    sides = [completion(token_logps=torch.zeros(2, width)) for width in (3, 5)]
    assert PairScores(*sides).margin.tolist() == [0, 0]
