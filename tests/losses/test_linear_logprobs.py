import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from lightning_align.layers import Head
from lightning_align.losses import linear_cross_entropy, linear_logprobs
from lightning_align.losses._head_chunks import ChunkedHead
from tests.helpers.exact import assert_as_exact_as, assert_rounded_once, in_float64
from tests.helpers.largest_tensor import LargestTensor

N, V, D = 11, 23, 6
HEADS = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"logit_scale": 1.5, "softcap": 3.0},
}


def make_inputs(dtype=torch.float32, bias=True, **arithmetic):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    hidden, weight = random(N, D), random(V, D)
    head = Head(weight, random(V) if bias else None, **arithmetic)
    return hidden, head, torch.randint(V, (N,), generator=generator)


def leaves(hidden, head):
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


def frozen(head):
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach(), bias, head.logit_scale, head.softcap)


def full_logps(hidden, head, targets):
    return head.logits(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def assert_equals_full_logits(hidden, head, targets, ours, tensors, weights, chunk_size=None):
    """As near to float64, in values and gradients, as the full logits of all rows or of chunks."""
    theirs = [full_logps(hidden, head, targets)]
    if chunk_size is not None:
        chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        theirs.append(torch.cat([full_logps(rows, head, some) for rows, some in chunks]))
    wide = in_float64(leaves(hidden, head))
    wide_head = Head(wide[1], *(wide[2:] or [None]), head.logit_scale, head.softcap)
    exact = full_logps(wide[0], wide_head, targets)
    assert_as_exact_as(ours, theirs, exact)
    results = [torch.autograd.grad((weights * logps).sum(), tensors) for logps in (ours, *theirs)]
    true = torch.autograd.grad((weights * exact).sum(), wide[: len(tensors)])
    for our, *their, expected in zip(*results, true, strict=True):
        assert_as_exact_as(our, their, expected)


# One chunk keeps the softmax for backward, more than one compute it again.
@pytest.mark.parametrize("chunk_size", [None, 1, 4, N, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_name", HEADS)
def test_chunked_equals_full_logits(head_name, bias, chunk_size):
    hidden, head, targets = make_inputs(bias=bias, **HEADS[head_name])
    weights = torch.linspace(-1, 2, N)  # Each row has a gradient of its own.
    ours = linear_logprobs(hidden, head, targets, chunk_size=chunk_size).logps_N
    tensors = leaves(hidden, head)
    assert_equals_full_logits(hidden, head, targets, ours, tensors, weights, chunk_size)


@pytest.mark.parametrize("chunk_size", [4, N])
@pytest.mark.parametrize("head_name", HEADS)
def test_a_frozen_head_gives_the_same_gradient_without_a_product_in_backward(head_name, chunk_size):
    hidden, head, targets = make_inputs(**HEADS[head_name])
    weights = torch.linspace(-1, 2, N)
    logps = linear_logprobs(hidden, frozen(head), targets, chunk_size=chunk_size).logps_N
    with LargestTensor() as record:
        torch.autograd.grad((weights * logps).sum(), hidden, retain_graph=True)
    assert record.matrix_products == 0
    assert_equals_full_logits(hidden, head, targets, logps, [hidden], weights, chunk_size)


@pytest.mark.parametrize("chunk_size", [5, N])
def test_gradients_match_finite_differences(chunk_size):
    hidden, head, targets = make_inputs(torch.float64, **HEADS["all"])

    def logps(hidden, weight, bias):
        changed = Head(weight, bias, head.logit_scale, head.softcap)
        return linear_logprobs(hidden, changed, targets, chunk_size=chunk_size).logps_N

    assert torch.autograd.gradcheck(logps, (hidden, head.weight, head.bias))


def test_statistics_match_their_definitions():
    hidden, head, targets = make_inputs(**HEADS["all"])
    logits = head.logits(hidden)
    targets[:4] = logits[:4].argmax(-1)
    logps = logits.log_softmax(-1)
    ours = linear_logprobs(hidden, head, targets, chunk_size=3, collision=True)
    torch.testing.assert_close(ours.entropy_N, -(logps.exp() * logps).sum(-1).detach())
    torch.testing.assert_close(ours.mean_logit_N, logits.mean(-1).detach())
    assert torch.equal(ours.is_top1_N, logits.argmax(-1) == targets)
    assert ours.is_top1_N[:4].all()
    collision = logps.exp().square().sum(-1).log().detach()
    torch.testing.assert_close(ours.log_collision_N, collision)
    assert linear_logprobs(hidden, head, targets).log_collision_N is None
    assert not any(statistic.requires_grad for statistic in ours[1:])


def test_uniform_logits_have_a_closed_form():
    """A zero head: log-probability -log V, entropy log V, mean logit the bias, all tokens top."""
    head = Head(torch.zeros(V, D, dtype=torch.float64), torch.full((V,), 2.5).double())
    result = linear_logprobs(torch.ones(3, D).double(), head, torch.tensor([0, 5, V - 1]))
    expected = torch.full((3,), math.log(V), dtype=torch.float64)
    torch.testing.assert_close(result.logps_N, -expected)
    torch.testing.assert_close(result.entropy_N, expected)
    torch.testing.assert_close(result.mean_logit_N, torch.full((3,), 2.5).double())
    assert result.is_top1_N.all()


def test_summed_it_is_minus_the_cross_entropy():
    hidden, head, targets = make_inputs(torch.float64, **HEADS["all"])
    tensors = leaves(hidden, head)
    logps = linear_logprobs(hidden, head, targets, chunk_size=4).logps_N
    loss = linear_cross_entropy(hidden, head, targets, chunk_size=3).loss
    torch.testing.assert_close(-logps.sum(), loss)
    for ours, theirs in zip(
        torch.autograd.grad(-logps.sum(), tensors), torch.autograd.grad(loss, tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(chunk_size=st.integers(1, 2 * N), order=st.permutations(range(N)))
def test_neither_chunks_nor_the_order_of_rows_change_anything(chunk_size, order):
    hidden, head, targets = make_inputs(torch.float64, **HEADS["all"])
    weights = torch.linspace(-1, 2, N).double()
    tensors = leaves(hidden, head)
    wanted = {"collision": True}
    once = linear_logprobs(hidden, head, targets, chunk_size=N, **wanted)
    again = linear_logprobs(hidden[order], head, targets[order], chunk_size=chunk_size, **wanted)
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one[order], other, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((weights * once.logps_N).sum(), tensors),
        torch.autograd.grad((weights[order] * again.logps_N).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("chunk_size", "forward", "backward"),
    [(60, 1, 2), (15, 4, 12)],  # 3 products a chunk if kept; 1 + 3 if computed again.
)
def test_products_and_memory(chunk_size, forward, backward):
    rows, vocab_size, width = 60, 500, 8
    weight = torch.randn(vocab_size, width, requires_grad=True)
    hidden = torch.randn(rows, width, requires_grad=True)
    targets = torch.randint(vocab_size, (rows,))
    with LargestTensor() as record:
        logps = linear_logprobs(hidden, Head(weight), targets, chunk_size=chunk_size).logps_N
        assert record.matrix_products == forward
        logps.sum().backward()
    assert record.matrix_products == forward + backward
    assert record.elements == chunk_size * vocab_size


def test_many_rows_do_not_keep_their_probabilities():
    """64 MiB are 524 rows of 32000: with 600 the largest tensor is the 24 MiB of a chunk."""
    weight = torch.randn(32_000, 2, requires_grad=True)
    for rows, largest_bytes in ((500, 500 * 32_000 * 4), (600, 24 * 2**20)):
        with LargestTensor() as record:
            linear_logprobs(torch.randn(rows, 2), Head(weight), torch.arange(rows))
        assert 0.7 * largest_bytes < record.elements * 4 <= largest_bytes


def test_no_gradient_work_under_no_grad():
    hidden, head, targets = make_inputs(**HEADS["all"])
    with LargestTensor() as record, torch.no_grad():
        ours = linear_logprobs(hidden, head, targets)
        frozen_ours = linear_logprobs(hidden, frozen(head), targets)
    assert record.matrix_products == 2
    assert torch.equal(ours.logps_N, frozen_ours.logps_N)
    torch.testing.assert_close(ours.logps_N, full_logps(hidden, head, targets).detach())


@pytest.mark.parametrize("head_is_frozen", [False, True])
@pytest.mark.parametrize("chunk_size", [4, N])
def test_a_second_backward_gives_the_same_again(chunk_size, head_is_frozen):
    hidden, head, targets = make_inputs(**HEADS["all"])
    tensors = [hidden] if head_is_frozen else leaves(hidden, head)
    head = frozen(head) if head_is_frozen else head
    logps = linear_logprobs(hidden, head, targets, chunk_size=chunk_size).logps_N
    torch.autograd.grad(logps, tensors, torch.zeros(N), retain_graph=True)
    full = Head(head.weight, head.bias, head.logit_scale, head.softcap)
    assert_equals_full_logits(hidden, full, targets, logps, tensors, torch.ones(N), chunk_size)


@pytest.mark.parametrize("chunk_size", [4, N])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_have_fp32_logprobs(dtype, chunk_size):
    """bf16 logits would be off by up to 1/8 here, and so would be their log-probabilities."""
    hidden, head, targets = make_inputs(dtype, logit_scale=8.0)
    tensors = leaves(hidden, head)
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    ours = linear_logprobs(hidden, head, targets, chunk_size=chunk_size).logps_N
    theirs = full_logps(wide[0], Head(*wide[1:], logit_scale=8.0), targets)
    widest = in_float64(tensors)
    exact = full_logps(widest[0], Head(*widest[1:], logit_scale=8.0), targets)
    assert_as_exact_as(ours, theirs, exact)
    for our, true in zip(
        torch.autograd.grad(ours.sum(), tensors),
        torch.autograd.grad(exact.sum(), widest),
        strict=True,
    ):
        assert our.dtype == dtype
        assert_rounded_once(our, true)


def test_softmax_may_overwrite_its_input():
    """The in-place softmax that everything here stands on, for short and for long rows."""
    for columns in (5, 1000, 40_000):
        logits = torch.randn(3, columns)
        expected = F.softmax(logits, -1)
        assert torch.equal(torch.softmax(logits, -1, out=logits), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_softmax_may_overwrite_its_input_on_cuda():
    for columns in (5, 1000, 40_000, 300_001):
        logits = torch.randn(3, columns, device="cuda")
        expected = F.softmax(logits, -1)
        assert torch.equal(torch.softmax(logits, -1, out=logits), expected)


def test_no_rows_are_no_error():
    hidden, head, targets = make_inputs()
    result = linear_logprobs(hidden[:0], head, targets[:0], collision=True)
    gradients = torch.autograd.grad(result.logps_N.sum(), leaves(hidden, head))
    assert all(len(values) == 0 for values in result)
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_second_derivative_is_refused():
    hidden, head, targets = make_inputs()
    logps = linear_logprobs(hidden, head, targets).logps_N
    with pytest.raises(RuntimeError, match=r"linear_logprobs: .*differentiated again"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets_N": torch.full((N,), V)}, rf"targets={V}\): must be in \[0, {V}\)"),
        ({"targets_N": torch.full((N,), -100)}, r"targets=-100\): .*Leave rows without a target"),
        ({"targets_N": torch.zeros(N + 1, dtype=torch.long)}, "one id for each hidden state"),
        ({"hidden_ND": torch.zeros(N, D + 1)}, f"the width of the head, {D}"),
        ({"chunk_size": -1}, r"chunk_size=-1\): must be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    hidden, head, targets = make_inputs()
    arguments = {"hidden_ND": hidden, "head": head, "targets_N": targets} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("chunk_size", [4, N])
def test_without_statistics_the_log_probabilities_have_the_same_bits(
    chunk_size, head_name, gradients
):
    """A reference agrees with its policy to the last bit until the first step."""
    hidden, head, targets = make_inputs(**HEADS[head_name])
    with torch.set_grad_enabled(gradients):
        theirs, ours = (
            linear_logprobs(hidden, head, targets, chunk_size=chunk_size, statistics=wanted)
            for wanted in (True, False)
        )
    assert torch.equal(ours.logps_N, theirs.logps_N)
    assert ours.entropy_N.isnan().all()
    assert ours.mean_logit_N.isnan().all()
    if gradients:
        ours_, theirs_ = (
            torch.autograd.grad(of.logps_N.sum(), leaves(hidden, head)) for of in (ours, theirs)
        )
        assert all(map(torch.equal, ours_, theirs_))


def recording(made, new_empty):
    def record(self, *shape):
        made.append(shape)
        return new_empty(self, *shape)

    return record


@pytest.mark.parametrize(("statistics", "expected"), [(True, 2), (False, 1)])
def test_a_reference_needs_one_chunk_of_logits(statistics, expected, monkeypatch):
    made = []
    monkeypatch.setattr(ChunkedHead, "new_empty", recording(made, ChunkedHead.new_empty))
    hidden, head, targets = make_inputs()
    with torch.no_grad():
        linear_logprobs(hidden, head, targets, chunk_size=4, statistics=statistics)
    assert made.count((4, V)) == expected


def test_backward_from_kept_probabilities_makes_no_logits(monkeypatch):
    hidden, head, targets = make_inputs()
    logps = linear_logprobs(hidden, head, targets).logps_N.sum()
    monkeypatch.setattr(ChunkedHead, "logits", None)
    made = []
    monkeypatch.setattr(ChunkedHead, "new_empty", recording(made, ChunkedHead.new_empty))
    torch.autograd.grad(logps, leaves(hidden, head))
    assert (N, V) not in made
