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


def test_samples_that_cannot_be_scored_are_refused(model, rows):
    with pytest.raises(ValueError, match="must be a mapping with input_ids, labels"):
        ReferenceLoss(model, "m")("text")
    with pytest.raises(ValueError, match="no token is learned"):
        ReferenceLoss(model, "m")({"input_ids": rows, "labels": torch.full_like(rows, -100)})
    masks = {"attention_mask": torch.ones(1, 9), "completion_mask": torch.ones(1, 9)}
    with pytest.raises(ValueError, match="must have two rows"):
        ReferenceMargin(model, "m")({"input_ids": rows[:1], **masks})


def test_keys_follow_the_model(model):
    assert ReferenceLoss(model, "a").key != ReferenceLoss(model, "b").key
    assert ReferenceLoss(model, "a").key != ReferenceMargin(model, "a").key
