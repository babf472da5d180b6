import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from lightning_align.losses.difficulty import ReferenceLoss, ReferenceMargin
from tests.helpers.tiny_models import TINY_MODELS


@pytest.fixture(scope="module")
def model():
    return TINY_MODELS["llama"]().eval()


@pytest.fixture
def rows(model):
    return torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.manual_seed(1))


def test_the_loss_is_the_mean_over_learned_tokens(model, rows):
    labels = rows.clone()
    labels[:, :4] = -100
    sample = {"input_ids": rows[:1], "labels": labels[:1]}
    logits = model(rows[:1]).logits[0, :-1]
    theirs = cross_entropy(logits, labels[0, 1:]).item()
    # Float32 sums of five terms.
    assert ReferenceLoss(model, "m")(sample) == pytest.approx(theirs, abs=1e-5)
    assert ReferenceLoss(model, "m")({"input_ids": rows[0], "labels": labels[0]}) == (
        pytest.approx(theirs, abs=1e-5)
    )


def test_the_margin_is_between_rejected_and_chosen(model, rows):
    attention = torch.ones_like(rows)
    attention[1, 7:] = 0
    completion = attention.clone()
    completion[:, :3] = 0
    sample = {"input_ids": rows, "attention_mask": attention, "completion_mask": completion}
    logps = log_softmax(model(rows).logits[:, :-1], -1)
    token_logps = logps.gather(-1, rows[:, 1:, None])[..., 0] * completion[:, 1:]
    chosen, rejected = token_logps.sum(1).tolist()
    margin = ReferenceMargin(model, "m")
    assert margin(sample) == pytest.approx(rejected - chosen, abs=1e-4)
    reverse = {name: value.flip(0) for name, value in sample.items()}
    assert margin(reverse) == pytest.approx(chosen - rejected, abs=1e-4)


def test_samples_of_several_lengths_are_scored_together(model, rows):
    """Padding changes the sums of float32 in the last bits alone."""
    alone = [
        {
            "input_ids": rows[:1, :end],
            "labels": rows[:1, :end],
            "attention_mask": rows[:1, :end] >= 0,
        }
        for end in (9, 2, 5, 7, 3)
    ]
    metric = ReferenceLoss(model, "m", batch_size=2)
    singly = [metric(sample) for sample in alone]
    assert metric.many(alone) == pytest.approx(singly, abs=1e-5)
    pairs = [dict.fromkeys(("input_ids", "attention_mask"), rows[:, :end]) for end in (9, 4, 6)]
    for pair in pairs:
        ones = torch.ones_like(pair["input_ids"])
        pair.update(attention_mask=ones, completion_mask=ones)
    margin = ReferenceMargin(model, "m", batch_size=2)
    assert margin.many(pairs) == pytest.approx([margin(pair) for pair in pairs], abs=1e-4)


def test_a_row_has_one_token_more_than_the_model_reads():
    """As blocks of TextDataModule do: the last token predicts nothing, and has no position."""
    gpt2 = TINY_MODELS["gpt2"]().eval()
    rows = torch.randint(0, 101, (1, gpt2.config.n_positions + 1))
    assert ReferenceLoss(gpt2, "m")({"input_ids": rows, "labels": rows}) > 0


def test_documents_of_a_row_do_not_see_each_other(model, rows):
    """The loss of two documents in one row is that of both for themselves, by their tokens."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    labels = rows[:1].clone()
    labels[0, 4] = -100
    metric = ReferenceLoss(model, "m")
    both = metric({"input_ids": rows[:1], "labels": labels, "position_ids": positions})
    first, second = (
        metric(dict.fromkeys(("input_ids", "labels"), x)) for x in (rows[:1, :4], rows[:1, 4:])
    )
    assert both == pytest.approx((3 * first + 4 * second) / 7, abs=1e-5)


def test_a_model_that_would_draw_difficulties_is_refused(model):
    model.train()
    try:
        with pytest.raises(ValueError, match=r"must be in evaluation mode.*model.eval\(\)"):
            ReferenceMargin(model, "m")
    finally:
        model.eval()


def test_samples_that_cannot_be_scored_are_refused(model, rows):
    with pytest.raises(ValueError, match="must be a mapping with input_ids, labels"):
        ReferenceLoss(model, "m")("text")
    with pytest.raises(ValueError, match="no token is learned"):
        ReferenceLoss(model, "m")({"input_ids": rows, "labels": torch.full_like(rows, -100)})
    sample = dict.fromkeys(("input_ids", "labels"), rows)
    with pytest.raises(ValueError, match="must all have the same names"):
        ReferenceLoss(model, "m").many([sample, {**sample, "attention_mask": rows}])
    masks = {"attention_mask": torch.ones(1, 9), "completion_mask": torch.ones(1, 9)}
    with pytest.raises(ValueError, match="must have two rows"):
        ReferenceMargin(model, "m")({"input_ids": rows[:1], **masks})


def test_keys_follow_the_model(model):
    assert ReferenceLoss(model, "a").key != ReferenceLoss(model, "b").key
    assert ReferenceLoss(model, "a").key != ReferenceMargin(model, "a").key
