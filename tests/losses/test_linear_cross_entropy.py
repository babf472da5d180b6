import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_align.layers import Head
from lightning_align.losses import linear_cross_entropy
from tests.helpers.exact import (
    assert_as_exact_as,
    assert_rounded_once,
    in_float64,
    value_and_gradients,
)
from tests.helpers.largest_tensor import LargestTensor

N, V, D = 13, 29, 6


def make_head(dtype=torch.float32, bias=False, logit_scale=1.0, softcap=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=dtype).requires_grad_() if bias else None
    return Head(weight, bias, logit_scale, softcap)


def make_rows(dtype=torch.float32, ignored=(), seed=1):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    labels[list(ignored)] = -100
    return hidden, labels


def leaves(hidden, head):
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


def full_loss(hidden, head, labels, label_smoothing=0.0, z_loss=0.0, ignore_index=-100):
    """The definition: all logits, PyTorch's cross-entropy, and PaLM's z-loss on the same rows."""
    logits = head.logits(hidden)
    log_z = logits.logsumexp(-1)[labels != ignore_index]
    cross_entropy = F.cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return cross_entropy + z_loss * log_z.square().sum()


def assert_equals_full_logits(hidden, head, labels, chunk_size=None, **options):
    """As near to float64, in value and gradients, as the full logits of all rows or of chunks."""
    tensors = leaves(hidden, head)
    ours = linear_cross_entropy(hidden, head, labels, chunk_size=chunk_size, **options)
    theirs = [full_loss(hidden, head, labels, **options)]
    if chunk_size is not None:
        chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
        theirs.append(sum(full_loss(rows, head, some, **options) for rows, some in chunks))
    wide = in_float64(tensors)
    wide_head = Head(wide[1], *(wide[2:] or [None]), head.logit_scale, head.softcap)
    exact = full_loss(wide[0], wide_head, labels, **options)
    results = [value_and_gradients(loss, tensors) for loss in (ours.loss, *theirs)]
    for our, *their, true in zip(*results, value_and_gradients(exact, wide), strict=True):
        assert_as_exact_as(our, their, true)
    return ours


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "logit_scale": 1.5, "softcap": 3.0},
}


@pytest.mark.parametrize("chunk_size", [None, 1, 4, N, 100])
@pytest.mark.parametrize("ignored", [(), (0, 5, 6, 12)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}])
@pytest.mark.parametrize("head_name", HEADS)
def test_chunked_equals_full_logits(head_name, options, ignored, chunk_size):
    head = make_head(**HEADS[head_name])
    hidden, labels = make_rows(ignored=ignored)
    ours = assert_equals_full_logits(hidden, head, labels, chunk_size, **options)
    assert ours.num_tokens == N - len(ignored)
    torch.testing.assert_close(ours.nll, full_loss(hidden, head, labels).detach())
    assert not ours.nll.requires_grad


def test_chunked_equals_full_logits_at_a_real_size():
    """300 rows over 8000 tokens: sums that are long enough to round differently."""
    torch.manual_seed(0)
    weight = torch.randn(8000, 64).mul_(0.1).requires_grad_()
    hidden = torch.randn(300, 64).requires_grad_()
    labels = torch.randint(8000, (300,))
    assert_equals_full_logits(hidden, Head(weight), labels, chunk_size=77)


def test_all_options_at_once_match_finite_differences():
    head = make_head(torch.float64, **HEADS["all"])
    hidden, labels = make_rows(torch.float64, ignored=(3,))

    def loss(hidden, weight, bias):
        changed = Head(weight, bias, head.logit_scale, head.softcap)
        return linear_cross_entropy(
            hidden, changed, labels, label_smoothing=0.1, z_loss=0.01, chunk_size=5
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_uniform_logits_have_a_closed_form():
    """A zero head gives every token the probability 1/V.

    Then each loss is log V with or without smoothing, log Z = log V as well, so the z-loss adds
    z (log V)^2. The gradient of the bias is, for one row with label y,
    (1 + 2 z log V) / V everywhere, less 1 at y.
    """
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    head = Head(torch.zeros(V, D, dtype=torch.float64), bias)
    labels = torch.tensor([7])
    result = linear_cross_entropy(
        torch.ones(1, D, dtype=torch.float64), head, labels, z_loss=0.5, label_smoothing=0.3
    )
    log_v = math.log(V)
    assert result.nll.item() == pytest.approx(log_v, rel=1e-12)
    assert result.loss.item() == pytest.approx(log_v + 0.5 * log_v**2, rel=1e-12)

    loss = linear_cross_entropy(
        torch.ones(1, D, dtype=torch.float64), head, labels, z_loss=0.5
    ).loss
    (gradient,) = torch.autograd.grad(loss, bias)
    expected = torch.full((V,), (1 + log_v) / V, dtype=torch.float64)
    expected[7] -= 1
    torch.testing.assert_close(gradient, expected)


def test_a_large_common_logit_costs_no_precision():
    """Two equal logits: the loss is log 2 whatever they are.

    At 10000 the spacing of fp32 is 0.001, which log Z - label logit would be off by; the label's
    distance to the largest logit is subtracted first.
    """
    head = Head(torch.full((2, 1), 10_000.0))
    for label in (0, 1):
        loss = linear_cross_entropy(torch.ones(1, 1), head, torch.tensor([label])).loss
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    """A token that is 200 nats below the best has a probability that fp32 rounds to zero."""
    head = Head(torch.tensor([[0.0], [-200.0], [-1.0]], requires_grad=True))
    loss = linear_cross_entropy(torch.ones(1, 1), head, torch.tensor([1])).loss
    (gradient,) = torch.autograd.grad(loss, head.weight)
    assert loss.item() == pytest.approx(200 + math.log1p(math.exp(-1)), rel=1e-6)
    assert torch.isfinite(gradient).all()
    assert gradient[1].item() == -1


@settings(max_examples=40, deadline=None)
@given(
    chunk_size=st.integers(1, 2 * N),
    order=st.permutations(range(N)),
    ignored=st.sets(st.integers(0, N - 1)),
)
def test_neither_chunks_nor_the_order_of_rows_change_anything(chunk_size, order, ignored):
    head = make_head(torch.float64, **HEADS["all"])
    hidden, labels = make_rows(torch.float64, ignored=ignored)
    tensors = leaves(hidden, head)
    once = linear_cross_entropy(hidden, head, labels, chunk_size=N)
    again = linear_cross_entropy(hidden[order], head, labels[order], chunk_size=chunk_size)
    torch.testing.assert_close(once.loss, again.loss, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(once.loss, tensors),
        torch.autograd.grad(again.loss, tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_batches_keep_their_shape_in_the_gradient():
    head = make_head()
    hidden = torch.randn(2, 5, D, requires_grad=True)
    labels = torch.randint(V, (2, 5))
    ours = linear_cross_entropy(hidden, head, labels, chunk_size=3).loss
    flat = linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten(), chunk_size=3).loss
    gradients = [torch.autograd.grad(loss, [hidden, head.weight]) for loss in (ours, flat)]
    assert gradients[0][0].shape == hidden.shape
    assert ours == flat
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("rows", [N, 0])
def test_nothing_to_learn_is_zero_not_nan(rows):
    head = make_head(**HEADS["all"])
    hidden, labels = make_rows(ignored=range(N))
    result = linear_cross_entropy(hidden[:rows], head, labels[:rows], z_loss=1e-4)
    gradients = torch.autograd.grad(result.loss, leaves(hidden, head))
    assert result.loss == result.nll == result.num_tokens == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_ignored_rows_may_hold_anything():
    """A row without label may be nan: it is not multiplied by zero, it is not there."""
    head = make_head()
    hidden, labels = make_rows(ignored=(2,))
    with torch.no_grad():
        hidden[2] = float("nan")
    loss = linear_cross_entropy(hidden, head, labels).loss
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[0][2] == 0).all()


def test_another_ignore_index():
    head = make_head()
    hidden, labels = make_rows()
    assert_equals_full_logits(hidden, head, labels, ignore_index=int(labels[0]))


class TiedModel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)

    def forward(self, tokens):
        return torch.tanh(self.mix(self.embedding(tokens)))


def test_a_tied_head_adds_its_gradient_to_the_embedding():
    model, tokens = TiedModel(), torch.randint(V, (N + 1,))
    losses = (
        linear_cross_entropy(model(tokens[:-1]), Head(model.embedding.weight), tokens[1:]).loss,
        full_loss(model(tokens[:-1]), Head(model.embedding.weight), tokens[1:]),
    )
    wide = copy.deepcopy(model).double()
    exact = full_loss(wide(tokens[:-1]), Head(wide.embedding.weight), tokens[1:])
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    true = torch.autograd.grad(exact, list(wide.parameters()))
    for our, their, expected in zip(ours, theirs, true, strict=True):
        assert_as_exact_as(our, their, expected)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "nothing"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(trained):
    head = make_head(bias=True)
    hidden, labels = make_rows()
    tensors = dict(zip(["hidden", "weight", "bias"], leaves(hidden, head), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    with LargestTensor() as record:
        loss = linear_cross_entropy(hidden, head, labels).loss
    # One product for the logits, one for the gradient of either factor.
    assert record.matrix_products == (2 if trained in ("hidden", "weight") else 1)
    assert loss.requires_grad == (trained != "nothing")
    if trained != "nothing":
        loss.backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == (
        {trained} - {"nothing"}
    )


def test_no_gradient_work_under_no_grad():
    head = make_head(**HEADS["all"])
    hidden, labels = make_rows()
    with LargestTensor() as record, torch.no_grad():
        result = linear_cross_entropy(hidden, head, labels, label_smoothing=0.1)
    assert record.matrix_products == 1
    torch.testing.assert_close(result.loss, full_loss(hidden, head, labels, 0.1).detach())


def test_three_products_and_never_the_full_logits():
    rows, vocab_size, width = 60, 500, 8
    weight = torch.randn(vocab_size, width, requires_grad=True)
    hidden = torch.randn(rows, width, requires_grad=True)
    labels = torch.randint(vocab_size, (rows,))
    with LargestTensor() as full:
        F.cross_entropy(hidden @ weight.t(), labels).backward()
    with LargestTensor() as chunked:
        linear_cross_entropy(hidden, Head(weight), labels, chunk_size=15).loss.backward()
    assert full.elements == rows * vocab_size  # The mode sees what it should.
    assert chunked.elements == max(15 * vocab_size, vocab_size * width)
    assert chunked.matrix_products == 3 * 4  # Three for each of four chunks.


def test_the_default_chunk_is_a_fraction_of_many_rows():
    rows, vocab_size = 2048, 32_000
    weight = torch.randn(vocab_size, 2)
    labels = torch.randint(vocab_size, (rows,))
    with LargestTensor() as record, torch.no_grad():
        linear_cross_entropy(torch.randn(rows, 2), Head(weight), labels)
    assert record.elements * 4 <= 24 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_have_fp32_logits_and_sums(dtype):
    """Equal to fp32 arithmetic on the same rounded weights, up to the rounding of the result.

    bf16 logits near 30 are multiples of 1/8, which alone would move the loss by percents.
    """
    torch.manual_seed(0)
    weight = torch.randn(V, D).mul_(5).to(dtype).requires_grad_()
    hidden = torch.randn(N, D).mul_(3).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,))
    loss = linear_cross_entropy(hidden, Head(weight), labels, chunk_size=4).loss
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    theirs = full_loss(wide[0], Head(wide[1]), labels)
    widest = in_float64([hidden, weight])
    exact = full_loss(widest[0], Head(widest[1]), labels)
    assert loss.dtype == torch.float32
    assert_as_exact_as(loss, theirs, exact)
    for ours, true in zip(
        torch.autograd.grad(loss, [hidden, weight]),
        torch.autograd.grad(exact, widest),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert_rounded_once(ours, true)


def test_autocast_changes_nothing_on_a_cpu():
    head = make_head()
    hidden, labels = make_rows()
    plain = linear_cross_entropy(hidden, head, labels, chunk_size=4).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_cross_entropy(hidden, head, labels, chunk_size=4).loss
        gradients = torch.autograd.grad(cast, [hidden, head.weight])
    assert torch.equal(plain, cast)
    for one, other in zip(
        gradients, torch.autograd.grad(plain, [hidden, head.weight]), strict=True
    ):
        assert torch.equal(one, other)


def test_gradient_of_the_weight_is_handed_over_not_copied():
    """A copy would be a second (V, D) at the moment of the peak."""
    head = make_head()
    hidden, labels = make_rows()
    loss = linear_cross_entropy(hidden, head, labels).loss
    gradient = loss.grad_fn.gradients[1]
    address = gradient.data_ptr()
    del gradient
    loss.backward()
    assert head.weight.grad.data_ptr() == address


def test_a_second_derivative_is_refused():
    head = make_head()
    hidden, labels = make_rows()
    loss = linear_cross_entropy(hidden, head, labels).loss
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy: .*differentiated again"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_second_backward_gives_the_same_again():
    head = make_head(**HEADS["all"])
    hidden, labels = make_rows()
    tensors = leaves(hidden, head)
    loss = linear_cross_entropy(hidden, head, labels).loss
    first = torch.autograd.grad(loss, tensors, torch.tensor(0.0), retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    third = torch.autograd.grad(full_loss(hidden, head, labels), tensors)
    for zero, ours, theirs in zip(first, second, third, strict=True):
        assert (zero == 0).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((N,), V)}, rf"labels={V}\): must be in \[0, {V}\)"),
        ({"labels": torch.full((N,), -1)}, r"labels=-1\): .*ignore_index=-100"),
        ({"labels": torch.zeros(N - 1, dtype=torch.long)}, "one id for each hidden state"),
        ({"hidden": torch.zeros(N, D + 1)}, f"the width of the head, {D}"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5\): must be in \[0, 1\]"),
        ({"z_loss": -1.0}, "z_loss=-1.0.*must be 0 or more"),
        ({"z_loss": float("nan")}, "z_loss=nan.*must be 0 or more"),
        ({"chunk_size": 0}, r"chunk_size=0\): must be at least 1"),
    ],
)
def test_bad_input_is_named(change, message):
    hidden, labels = make_rows()
    arguments = {"hidden": hidden, "head": make_head(), "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    head, (hidden, labels) = make_head(dtype, **HEADS["all"]), make_rows(dtype, ignored=(1,))
    tensors = leaves(hidden, head)
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in tensors]
    gpu_head = Head(*on_gpu[1:], head.logit_scale, head.softcap)
    ours = linear_cross_entropy(on_gpu[0], gpu_head, labels.cuda(), chunk_size=4).loss
    theirs = linear_cross_entropy(hidden, head, labels, chunk_size=4).loss
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    # The gradient of bf16 logits is rounded to bf16 before its products there.
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    for our, their in zip(
        torch.autograd.grad(ours, on_gpu), torch.autograd.grad(theirs, tensors), strict=True
    ):
        torch.testing.assert_close(our.cpu(), their, rtol=tolerance, atol=tolerance)
