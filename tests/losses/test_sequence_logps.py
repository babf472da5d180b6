import pytest
import torch

from lightning_align.layers import Head, find_layers
from lightning_align.losses import completion_logps, padding_arguments, sequence_logps
from lightning_align.losses.sequence_logps import length_desensitized
from tests.helpers.largest_tensor import LargestTensor
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE, PlainDecoder, TiedDecoder

PAD = 0
MODELS = {name: TINY_MODELS[name] for name in ("llama", "gpt2", "gemma2")}
MODELS |= {"plain": PlainDecoder}

# Tokens of prompt and completion of each sequence.
LENGTHS = [(3, 4), (5, 1), (1, 2), (4, 3)]


def make_sequences():
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(1, VOCAB_SIZE, (prompt + completion,), generator=generator)
        for prompt, completion in LENGTHS
    ]


def padded(side, extra=2):
    """The sequences as a batch, all padding on one side; `extra` columns are padding for all."""
    sequences = make_sequences()
    width = max(map(len, sequences)) + extra
    batch = {
        name: torch.full((len(sequences), width), fill)
        for name, fill in [("input_ids", PAD), ("attention_mask", 0), ("completion_mask", 0)]
    }
    for row, (tokens, (prompt, _)) in enumerate(zip(sequences, LENGTHS, strict=True)):
        start = 0 if side == "right" else width - len(tokens)
        where = slice(start, start + len(tokens))
        batch["input_ids"][row, where] = tokens
        batch["attention_mask"][row, where] = 1
        batch["completion_mask"][row, start + prompt : start + len(tokens)] = 1
    return batch


def one_by_one(model):
    """Each sequence alone, without padding, through the model's own logits."""
    logps = []
    for tokens, (prompt, _) in zip(make_sequences(), LENGTHS, strict=True):
        output = model(tokens[None])
        logits = getattr(output, "logits", output)[0]
        log_probs = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
        logps.append(log_probs[prompt - 1 :].sum())
    return torch.stack(logps)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_on_either_side_gives_the_logps_of_each_sequence_alone(name, side, chunk_size):
    model = MODELS[name]()
    ours = sequence_logps(model, **padded(side), chunk_size=chunk_size)
    theirs = one_by_one(model)
    # Attention with and without a mask sums in another order: 1e-5 of a few dozen nats.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    weights = torch.tensor([1.0, -2.0, 0.5, 1.5])
    parameters = [p for p in model.parameters() if p.requires_grad]
    for our, their in zip(
        torch.autograd.grad((weights * ours).sum(), parameters),
        torch.autograd.grad((weights * theirs).sum(), parameters),
        strict=True,
    ):
        assert (our - their).abs().max() <= 1e-4 * max(1.0, their.abs().max().item())


def test_right_padding_asks_nothing_of_the_model():
    """So a module whose forward takes tokens only, and no mask, can be scored."""
    model = TiedDecoder()
    assert padding_arguments(padded("right")["attention_mask"]) == {}
    ours = sequence_logps(model, **padded("right"))
    torch.testing.assert_close(ours, one_by_one(model), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"forward has no argument of that name"):
        sequence_logps(model, **padded("left"))


def test_positions_count_from_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    positions = padding_arguments(mask)["position_ids"]
    assert positions[0, 2:].tolist() == [0, 1, 2]
    assert positions[1, :4].tolist() == [0, 1, 2, 3]
    assert positions[2, 1:3].tolist() == [0, 1]
    assert (positions >= 0).all()


def scored(batch, model=None):
    layers = find_layers(model or TINY_MODELS["llama"]())
    hidden = layers.hidden_states(batch["input_ids"])
    masks = batch["input_ids"], batch["completion_mask"]
    return hidden, layers.head, completion_logps(hidden, layers.head, *masks, weights=True)


def test_what_nobody_asks_of_a_reference_is_nan():
    batch = padded("right")
    hidden, head, theirs = scored(batch)
    masks = batch["input_ids"], batch["completion_mask"]
    ours = completion_logps(hidden, head, *masks, statistics=False)
    assert torch.equal(ours.token_logps_BT, theirs.token_logps_BT)
    for unknown_B in (ours.entropy_B, ours.mean_logit_B, ours.top1_B):
        assert unknown_B[ours.lengths_B > 0].isnan().all()


def test_sums_match_the_full_logits():
    batch = padded("right")
    hidden, head, ours = scored(batch)
    logits = head.logits(hidden)[:, :-1]
    mask = batch["completion_mask"][:, 1:]
    targets = batch["input_ids"][:, 1:]
    logps = logits.log_softmax(-1)
    token_logps = logps.gather(2, targets[..., None]).squeeze(2) * mask
    entropy = -(logps.exp() * logps).sum(-1) * mask
    top1 = (logits.argmax(-1) == targets) * mask
    torch.testing.assert_close(ours.token_logps_BT, token_logps.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logps_B, token_logps.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy_B, entropy.sum(1).detach(), rtol=1e-5, atol=1e-5)
    mean_logits = (logits.mean(-1) * mask).sum(1).detach()
    torch.testing.assert_close(ours.mean_logit_B, mean_logits, rtol=1e-5, atol=1e-5)
    assert ours.top1_B.tolist() == top1.sum(1).tolist()
    assert ours.lengths_B.tolist() == [completion for _, completion in LENGTHS]
    assert torch.equal(ours.completion_BT, mask.bool())
    collision = logps.exp().square().sum(-1).log()
    weights = ((token_logps - collision) * mask).sum(1) / mask.sum(1).clamp(min=1)
    torch.testing.assert_close(ours.log_weights_B, weights.detach(), rtol=1e-5, atol=1e-5)
    differentiable = {name for name, values in ours._asdict().items() if values.requires_grad}
    assert differentiable == {"logps_B", "token_logps_BT"}
    parts = torch.autograd.grad(ours.token_logps_BT.sum(), hidden, retain_graph=True)
    assert torch.equal(*parts, *torch.autograd.grad(ours.logps_B.sum(), hidden))


def test_the_head_sees_completion_rows_only():
    """10 completion tokens among 4 x 9: no tensor has more than 10 rows of logits."""
    batch, head = padded("right"), Head(torch.randn(VOCAB_SIZE, 2))
    hidden = torch.randn(*batch["input_ids"].shape, 2)
    with LargestTensor() as record:
        completion_logps(hidden, head, batch["input_ids"], batch["completion_mask"])
    num_completion_tokens = sum(completion for _, completion in LENGTHS)
    assert record.elements == num_completion_tokens * VOCAB_SIZE


def test_a_sequence_without_completion_is_zero_and_harmless():
    batch = padded("right")
    batch["completion_mask"][1] = 0
    batch["completion_mask"][2, 0] = 1  # Nothing predicts the first token.
    hidden, _, ours = scored(batch)
    _, _, reference = scored(padded("right"))
    assert ours.logps_B[1] == ours.lengths_B[1] == ours.entropy_B[1] == 0
    assert ours.lengths_B[2] == LENGTHS[2][1]
    torch.testing.assert_close(ours.logps_B[[0, 2, 3]], reference.logps_B[[0, 2, 3]])
    (gradient,) = torch.autograd.grad(ours.logps_B.sum(), hidden)
    assert torch.isfinite(gradient).all()


def test_tokens_beyond_the_other_completion_weigh_less():
    """Rows 0 and 2 are a pair of 4 and 2 tokens, which share 2; rows 1 and 3 of 1 and 3 share 1."""
    batch = padded("right")
    _, _, ours = scored(batch)
    shared = {0: 2, 1: 1, 2: 2, 3: 1}
    for ld_alpha in (0.0, 0.25, 1.0):
        expected = []
        for row, (prompt, completion) in enumerate(LENGTHS):
            tokens = ours.token_logps_BT[row, prompt - 1 : prompt - 1 + completion]
            assert (tokens != 0).all()
            expected.append(tokens[: shared[row]].sum() + ld_alpha * tokens[shared[row] :].sum())
        torch.testing.assert_close(length_desensitized(ours, ld_alpha), torch.stack(expected))
    model = TINY_MODELS["llama"]()
    whole = sequence_logps(model, **batch, ld_alpha=1.0)
    torch.testing.assert_close(whole, sequence_logps(model, **batch))


def test_tokens_without_a_place_have_no_weight_of_their_own():
    _, _, ours = scored(padded("right"))
    with pytest.raises(ValueError, match=r"completion_BT=None\): must be known where tokens have"):
        length_desensitized(ours._replace(completion_BT=None), 0.5)


def test_bad_weights_of_tokens_are_named():
    model, batch = TINY_MODELS["llama"](), padded("right")
    with pytest.raises(ValueError, match=r"sequence_logps\(ld_alpha=2.0\): must be None or in"):
        sequence_logps(model, **batch, ld_alpha=2.0)
    with pytest.raises(ValueError, match=r"lengths_B.shape=\(3,\)\): the number of rows must be"):
        sequence_logps(model, **{name: rows[:3] for name, rows in batch.items()}, ld_alpha=0.5)


def test_masks_of_any_dtype():
    batch = padded("right")
    masks = {name: batch[name].bool() for name in ("attention_mask", "completion_mask")}
    model = TINY_MODELS["llama"]()
    ours = sequence_logps(model, batch["input_ids"], **masks)
    assert torch.equal(ours, sequence_logps(model, **batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(4, 3)}, r"attention_mask.shape=\(4, 3\)\): .*input_ids"),
        ({"completion_mask": torch.ones(4, 3)}, r"completion_mask.shape=\(4, 3\)\): .*input_ids"),
        ({"completion_mask": torch.ones(4, 9)}, "must be 0 wherever attention_mask is 0"),
        ({"input_ids": torch.full((4, 9), VOCAB_SIZE)}, "."),
    ],
)
def test_bad_input_is_named(change, message):
    model = PlainDecoder()
    expected = IndexError if "input_ids" in change else ValueError  # The embedding's own.
    with pytest.raises(expected, match=message):
        sequence_logps(model, **(padded("right") | change))


def test_hidden_states_of_another_batch_are_refused():
    batch = padded("right")
    hidden, head, _ = scored(batch)
    with pytest.raises(ValueError, match=r"hidden.shape=\(4, 8, 32\)\): must begin with .*\(4, 9"):
        completion_logps(hidden[:, 1:], head, batch["input_ids"], batch["completion_mask"])
