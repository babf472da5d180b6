"""Our preference losses against TRL 1.16, which runs its own code here: nothing is copied."""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_align.losses import dpo_loss_from_batch, preference_loss
from tests.helpers.tiny_models import TINY_MODELS, VOCAB_SIZE

pytestmark = pytest.mark.peer

PAIRS = [
    {"prompt": "a b c", "chosen": " d e f g", "rejected": " h i"},
    {"prompt": "j", "chosen": " k", "rejected": " l m n o p"},
    {"prompt": "q r", "chosen": " s t u", "rejected": " v w x"},
]
# Ours, and how TRL spells it. TRL's DPO has no cDPO of its own, but its distribution-matching loss
# `aot` sorts the margins of a batch before it smooths them, so for a single pair it is cDPO.
LOSS_OPTIONS = {
    "sigmoid": ({"loss_type": "sigmoid"}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"loss_type": "hinge"}, {"loss_type": ["hinge"]}),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "cdpo": (
        {"loss_type": "cdpo", "label_smoothing": 0.2},
        {"loss_type": ["aot"], "label_smoothing": 0.2},
    ),
    "a list": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    ),
    "aot": (
        {"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.1},
        {"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.1},
    ),
    "options": (
        {"loss_type": "sigmoid_norm", "ld_alpha": 0.3, "use_weighting": True},
        {"loss_type": ["sigmoid_norm"], "ld_alpha": 0.3, "use_weighting": True},
    ),
    "divergence": (
        {"loss_type": "discopop", "f_divergence_type": "alpha_divergence", "discopop_tau": 0.5},
        {"loss_type": ["discopop"], "f_divergence_type": "alpha_divergence", "discopop_tau": 0.5},
    ),
}
METRICS = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
]


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"w{index}" for index in range(VOCAB_SIZE - len(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, "<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_models(name):
    """A policy and a reference that differ a little in every weight."""
    model = TINY_MODELS[name]()
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model, reference


def make_trainer(model, reference, folder, **options):
    import trl
    from datasets import Dataset

    arguments = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, report_to=[], beta=0.3, bf16=False, **options
    )
    return trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss_name", LOSS_OPTIONS)
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_loss_gradients_and_metrics_match_the_trl_trainer(model_name, loss_name, tmp_path):
    ours_options, theirs_options = LOSS_OPTIONS[loss_name]
    model, reference = make_models(model_name)
    # TRL replaces the forward of what it is given.
    trainer = make_trainer(
        copy.deepcopy(model), copy.deepcopy(reference), tmp_path, **theirs_options
    )
    trainer.model.train()
    examples = list(trainer.train_dataset)
    for pairs in [[example] for example in examples] if loss_name == "cdpo" else [examples]:
        batch = trainer.data_collator(pairs)
        ours, metrics = dpo_loss_from_batch(model, reference, batch, beta=0.3, **ours_options)
        trainer._metrics["train"].clear()
        theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)
        # fp32 sums of a few dozen nats in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        for name in METRICS:
            (their_value,) = trainer._metrics["train"][name]
            assert metrics[name].item() == pytest.approx(their_value, rel=1e-4, abs=1e-4), name

        their_parameters = dict(trainer.model.named_parameters())
        gradients = torch.autograd.grad(ours, list(model.parameters()))
        their_gradients = torch.autograd.grad(
            theirs, [their_parameters[name] for name, _ in model.named_parameters()]
        )
        assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
        for our, their in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_the_loss_of_a_router_matches_the_trl_trainer(coefficient, tmp_path):
    """None takes the weight of the model's configuration, on both sides."""
    model, reference = make_models("mixtral")
    trainer = make_trainer(
        copy.deepcopy(model),
        copy.deepcopy(reference),
        tmp_path,
        router_aux_loss_coef=coefficient,
        loss_type=["sigmoid"],
    )
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    ours, metrics = dpo_loss_from_batch(
        model, reference, batch, beta=0.3, router_aux_loss_coef=coefficient
    )
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert metrics["aux_loss"].item() == pytest.approx(trainer._metrics["train"]["aux_loss"][0])
    name = "model.layers.0.mlp.gate.weight"
    our_router, their_router = (dict(m.named_parameters())[name] for m in (model, trainer.model))
    (our,) = torch.autograd.grad(ours, our_router)
    (their,) = torch.autograd.grad(theirs, their_router)
    assert our.abs().max() > 1e-3
    torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss_name", ["sigmoid", "hinge"])
@pytest.mark.parametrize("row", [0, 4], ids=["chosen", "rejected"])
def test_a_pair_with_one_empty_side_counts_as_in_the_trl_trainer(row, loss_name, tmp_path):
    ours_options, theirs_options = LOSS_OPTIONS[loss_name]
    model, reference = make_models("llama")
    trainer = make_trainer(
        copy.deepcopy(model), copy.deepcopy(reference), tmp_path, **theirs_options
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    batch["completion_mask"][row] = 0
    ours, metrics = dpo_loss_from_batch(model, reference, batch, beta=0.3, **ours_options)
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name in METRICS:
        (their_value,) = trainer._metrics["train"][name]
        assert metrics[name].item() == pytest.approx(their_value, rel=1e-4, abs=1e-4), name


def their_losses(logps, lengths, beta, loss_type, label_smoothing=0.0):
    """TRL's own `_compute_loss` on given log-probabilities: a model that says them aloud."""
    import trl

    chosen, rejected, ref_chosen, ref_rejected = logps
    width = int(max(map(max, lengths))) + 1
    completion_mask = torch.cat(
        [(torch.arange(width) < length[:, None]).long().flip(1) for length in lengths]
    )
    token_logps = torch.zeros(len(completion_mask), width)
    token_logps[:, -1] = torch.cat([chosen, rejected])
    blank = torch.zeros_like(token_logps)
    outputs = SimpleNamespace(
        log_probs=token_logps, entropy=blank, mean_logits=blank, is_top1=blank.bool()
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_random_log_probabilities_match_trl(loss_type, beta):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (2, 64), generator=generator)
    for scale in (0.1, 3.0, 100.0):
        logps = scale * torch.randn(4, 64, generator=generator)
        ours_logps = logps.clone().requires_grad_()
        theirs_logps = logps.clone().requires_grad_()
        extra = dict(zip(["chosen_lengths", "rejected_lengths"], lengths, strict=True))
        options = extra if loss_type == "ipo" else {}
        ours = preference_loss(*ours_logps, loss_type=loss_type, beta=beta, **options).mean()
        theirs = their_losses(theirs_logps, lengths, beta, loss_type)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        (our_gradient,) = torch.autograd.grad(ours, ours_logps)
        (their_gradient,) = torch.autograd.grad(theirs, theirs_logps)
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
def test_random_log_probabilities_match_the_smoothing_of_trl_cpo(beta, label_smoothing):
    """CPO is DPO with an indifferent reference; it still has the smoothing. Log-ratios go in."""
    from trl.experimental.cpo import CPOTrainer

    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 100.0):
        logps = scale * torch.randn(4, 64, generator=generator)
        ours = preference_loss(*logps, loss_type="cdpo", beta=beta, label_smoothing=label_smoothing)
        trainer = SimpleNamespace(
            alpha=0.0,
            beta=beta,
            label_smoothing=label_smoothing,
            loss_type="sigmoid",
            accelerator=SimpleNamespace(device=torch.device("cpu")),
        )
        theirs, _, _ = CPOTrainer.cpo_loss(trainer, logps[0] - logps[2], logps[1] - logps[3])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.45])
def test_random_single_pairs_match_trl_aot(label_smoothing):
    logps = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    lengths = torch.ones(2, 1, dtype=torch.long)
    ours = preference_loss(*logps, loss_type="cdpo", beta=0.3, label_smoothing=label_smoothing)
    theirs = torch.stack(
        [
            their_losses(logps[:, pair : pair + 1], lengths, 0.3, "aot", label_smoothing)
            for pair in range(logps.shape[1])
        ]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
