"""KTO end to end against TRL 1.16: its trainer, collator and batches, on Llama and GPT-2."""

import copy

import pytest
import torch

from lightning_align.losses import dpo_loss_from_batch
from tests.losses.test_dpo_matches_trl import make_models, make_tokenizer

pytestmark = pytest.mark.peer

RECORDS = [
    {"prompt": "a b c", "completion": " d e f g", "label": True},
    {"prompt": "j", "completion": " k", "label": False},
    {"prompt": "q r", "completion": " s t u", "label": True},
    {"prompt": "v w", "completion": " x y z a b", "label": True},
]
METRICS = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
]
METRICS += ["logits/chosen", "logits/rejected", "entropy"]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_loss_gradients_and_metrics_match_the_trl_trainer(model_name, loss_type, tmp_path):
    import trl
    from datasets import Dataset

    model, reference = make_models(model_name)
    options = {"beta": 0.3, "loss_type": loss_type, "desirable_weight": 0.7}
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        bf16=False,
        per_device_train_batch_size=len(RECORDS),
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = trl.KTOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(reference),
        args=arguments,
        train_dataset=Dataset.from_list(RECORDS),
        processing_class=make_tokenizer(),
    )
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    ours, metrics = dpo_loss_from_batch(model, reference, batch, **options)
    trainer._metrics["train"].clear()
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    # fp32 sums of a few dozen nats in another order.
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    names = [*METRICS, *["kl"] * (loss_type == "kto")]
    for name in names:
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
