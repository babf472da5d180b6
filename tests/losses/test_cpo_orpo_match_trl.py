"""Losses without a reference end to end against TRL 1.16: its CPO and ORPO trainers and batches."""

import copy

import pytest
import torch

from lightning_align.losses import dpo_loss_from_batch
from tests.losses.test_dpo_matches_trl import PAIRS, make_models, make_tokenizer

pytestmark = [pytest.mark.peer, pytest.mark.slow]

# Ours, and how TRL spells it; its CPO has a likelihood of its own, which is `sft` in our list.
CPO_LOSSES = {
    "cpo": ({"loss_type": ["cpo", "sft"], "loss_weights": [1.0, 0.5]}, {"cpo_alpha": 0.5}),
    "simpo": (
        {"loss_type": "simpo", "simpo_gamma": 1.0},
        {"loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    ),
    "alphapo": (
        {"loss_type": "alphapo", "alphapo_alpha": 0.1},
        {"loss_type": "alphapo", "alpha": 0.1},
    ),
    "ipo": (
        {"loss_type": "ipo", "reference_free": True},
        {"loss_type": "ipo", "cpo_alpha": 0.0},
    ),
}
METRICS = ["rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]


def trainer_and_batch(kind, model, folder, **options):
    """A trainer of TRL's, its batch of our pairs, and the same batch with our names."""
    import trl.experimental.cpo
    import trl.experimental.orpo
    from datasets import Dataset

    module = {"CPO": trl.experimental.cpo, "ORPO": trl.experimental.orpo}[kind]
    arguments = getattr(module, f"{kind}Config")(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        bf16=False,
        beta=0.3,
        max_length=32,
        remove_unused_columns=False,
        **options,
    )
    trainer = getattr(module, f"{kind}Trainer")(
        model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    whole = trainer.concatenated_inputs(batch, padding_value=0, device=torch.device("cpu"))
    ours = {
        "input_ids": whole["concatenated_input_ids"],
        "attention_mask": whole["concatenated_attention_mask"],
        "completion_mask": (whole["concatenated_labels"] != -100).long(),
    }
    return trainer, batch, ours


def assert_same_gradients(ours, theirs, model, their_model):
    their_parameters = dict(their_model.named_parameters())
    gradients = torch.autograd.grad(ours, list(model.parameters()))
    their_gradients = torch.autograd.grad(
        theirs, [their_parameters[name] for name, _ in model.named_parameters()]
    )
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    for our, their in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CPO_LOSSES)
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_loss_gradients_and_metrics_match_the_cpo_trainer(model_name, name, tmp_path):
    our_options, their_options = CPO_LOSSES[name]
    model, _ = make_models(model_name)
    trainer, batch, ours_batch = trainer_and_batch("CPO", model, tmp_path, **their_options)
    ours, metrics = dpo_loss_from_batch(model, None, ours_batch, beta=0.3, **our_options)
    theirs, their_metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    if name != "ipo":  # whose rewards TRL gives per token
        for metric in METRICS:
            assert metrics[metric].item() == pytest.approx(their_metrics[metric], rel=1e-4), metric
    assert_same_gradients(ours, theirs, model, trainer.model)


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_the_preference_term_matches_the_orpo_trainer(model_name, tmp_path):
    """Its likelihood is over prompt and answer; ours, `sft`, over the answer."""
    model, _ = make_models(model_name)
    trainer, batch, ours_batch = trainer_and_batch("ORPO", model, tmp_path)
    ours, metrics = dpo_loss_from_batch(model, None, ours_batch, beta=0.3, loss_type="orpo")
    theirs, their_metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    torch.testing.assert_close(
        ours.item(), theirs.item() - their_metrics["nll_loss"], rtol=2e-5, atol=2e-5
    )
    for metric in METRICS:
        assert metrics[metric].item() == pytest.approx(their_metrics[metric], rel=1e-4), metric
