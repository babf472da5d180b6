"""Every loss and option that TRL 1.16 has, too, against its own code: DPO, CPO, ORPO and KTO.

TRL's methods run on log-probabilities that we hand them, in place of a model that says them aloud.
Inputs are typical, equal (policy and reference agree; all pairs are one) and extreme.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_align.losses import (
    CompletionLogps,
    PreferenceOptions,
    preference_loss,
    preference_step,
    unpaired_loss,
)

pytestmark = pytest.mark.peer

PAIRS, WIDTH = 16, 12
VALUE, GRADIENT = {"rtol": 2e-5, "atol": 2e-5}, {"rtol": 1e-4, "atol": 1e-6}
SMOOTHED = {"label_smoothing": 0.1}
# TRL's names, with the constants that each wants.
DPO_LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": SMOOTHED,
    "nca_pair": {},
    "robust": SMOOTHED,
    "bco_pair": {},
    "sppo_hard": {},
    "aot": SMOOTHED,
    "aot_unpaired": SMOOTHED,
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
MARGIN_LOSSES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]


def scored(kind, seed=0):
    """Completions under policy and reference, rows [chosen; rejected], with places of tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH, (2 * PAIRS, 1), generator=generator)
    prompts = torch.randint(0, 3, (2 * PAIRS, 1), generator=generator)
    places = torch.arange(WIDTH + 2)
    mask = (places >= prompts) & (places < prompts + lengths)
    shape = (2 * PAIRS, WIDTH + 2)
    policy = -3 * torch.rand(shape, generator=generator)
    reference = policy + 0.3 * torch.randn(shape, generator=generator)
    if kind == "equal":
        policy = reference.clone()
    elif kind == "one pair":
        policy, reference, mask = (values[:1].expand(shape) for values in (policy, reference, mask))
    elif kind == "extreme":
        scale = torch.logspace(-3, 1.5, 2 * PAIRS)[torch.randperm(2 * PAIRS, generator=generator)]
        policy = reference + scale[:, None] * torch.randn(shape, generator=generator)
    return policy * mask, reference * mask, mask


KINDS = ["typical", "equal", "one pair", "extreme"]


def trl_model():
    """What TRL asks whether it is in training, has adapters or recomputes activations."""
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    return model


def trl_dpo_loss(policy, reference, mask, log_weights=None, **options):
    """`DPOTrainer._compute_loss` on log-probabilities of tokens."""
    import trl

    settings = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    } | options
    tau = settings.pop("discopop_tau", 0.05)
    blank = torch.zeros_like(policy)
    values = {"entropy": blank, "mean_logits": blank, "is_top1": blank.bool(), "aux_loss": None}
    policy_says = SimpleNamespace(log_probs=policy, log_sum_sq_probs=log_weights, **values)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        args=SimpleNamespace(discopop_tau=tau, gradient_checkpointing_kwargs=None),
        model=trl_model(),
        ref_model=lambda **_: SimpleNamespace(log_probs=reference),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=mask.dtype), mask], 1).long()
    inputs = {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: policy_says, inputs, False)


def our_dpo_loss(policy, reference, mask, log_sum_sq=None, **options):
    lengths, blank = mask.sum(1), torch.zeros(len(mask))
    weights = None
    if log_sum_sq is not None:
        weights = ((policy.detach() - log_sum_sq) * mask).sum(1) / lengths
    scores = [
        CompletionLogps(tokens.sum(1), lengths, blank, blank, blank, tokens, mask, weights)
        for tokens in (policy, reference)
    ]
    losses, _ = preference_step(*scores, PreferenceOptions(**options))
    return losses.mean()


def assert_same_loss_and_gradient(ours, theirs, our_leaf, their_leaf):
    """Where theirs is nan ours is finite; where it is beyond fp32, ours may be, too."""
    (our,) = torch.autograd.grad(ours, our_leaf)
    if not torch.isfinite(theirs):
        assert torch.isfinite(ours) or ours == theirs
        assert torch.isfinite(our).all() or not torch.isnan(theirs)
        return
    torch.testing.assert_close(ours, theirs.to(ours.dtype), **VALUE)
    (their,) = torch.autograd.grad(theirs, their_leaf)
    is_finite = torch.isfinite(their)
    assert is_finite.sum() > 0.9 * is_finite.numel()
    torch.testing.assert_close(our[is_finite], their[is_finite], **GRADIENT)


def compare_dpo(kind, log_sum_sq=None, **options):
    policy, reference, mask = scored(kind)
    leaves = [policy.clone().requires_grad_() for _ in range(2)]
    ours_tokens, their_tokens = (leaf * mask for leaf in leaves)  # outside nothing flows on
    ours = our_dpo_loss(ours_tokens, reference, mask, log_sum_sq, **options)
    names = options.pop("loss_type", "sigmoid")
    options["loss_types"] = [names] if isinstance(names, str) else list(names)
    options.setdefault("loss_weights", [1.0] * len(options["loss_types"]))
    theirs = trl_dpo_loss(their_tokens, reference, mask, log_sum_sq, **options)
    assert_same_loss_and_gradient(ours, theirs, leaves[0], leaves[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_a_loss_matches_trl(loss_type, beta, kind):
    compare_dpo(kind, loss_type=loss_type, beta=beta, **DPO_LOSSES[loss_type])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("loss_type", MARGIN_LOSSES)
def test_alpha_divergence_matches_trl(loss_type, alpha, kind):
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    compare_dpo(kind, loss_type=loss_type, **options, **DPO_LOSSES[loss_type])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize("loss_type", MARGIN_LOSSES)
def test_other_divergences_match_trl(loss_type, divergence, kind):
    compare_dpo(kind, loss_type=loss_type, f_divergence_type=divergence, **DPO_LOSSES[loss_type])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_ld_alpha_matches_trl(loss_type, ld_alpha, kind):
    compare_dpo(kind, loss_type=loss_type, ld_alpha=ld_alpha, **DPO_LOSSES[loss_type])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_type", sorted(DPO_LOSSES.keys() - {"aot", "aot_unpaired"}))
def test_weighting_matches_trl(loss_type, kind):
    generator = torch.Generator().manual_seed(1)
    log_sum_sq = -2 * torch.rand(2 * PAIRS, WIDTH + 2, generator=generator)
    options = {"loss_type": loss_type, "use_weighting": True, **DPO_LOSSES[loss_type]}
    if loss_type in ("hinge", "sft"):  # of which TRL multiplies in place what cannot be
        with pytest.raises(RuntimeError, match=r"inplace operation|written-to tensor"):
            compare_dpo(kind, log_sum_sq=log_sum_sq, **options)
    else:
        compare_dpo(kind, log_sum_sq=log_sum_sq, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["sigmoid", "sft"], [1.0, 1.0]),
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # MPO
        (["hinge", "aot", "ipo"], [0.5, 2.0, 0.01]),
        ([*DPO_LOSSES], [0.1 * (index + 1) for index in range(len(DPO_LOSSES))]),
    ],
    ids=["rpo", "mpo", "three", "all"],
)
def test_lists_match_trl(names, weights, kind):
    compare_dpo(kind, loss_type=names, loss_weights=weights, beta=0.3, ld_alpha=0.5, **SMOOTHED)


@pytest.mark.parametrize("tau", [0.05, 1.0])
@pytest.mark.parametrize("kind", ["typical", "equal", "one pair"])
def test_temperatures_of_discopop_match_trl(tau, kind):
    compare_dpo(kind, loss_type="discopop", discopop_tau=tau, beta=0.3)


def test_discopop_is_finite_where_trl_is_not():
    """A margin of -100 makes TRL's e^100 times 0 a nan; the product is 0."""
    policy, reference = torch.zeros(2, 1), torch.zeros(2, 1)
    policy[0] = -1000.0
    mask = torch.ones(2, 1, dtype=torch.bool)
    theirs = trl_dpo_loss(policy, reference, mask, loss_types=["discopop"])
    assert torch.isnan(theirs)
    assert our_dpo_loss(policy, reference, mask, loss_type="discopop").item() == pytest.approx(100)


def test_forward_kl_is_finite_where_trl_is_not():
    policy, reference = torch.full((2, 1), -1000.0), torch.zeros(2, 1)
    mask = torch.ones(2, 1, dtype=torch.bool)
    options = {"f_divergence_type": "forward_kl"}
    assert torch.isnan(trl_dpo_loss(policy, reference, mask, **options))
    ours = our_dpo_loss(policy, reference, mask, **options)
    assert ours.item() == pytest.approx(math.log(2))


# CPO and ORPO: log-probabilities without a reference, sums or means over tokens


def pairs_of_logps(kind):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 20, (2, PAIRS), generator=generator)
    means = -3 * torch.rand(2, PAIRS, generator=generator) - 0.05
    if kind == "one pair":
        means[1] = means[0]
    elif kind == "extreme":
        means = -torch.logspace(-3, 1.3, 2 * PAIRS).view(2, PAIRS)
    return means, lengths


def compare_without_reference(kind, name, of_means, trl_loss, **options):
    means, lengths = pairs_of_logps(kind)
    ours_means, their_means = (means.clone().requires_grad_() for _ in range(2))
    chosen, rejected = ours_means * lengths
    counted = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    ours = preference_loss(chosen, rejected, loss_type=name, **counted, **options).mean()
    theirs = trl_loss(*(their_means if of_means else their_means * lengths))
    assert_same_loss_and_gradient(ours, theirs, ours_means, their_means)


def trl_cpo_loss(loss_type, beta, label_smoothing=0.0, simpo_gamma=0.5, alpha=0.0):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=alpha,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        simpo_gamma=simpo_gamma,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    return lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)[0].mean()


LIKELIHOODS = ["typical", "one pair", "extreme"]


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_cpo_matches_trl(beta, label_smoothing, kind):
    options = {"beta": beta, "label_smoothing": label_smoothing}
    compare_without_reference(kind, "cpo", False, trl_cpo_loss("sigmoid", **options), **options)


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_reference_free_losses_match_trl_cpo(loss_type, kind):
    theirs, ours = trl_cpo_loss(loss_type, 0.3), {"beta": 0.3, "reference_free": True}
    compare_without_reference(kind, loss_type, loss_type == "ipo", theirs, **ours)


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_simpo_matches_trl(gamma, label_smoothing, kind):
    options = {"beta": 2.0, "label_smoothing": label_smoothing, "simpo_gamma": gamma}
    compare_without_reference(kind, "simpo", True, trl_cpo_loss("simpo", **options), **options)


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.1, 0.25])
def test_alphapo_matches_trl(alpha, kind):
    theirs = trl_cpo_loss("simpo", 2.0, alpha=alpha)
    compare_without_reference(kind, "alphapo", True, theirs, beta=2.0, alphapo_alpha=alpha)


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_matches_trl(beta, kind):
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device=torch.device("cpu")))

    def theirs(*means):
        return -ORPOTrainer.odds_ratio_loss(trainer, *means)[0].mean()

    compare_without_reference(kind, "orpo", True, theirs, beta=beta)


# KTO


def trl_kto_loss(policy, kl_policy, reference, kl_reference, labels, **options):
    """`KTOTrainer._compute_loss` on log-probabilities of whole completions, as one token each."""
    import trl

    def says(logps):
        blank = torch.zeros(len(logps), 1)
        values = {"entropy": blank, "mean_logits": blank, "is_top1": blank.bool()}
        return SimpleNamespace(log_probs=logps[:, None], aux_loss=None, **values)

    with_kl = options["loss_type"] == "kto"
    trainer = SimpleNamespace(
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        model=trl_model(),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        calculate_KL=with_kl,
        precompute_ref_logps=True,
        _compute_kl_logps=lambda *_: kl_policy,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )
    whole = torch.tensor([[0, 1]]).repeat(len(labels), 1)
    inputs = {"input_ids": whole, "attention_mask": whole, "completion_mask": whole}
    inputs |= {"label": labels, "ref_logps": reference, "ref_KL_logps": kl_reference}
    return trl.KTOTrainer._compute_loss(trainer, lambda **_: says(policy), inputs, False)


@pytest.mark.parametrize("labels", ["both", "good", "bad"])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_matches_trl(loss_type, scale, shift, labels):
    """The KL is above, at and below 0, where it stays; policy and reference agree with scale 0."""
    generator = torch.Generator().manual_seed(3)
    logps = -50 * torch.rand(2, PAIRS, generator=generator)
    reference = logps + scale * torch.randn(2, PAIRS, generator=generator)
    reference[1] -= shift
    good = {"good": 1.0, "bad": 0.0, "both": 0.4}[labels]
    is_good = torch.rand(PAIRS, generator=generator) < good
    options = {"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    options |= {"loss_type": loss_type}
    ours_logps, their_logps = (logps[0].clone().requires_grad_() for _ in range(2))
    kl = {"kl_logps": logps[1], "ref_kl_logps": reference[1]}
    ours = unpaired_loss(ours_logps, reference[0], is_good, **kl, **options).mean()
    theirs = trl_kto_loss(their_logps, logps[1], *reference, is_good, **options)
    assert_same_loss_and_gradient(ours, theirs, ours_logps, their_logps)
