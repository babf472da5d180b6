import pytest
import torch

from lightning_align.losses.row_attention import BLOCK, row_attention, stretches


def written_out(pairs, width):
    """Who sees whom, as the words of the docstring have it."""
    seen = torch.zeros(width, width, dtype=torch.bool)
    for first, shared, chosen, rejected in pairs:
        middle = first + shared + chosen
        for query in range(first, middle + rejected):
            for key in range(first, query + 1):
                seen[query, key] = query < middle or key < first + shared or key >= middle
    return seen


@pytest.mark.parametrize("shared", [0, 5, BLOCK])
@pytest.mark.parametrize(("chosen", "rejected"), [(3, BLOCK + 2), (2 * BLOCK + 1, 0), (0, 4)])
def test_a_block_sees_what_its_tokens_see(shared, chosen, rejected):
    """Blocks end before, at and behind the end of what is shared."""
    pairs = [(0, shared, chosen, rejected), (shared + chosen + rejected, 2, 3, 1)]
    width = shared + chosen + rejected + 6 + 2  # two empty places
    plan = [of for pair in pairs for of in stretches(0, *pair)]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, 2, width, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    ours = row_attention(*tensors, plan, scale=0.7)
    query, key, value = tensors
    seen = written_out(pairs, width)
    scores = (0.7 * query @ key.mT).masked_fill(~seen, -torch.inf)[:, :, :-2]
    theirs = scores.softmax(-1) @ value
    torch.testing.assert_close(ours[:, :, :-2], theirs, rtol=1e-12, atol=1e-12)
    assert (ours[:, :, -2:] == 0).all()
    weights = torch.linspace(-1, 1, theirs.numel(), dtype=torch.float64).view_as(theirs)
    torch.testing.assert_close(
        torch.autograd.grad((ours[:, :, :-2] * weights).sum(), tensors),
        torch.autograd.grad((theirs * weights).sum(), tensors),
        rtol=1e-10,
        atol=1e-12,
    )


def test_a_second_derivative_is_refused():
    tensors = [torch.randn(1, 1, 2, 4, requires_grad=True) for _ in range(3)]
    out = row_attention(*tensors, stretches(0, 0, 2, 0, 0))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
