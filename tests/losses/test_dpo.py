import copy
import math

import pytest
import torch

from lightning_align.losses import (
    Mean,
    PreferenceOptions,
    completion_logps,
    dpo_loss_from_batch,
    pairs_that_count,
    preference_step,
    sequence_logps,
)
from lightning_align.losses.sequence_logps import CompletionLogps
from tests.helpers.exact import assert_as_exact_as, value_and_gradients
from tests.helpers.largest_tensor import LargestTensor
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE

# Pairs that are none must not be sorted among the others, nor be in a mean over tokens.
COUPLED_OPTIONS = [{"loss_type": name} for name in ("aot", "aot_unpaired", "sft")]
COUPLED_OPTIONS.append({"loss_type": ["sigmoid", "sft"], "use_weighting": True})
LOSS_OPTIONS = [
    {"loss_type": "sigmoid"},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "cdpo", "label_smoothing": 0.1},
]


def make_batch(pairs=3, length=9, seed=0):
    """Right-padded [chosen; rejected] with prompts and completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    lengths = torch.randint(5, length + 1, (rows, 1), generator=generator)
    prompts = torch.randint(1, 4, (pairs, 1), generator=generator).repeat(2, 1)
    positions = torch.arange(length).expand(rows, length)
    attention_mask = (positions < lengths).long()
    return {
        "input_ids": torch.randint(1, VOCAB_SIZE, (rows, length), generator=generator)
        * attention_mask,
        "attention_mask": attention_mask,
        "completion_mask": (positions >= prompts).long() * attention_mask,
    }


def make_models():
    """A policy and a reference that differ a little in every weight."""
    model = TINY_MODELS["llama"]()
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model, reference.requires_grad_(False)


def from_sums(logps, lengths, token_logps=None):
    """Completions of which only what a test needs is known."""
    lengths = torch.as_tensor(lengths)
    zeros = torch.zeros(len(lengths))
    token_logps = torch.zeros(len(lengths), 1) if token_logps is None else token_logps
    return CompletionLogps(torch.as_tensor(logps), lengths, zeros, zeros, zeros, token_logps)


@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_before_the_first_step_no_loss_prefers_anything(options):
    """Policy = reference: all margins are 0, so the losses are log 2, 1, 1/(4 beta^2), log 2."""
    model = TINY_MODELS["llama"]()
    loss, metrics = dpo_loss_from_batch(model, copy.deepcopy(model), make_batch(), **options)
    expected = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "cdpo": math.log(2)}
    assert loss.item() == pytest.approx(expected[options["loss_type"]], rel=1e-5)
    assert metrics["kl/k2"] == metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_metrics_of_known_numbers():
    """Two pairs, beta 1/2.

    Log-ratios: chosen 2 and -4, rejected 1 and -1; rewards are half of them, the first pair is
    right and the second wrong. Lengths 1, 3, 2, 4.
    """
    policy = CompletionLogps(
        logps_B=torch.tensor([-8.0, -14.0, -9.0, -11.0], requires_grad=True),
        lengths_B=torch.tensor([1, 3, 2, 4]),
        entropy_B=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        mean_logit_B=torch.tensor([4.0, 4.0, 3.0, 9.0]),
        top1_B=torch.tensor([1.0, 2.0, 2.0, 4.0]),
        token_logps_BT=torch.tensor([[-8.0, 0.0], [-14.0, 0.0], [-9.0, 0.0], [-5.0, -6.0]]),
    )
    reference = from_sums(
        torch.full((4,), -10.0),
        policy.lengths_B,
        torch.tensor([[-10.0, 0.0], [-10.0, 0.0], [-10.0, 0.0], [-5.0, -5.0]]),
    )
    losses, metrics = preference_step(policy, reference, PreferenceOptions(beta=0.5))
    expected = [math.log1p(math.exp(-0.5 * margin)) for margin in (2 - 1, -4 - (-1))]
    assert losses.tolist() == pytest.approx(expected)
    vectors = {"length/moments", "rewards/histogram"}  # losses/test_pair_statistics.py has these
    assert vectors <= metrics.keys()
    numbers = {name: mean.value.item() for name, mean in metrics.items() if name not in vectors}
    assert numbers == pytest.approx(
        {
            "rewards/chosen": -0.5,
            "rewards/rejected": 0.0,
            "rewards/accuracies": 0.5,
            "rewards/margins": -0.5,
            "logps/chosen": -11.0,
            "logps/rejected": -10.0,
            "logits/chosen": 8 / 4,
            "logits/rejected": 12 / 6,
            "entropy": 10 / 10,
            "mean_token_accuracy": 3 / 4,
            "kl/k2": (4 + 16 + 1 + 1) / 2 / 10,
            "logps/both_fell": 0.5,
            "length/accuracy": 0.0,
        }
    )


def test_only_ipo_divides_by_the_lengths():
    """Log-ratios 12 over 4 tokens and 2 over 2: 3 - 1 per token, 10 in sum; beta 1/4 wants 2."""
    policy = from_sums([12.0, 2.0], [4, 2])
    reference = from_sums([0.0, 0.0], [4, 2])
    losses, _ = preference_step(policy, reference, PreferenceOptions("ipo", beta=0.25))
    assert losses.tolist() == pytest.approx([0.0])
    losses, _ = preference_step(policy, reference, PreferenceOptions("hinge", beta=0.05))
    assert losses.tolist() == pytest.approx([1 - 0.05 * 10])


def test_several_losses_and_each_of_them():
    """Margins of 10 and 2 at beta 0.1: hinge's losses are 0 and 0.8, ipo's 5^2 and 3^2."""
    policy = from_sums([12.0, 4.0, 2.0, 2.0], [1, 1, 1, 1])
    reference = from_sums([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1])
    options = PreferenceOptions(["hinge", "ipo"], beta=0.1, loss_weights=[2.0, 0.5])
    losses, metrics = preference_step(policy, reference, options)
    hinge, ipo = [0.0, 0.8], [(10 - 5) ** 2, (2 - 5) ** 2]
    assert losses.tolist() == pytest.approx(
        [2 * h + i / 2 for h, i in zip(hinge, ipo, strict=True)]
    )
    assert metrics["loss/hinge"].value.item() == pytest.approx(0.4)
    assert metrics["loss/ipo"].value.item() == pytest.approx(17)
    _, alone = preference_step(policy, reference, PreferenceOptions("hinge"))
    assert not any(name.startswith("loss/") for name in alone)


@pytest.mark.parametrize(
    ("options", "rewards"),
    [
        ({"loss_type": "cpo"}, (-4.0, -9.0)),
        ({"loss_type": "simpo"}, (-2.0, -3.0)),
        ({"loss_type": "orpo"}, (-2.0, -3.0)),
        ({"loss_type": "alphapo", "alphapo_alpha": 1.0}, (1 - math.exp(2), 1 - math.exp(3))),
        ({"reference_free": True}, (-4.0, -9.0)),
    ],
)
def test_without_a_reference_rewards_are_those_of_the_loss(options, rewards):
    policy = from_sums([-4.0, -9.0], [2, 3])
    _, metrics = preference_step(policy, None, PreferenceOptions(beta=1.0, **options))
    ours = metrics["rewards/chosen"].value.item(), metrics["rewards/rejected"].value.item()
    assert ours == pytest.approx(rewards)
    assert "kl/k2" not in metrics


@pytest.mark.parametrize("options", [{"loss_type": "cpo"}, {"reference_free": True}])
def test_a_reference_that_nothing_asks_for_is_left_aside(options):
    policy, reference = from_sums([-4.0, -9.0], [2, 3]), from_sums([-1.0, -20.0], [2, 3])
    options = PreferenceOptions(**options)
    given, without = (preference_step(policy, scored, options) for scored in (reference, None))
    assert torch.equal(given[0], without[0])
    assert given[1].keys() == without[1].keys()
    for name, mean in without[1].items():
        assert torch.equal(given[1][name].value, mean.value), name


def test_a_reference_that_is_asked_for_is_missed():
    with pytest.raises(ValueError, match=r"preference_step\(reference=None\): must be given with"):
        preference_step(from_sums([-4.0, -9.0], [2, 3]), None)


def test_sft_does_not_weigh_tokens_as_the_margin_does():
    """Tokens of -1, -2 and -4 nats against one: ld_alpha 0 leaves -1 of the margin, all of sft."""
    tokens = torch.tensor([[-1.0, -2.0, -4.0], [-5.0, 0.0, 0.0]])
    is_token = torch.tensor([[True, True, True], [True, False, False]])
    policy = from_sums(tokens.sum(1), [3, 1], tokens)._replace(completion_BT=is_token)
    reference = from_sums([0.0, 0.0], [3, 1], 0 * tokens)._replace(completion_BT=is_token)
    options = PreferenceOptions(["hinge", "sft"], beta=0.1, ld_alpha=0.0)
    _, metrics = preference_step(policy, reference, options)
    assert metrics["loss/hinge"].value.item() == pytest.approx(1 - 0.1 * (-1 + 5))
    assert metrics["loss/sft"].value.item() == pytest.approx(7 / 3)
    assert metrics["logps/chosen"].value == -1


def test_metrics_of_unequal_batches_add_up():
    """Totals and counts of 1 and 3 pairs give the means over all 4; means of means would not."""
    whole = make_batch(pairs=4)
    model, reference = make_models()

    def means(pairs):
        rows = [*pairs, *(pair + 4 for pair in pairs)]
        ids, mask = whole["input_ids"][rows], whole["completion_mask"][rows]
        with torch.no_grad():
            scores = [
                completion_logps(m.model(ids)[0], _head(m), ids, mask) for m in (model, reference)
            ]
        return preference_step(*scores)[1]

    together, first, rest = means([0, 1, 2, 3]), means([0]), means([1, 2, 3])
    for name, expected in together.items():
        parts = first[name], rest[name]
        merged = Mean(sum(part.total for part in parts), sum(part.count for part in parts))
        torch.testing.assert_close(merged.value, expected.value, rtol=1e-4, atol=1e-5)
    unweighted = (first["logps/chosen"].value + rest["logps/chosen"].value) / 2
    assert (unweighted - together["logps/chosen"].value).abs() > 1e-3


@pytest.mark.parametrize("options", [*LOSS_OPTIONS, *COUPLED_OPTIONS])
def test_a_pair_without_completions_counts_nothing(options):
    """Such pairs fill up the last batch of a rank."""
    model, reference = make_models()
    batch = make_batch(pairs=3)
    rows = [0, 1, 3, 4]
    expected_loss, expected = dpo_loss_from_batch(
        model, reference, {name: values[rows] for name, values in batch.items()}, **options
    )
    batch["completion_mask"][[2, 5]] = 0
    loss, metrics = dpo_loss_from_batch(model, reference, batch, **options)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", ["chosen", "rejected"])
def test_a_pair_with_one_empty_side_counts_once_everywhere(empty):
    """It is a preference: TRL counts it. All rewards are right here, so the accuracy is 1."""
    lengths = [0, 2, 3, 3] if empty == "chosen" else [2, 2, 0, 3]
    logps = [-8.0, -8.0, -12.0, -12.0]
    logps[0 if empty == "chosen" else 2] = 0.0
    policy = from_sums(logps, lengths)
    reference = from_sums([0.0 if length == 0 else -10.0 for length in lengths], lengths)
    assert pairs_that_count(policy).tolist() == [True, True]
    _, metrics = preference_step(policy, reference, PreferenceOptions(beta=1.0))
    assert metrics["rewards/accuracies"].value == 1
    # Log-ratios: 2 of what was chosen, -2 of what was rejected, 0 of the empty one.
    margins = (0 + 2, 2 + 2) if empty == "chosen" else (2 - 0, 2 + 2)
    assert metrics["rewards/margins"].value == sum(margins) / 2
    names = [name for name in metrics if name.split("/")[0] in ("rewards", "logps")]
    assert all(metrics[name].count == 2 for name in names)


def _head(model):
    from lightning_align.layers import find_layers

    return find_layers(model).head


def test_a_mean_of_nothing_is_zero():
    assert Mean(torch.tensor(0.0), torch.tensor(0)).value == 0


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("options", LOSS_OPTIONS)
def test_the_batch_function_is_the_step_on_sequence_logps(options, chunk_size):
    model, reference = make_models()
    batch = make_batch()
    loss, metrics = dpo_loss_from_batch(model, reference, batch, chunk_size=chunk_size, **options)
    lengths = batch["completion_mask"].sum(1)
    logps = [sequence_logps(m, **batch) for m in (model, reference)]
    scored = (from_sums(values, lengths) for values in logps)
    losses, _ = preference_step(*scored, PreferenceOptions(**options))
    torch.testing.assert_close(metrics["logps/chosen"], logps[0].detach()[:3].mean())
    wide, wide_reference = (copy.deepcopy(m).double() for m in (model, reference))
    exact, _ = dpo_loss_from_batch(wide, wide_reference, batch, **options)
    results = (
        value_and_gradients(value, list(m.parameters()))
        for value, m in ((loss, model), (losses.mean(), model), (exact, wide))
    )
    for ours, theirs, true in zip(*results, strict=True):
        assert_as_exact_as(ours, theirs, true)


def test_the_reference_runs_without_gradients():
    model, reference = make_models()
    reference.requires_grad_(True)
    with_gradients = []
    reference.model.norm.register_forward_hook(
        lambda *_: with_gradients.append(torch.is_grad_enabled())
    )
    loss, _ = dpo_loss_from_batch(model, reference, make_batch())
    loss.backward()
    assert with_gradients == [False]
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_swapping_the_pair_turns_rewards_around():
    model, reference = make_models()
    batch = make_batch()
    swapped = {name: torch.cat(rows.chunk(2)[::-1]) for name, rows in batch.items()}
    _, ours = dpo_loss_from_batch(model, reference, batch)
    _, turned = dpo_loss_from_batch(model, reference, swapped)
    torch.testing.assert_close(ours["rewards/margins"], -turned["rewards/margins"])
    torch.testing.assert_close(ours["logits/chosen"], turned["logits/rejected"])
    torch.testing.assert_close(ours["kl/k2"], turned["kl/k2"])


def test_no_logits_of_prompts_or_padding():
    """9 of 24 rows are completions: nothing has more than their logits, neither model."""
    vocab_size = 5000
    model = TINY_MODELS["llama"](vocab_size=vocab_size, hidden_size=4, num_attention_heads=2)
    batch = make_batch(pairs=2, length=6)
    batch["completion_mask"][:, :4] = 0
    num_completion_tokens = int(batch["completion_mask"].sum())
    assert num_completion_tokens > 4  # Below the width the weight is the largest tensor.
    with LargestTensor() as record:
        dpo_loss_from_batch(model, copy.deepcopy(model), batch)[0].backward()
    assert record.elements == num_completion_tokens * vocab_size


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite_is_refused(value):
    """-inf on both sides would be nan, and the step would be lost without a word."""
    policy = from_sums([-1.0, -2.0], [1, 1])
    with pytest.raises(ValueError, match=r"reference.logps_B=.*must be finite"):
        preference_step(policy, from_sums([-1.0, value], [1, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, r"beta=0.0\): must be positive"),
        ({"loss_type": "orbo"}, r"loss_type='orbo'\): must be one of.*nearest is 'orpo'"),
        ({"loss_type": "exo_pair"}, r"label_smoothing=0.0\): must be above 0 with exo_pair"),
        ({"loss_type": ["sigmoid"], "loss_weights": [1, 2]}, "must have one weight for each loss"),
        ({"ref_model": None}, r"ref_model=None\): must be given with loss_type='sigmoid'"),
        ({"batch": {"input_ids": torch.ones(2, 3)}}, r"\['attention_mask', 'completion_mask'\]"),
        (
            {"batch": {name: rows[1:] for name, rows in make_batch().items()}},
            r"'input_ids'\].shape=\(5, 9\)\): the number of rows must be even",
        ),
        (
            {"batch": {name: rows[:0] for name, rows in make_batch().items()}},
            "must be even and not 0",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    model, reference = make_models()
    arguments = {"model": model, "ref_model": reference, "batch": make_batch()} | change
    with pytest.raises(ValueError, match=f"dpo_loss_from_batch.*{message}"):
        dpo_loss_from_batch(**arguments)


def test_the_policy_is_no_reference():
    model, _ = make_models()
    with pytest.raises(ValueError, match=r"another object than model.*copy.deepcopy"):
        dpo_loss_from_batch(model, model, make_batch())
    with pytest.raises(ValueError, match=r"dpo_loss_from_batch\(ref_model=.*shares .* with model"):
        dpo_loss_from_batch(model, copy.copy(model), make_batch())


def test_an_odd_number_of_scored_rows_is_refused():
    three = from_sums([-1.0, -1.0, -1.0], [1, 1, 1])
    with pytest.raises(ValueError, match=r"must be even"):
        preference_step(three, three)


def pairs_with_prompts(pairs=5, width=24, seed=0):
    """Right-padded [chosen; rejected] whose two rows of a pair have one prompt."""
    batch = make_batch(pairs, width, seed)
    of_prompt = batch["attention_mask"].bool() & ~batch["completion_mask"].bool()
    chosen, rejected = batch["input_ids"].chunk(2)
    shared = of_prompt.chunk(2)[0] & of_prompt.chunk(2)[1]
    rejected[shared] = chosen[shared]
    return batch


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_weighting": True, "ld_alpha": 0.5, "length_alpha": 0.01},
        {"loss_type": ["ipo", "sft", "aot"]},
    ],
    ids=str,
)
def test_pairs_that_share_their_prompt_match_separate_rows(options, packing):
    model, reference = make_models()
    batch = pairs_with_prompts()
    options = {"beta": 0.3, **options}
    parameters = list(model.parameters())
    theirs, metrics = dpo_loss_from_batch(model, reference, batch, **options)
    sharing = {"prefix_sharing": True, "packing": packing}
    ours, our_metrics = dpo_loss_from_batch(model, reference, batch, **sharing, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, value in metrics.items():
        torch.testing.assert_close(our_metrics[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for our, their in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True
    ):
        assert (our - their).abs().max() <= 1e-5 * max(1.0, their.abs().max().item())


def test_a_router_counts_what_is_shared_for_both_sequences():
    model, batch = TINY_MODELS["mixtral"](), pairs_with_prompts()
    options = {"loss_type": "simpo", "router_aux_loss_coef": 0.5}
    theirs, metrics = dpo_loss_from_batch(model, None, batch, **options)
    ours, our_metrics = dpo_loss_from_batch(
        model, None, batch, prefix_sharing=True, packing=True, **options
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_metrics["aux_loss"], metrics["aux_loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_sharing": "yes"}, r"prefix_sharing='yes'\): must be one of 'auto', True, False"),
        ({"packing": True}, "must be False with prefix_sharing=False"),
        ({"prefix_sharing": True, "loss_type": "kto"}, "is of single completions"),
    ],
)
def test_sharing_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss_from_batch(*make_models(), make_batch(), **options)


def test_a_reference_of_another_vocabulary_is_refused():
    """Its probabilities are of other tokens."""
    model, _ = make_models()
    other = TINY_MODELS["llama"](vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match=r"its vocabulary has \d+ rows and that of model \d+"):
        dpo_loss_from_batch(model, other, make_batch())
    loss, _ = dpo_loss_from_batch(model, other, make_batch(), loss_type="cpo")  # asks for none
    assert torch.isfinite(loss)


@pytest.mark.parametrize("prefix", ["", "KL_"])
def test_a_reference_that_is_broken_is_refused_in_every_row_that_it_scores(prefix):
    """One token it gives no number to, in the completions alone or in those of other prompts."""
    model, reference = make_models()
    rows = make_batch()
    batch = {"label": torch.arange(len(rows["input_ids"])) % 2, **rows}
    batch |= {f"KL_{name}": values.clone() for name, values in rows.items()}
    broken = VOCAB_SIZE - 1
    for name in ("input_ids", "KL_input_ids"):
        batch[name] = batch[name].clamp(max=broken - 1)
    last = batch[f"{prefix}completion_mask"][0].nonzero()[-1]
    batch[f"{prefix}input_ids"][0, last] = broken
    with torch.no_grad():
        reference.get_output_embeddings().weight[broken] = -math.inf
    with pytest.raises(ValueError, match=r"reference.logps_B=.*must be finite; the reference"):
        dpo_loss_from_batch(model, reference, batch, loss_type="kto")
