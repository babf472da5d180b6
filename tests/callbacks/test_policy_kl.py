"""KL on the policy's own samples: the exact value where it is known, whatever a folder says."""

import itertools
import random
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from transformers import GPT2Config

from lightning_align import DPOModule
from lightning_align.callbacks import policy_kl
from lightning_align.callbacks.policy_kl import (
    estimate_policy_kl,
    prompts_that_fit,
    sampled_policy,
)
from tests.helpers.resume import HandWritten
from tests.modules.test_dpo import module

TOKENIZER = SimpleNamespace(eos_token_id=0, pad_token_id=0)
PROMPT, TOKENS, LENGTH = (3, 4), 5, 3


def away(loss_type: Any = "sigmoid") -> DPOModule:
    """A policy of five tokens that is some nats away from its reference."""
    pl.seed_everything(1, verbose=False)
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=8, n_embd=8, n_layer=1, n_head=2, eos_token_id=0
    )
    ours = DPOModule(config, loss_type=loss_type)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return ours


def trainer_of(ours: pl.LightningModule) -> pl.Trainer:
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(ours)
    return trainer


def exact_kl(ours: DPOModule) -> float:
    """Over all texts of up to three tokens that end with token 0."""
    texts = [
        text
        for length in (1, 2, 3)
        for text in itertools.product(range(TOKENS), repeat=length)
        if 0 not in text[:-1] and (length == LENGTH or text[-1] == 0)
    ]
    assert len(texts) == 1 + 4 + 4 * 4 * 5
    total = 0.0
    models = ours.model, ours.reference_layers.model
    for text in texts:
        logps = []
        for each in models:
            logits = each(torch.tensor([[*PROMPT, *text]])).logits[0, 1:-1].double()
            logps.append(logits.log_softmax(-1)[range(len(text)), list(text)].sum())
        total += float(logps[0].exp() * (logps[0] - logps[1]))
    return total


def estimate(ours: DPOModule, prompts: int = 400, **options: Any) -> Any:
    options = {"max_new_tokens": LENGTH, "seed": 0, **options}
    return estimate_policy_kl(trainer_of(ours), ours, TOKENIZER, [PROMPT] * prompts, **options)


@torch.no_grad()
def test_the_estimate_is_the_exact_kl_whatever_the_folder_says_of_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A penalty and a temperature in the model's generation_config would bend what is sampled."""
    monkeypatch.setattr(policy_kl, "BATCH_SIZE", 200)
    ours = away().eval()
    ours.model.generation_config.repetition_penalty = 0.2  # with it 30 standard errors less
    ours.model.generation_config.temperature = 0.2
    ours.model.generation_config.do_sample = True
    before = ours.model.generation_config.to_dict()
    found, truth = estimate(ours, 2000), exact_kl(ours)
    assert abs(found.kl - truth) < 4 * found.standard_error
    assert 10 * found.standard_error < truth
    assert found.num_completions == 2000
    assert found.per_token > found.kl / LENGTH  # some ended before
    assert ours.model.generation_config.to_dict() == before


def test_equal_models_have_no_kl() -> None:
    found = estimate_policy_kl(
        trainer_of(ours := module()), ours, TOKENIZER, [[5, 6]] * 4, max_new_tokens=4, seed=0
    )
    assert abs(found.kl) < 1e-9


def test_ranks_share_the_prompts_and_draw_what_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 prompts are three batches; two ranks, played one after the other, add up to one."""
    ours = away()
    alone = estimate(ours, 40)
    parts: list[Any] = []

    def told(trainer: Any, own: Any) -> list[Any]:
        parts.append(own)
        return parts

    monkeypatch.setattr(policy_kl, "of_every_rank", told)
    for rank in (0, 1):
        trainer = trainer_of(ours)
        monkeypatch.setattr(type(trainer), "world_size", 2)
        monkeypatch.setattr(type(trainer), "global_rank", rank)
        together = estimate_policy_kl(
            trainer, ours, TOKENIZER, [PROMPT] * 40, max_new_tokens=LENGTH, seed=0
        )
    assert together.num_completions == 40
    assert together.kl == pytest.approx(alone.kl, rel=1e-12)
    assert estimate(ours, 40, seed=1).kl != alone.kl


def test_modes_and_generators_are_left_alone() -> None:
    ours = away().train()
    ours.model.transformer.h[0].eval()
    modes = {name: part.training for name, part in ours.named_modules()}
    draws = []
    for with_it in (False, True):
        for seeding in (random.seed, np.random.seed, torch.manual_seed):
            seeding(3)
        if with_it:
            estimate(ours, 20)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert {name: part.training for name, part in ours.named_modules()} == modes
    assert all(p.grad is None for p in ours.parameters())


def test_dropout_has_no_say() -> None:
    """Of adapters, say, which keep theirs."""
    found = []
    for p in (0.0, 0.9):
        ours = away().train()
        ours.model.transformer.drop.p = p
        found.append(estimate(ours, 20).kl)
    assert found[0] == found[1]


def test_a_model_of_nan_is_a_warning() -> None:
    ours = away()
    torch.nn.init.constant_(ours.model.transformer.wte.weight, float("nan"))
    with pytest.warns(UserWarning, match="no KL at step 0: prob"):
        assert estimate(ours, 20) is None


def test_prompts_are_spread_and_leave_room() -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10))
    prompts = [[1] * length for length in range(1, 12)]
    fitting: Any = prompts_that_fit(prompts, model, 3, max_new_tokens=4)
    assert [len(prompt) for prompt in fitting] == [1, 3, 5]
    assert len(prompts_that_fit(prompts, model, 99, max_new_tokens=4)) == 6
    rule = "of 11 there are 0 that leave room for 10 tokens.*Set val_fraction or val_paths"
    with pytest.raises(ValueError, match=rule):
        prompts_that_fit(prompts, model, 3, max_new_tokens=10)


def test_who_has_no_reference_to_compare_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it has no reference with loss_type='simpo'.*Leave kl_"):
        sampled_policy(away("simpo"))
    with pytest.raises(ValueError, match="it does not say what its reference is"):
        sampled_policy(HandWritten())
    cached = module(precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="its reference is released once it is precomputed"):
        sampled_policy(cached)
    assert sampled_policy(ours := away()) is ours.model
