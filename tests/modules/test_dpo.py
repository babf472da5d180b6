"""DPOModule: the frozen reference, dropout, weighting of unequal batches, metrics, bad input."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, LlamaConfig

from lightning_align import DPOModule
from lightning_align.losses import dpo_loss_from_batch
from lightning_align.modules.dpo import turn_off_dropout
from lightning_align.modules.reference import fingerprint_until_0_1
from tests.modules.test_pretrain import assert_same_sums, fit, gpt2, llama, weights

VOCABULARY = 61
CONFIGS = {"llama": llama(attention_dropout=0.3), "gpt2": gpt2(0.3)}
LOSS_TYPES = ["sigmoid", "hinge", "ipo", "cdpo"]


def pairs(*seeds: int) -> dict[str, torch.Tensor]:
    """One pair a seed: a prompt of four tokens, completions of unequal length, right-padded."""
    chosen, rejected = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for rows, length in ((chosen, 3 + seed % 4), (rejected, 2 + seed % 5)):
            tokens = torch.randint(1, VOCABULARY, (4 + length,), generator=generator)
            if rows is rejected:
                tokens[:4] = chosen[-1][:4]
            rows.append(tokens)
    width = 12
    ids = torch.zeros(2 * len(seeds), width, dtype=torch.long)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, tokens in enumerate([*chosen, *rejected]):
        ids[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = 1
        completion[row, 4 : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def module(config: Any = CONFIGS["llama"], **options: Any) -> DPOModule:
    pl.seed_everything(1, verbose=False)
    return DPOModule(config, optimizer=partial(torch.optim.SGD, lr=0.5), **options)


def step(ours: DPOModule, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    return ours.loss_from_hidden(ours.forward_hidden(**ours.model_inputs(batch)), batch)


@pytest.mark.parametrize("family", CONFIGS)
def test_first_loss_is_log_two_in_training_mode_with_dropout_in_the_config(family: str) -> None:
    """Policy and reference agree before the first step, so sigmoid(0) = 1/2 for every pair."""
    ours = module(CONFIGS[family]).train()
    loss, sums = step(ours, pairs(0, 1, 2))
    assert float(loss) / 3 == pytest.approx(0.6931471805599453, rel=1e-6)
    assert float(sums["rewards/margins"][0]) == 0.0
    assert float(sums["kl/k2"][0]) == 0.0


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_step_equals_the_function_on_the_batch(family: str, loss_type: str) -> None:
    smoothing = 0.1 if loss_type == "cdpo" else 0.0
    options = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": smoothing}
    ours = module(CONFIGS[family], **options)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = pairs(0, 1, 2)
    loss, sums = step(ours, batch)
    reference = ours.reference_layers.model
    theirs, metrics = dpo_loss_from_batch(ours.model, reference, batch, **options)
    torch.testing.assert_close(loss / 3, theirs, rtol=1e-6, atol=0)
    for name, value in metrics.items():
        total, count = sums[name]
        torch.testing.assert_close(total / count, value, rtol=1e-6, atol=1e-7)


def test_reference_has_no_parameters_and_no_checkpoint_keys_but_follows_casts() -> None:
    ours = module()
    alone = {f"model.{name}" for name in ours.model.state_dict()}
    assert set(ours.state_dict()) == alone
    assert len(list(ours.parameters())) == len(list(ours.model.parameters()))
    reference = ours.frozen_modules()["reference"]
    assert not any(p.requires_grad for p in reference.parameters())
    ours.double()
    assert {p.dtype for p in reference.parameters()} == {torch.float64}


def test_training_moves_the_policy_and_leaves_the_reference() -> None:
    ours = module()
    policy, reference = weights(ours.model), weights(ours.reference_layers.model)
    fit(ours, [pairs(0, 1), pairs(2, 3)])
    assert not torch.equal(weights(ours.model), policy)
    assert torch.equal(weights(ours.reference_layers.model), reference)
    assert not ours.reference_layers.model.training


@pytest.mark.parametrize("family", CONFIGS)
def test_training_prefers_the_chosen_completion(family: str) -> None:
    ours = module(CONFIGS[family])
    trainer = fit(ours, [pairs(0, 1, 2, 3)], max_epochs=20)
    assert float(trainer.callback_metrics["rewards/accuracies"]) == 1.0
    assert float(trainer.callback_metrics["train_loss"]) < 0.69


def test_accumulation_with_unequal_pair_counts_equals_the_one_big_batch() -> None:
    one, many = module().double(), module().double()
    fit(one, [pairs(0, 1, 2, 3)])
    fit(many, [pairs(0), pairs(1, 2, 3)], accumulate_grad_batches=2)
    assert_same_sums(many, one)


def test_two_ranks_with_unequal_pair_counts_equal_the_one_big_batch() -> None:
    one, two = module().double(), module().double()
    fit(one, [pairs(0, 1, 2, 3)])
    fit(two, [pairs(0), pairs(1, 2, 3)], strategy="ddp_fork", devices=2)
    assert_same_sums(two, one)


def test_pair_without_completions_teaches_and_counts_nothing() -> None:
    """What a sampler gives a rank that is left without a pair."""
    batch = pairs(0, 1)
    alone = step(module(), {name: rows[[0, 2]] for name, rows in batch.items()})
    batch["completion_mask"][[1, 3]] = 0
    loss, sums = step(module(), batch)
    torch.testing.assert_close(loss, alone[0])
    for name, (total, count) in sums.items():
        torch.testing.assert_close(total.double(), alone[1][name][0].double(), msg=name)
        assert int(count) == int(alone[1][name][1]), name


@pytest.mark.parametrize("row", [0, 2])
def test_a_pair_with_one_empty_side_is_weighted_as_in_the_function_of_a_batch(row: int) -> None:
    ours, batch = module(), pairs(0, 1)
    batch["completion_mask"][row] = 0
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loss, sums = step(ours, batch)
    theirs, metrics = dpo_loss_from_batch(ours.model, ours.reference_layers.model, batch)
    assert int(sums["loss"][1]) == 2
    torch.testing.assert_close(loss / 2, theirs, rtol=1e-6, atol=0)
    for name, value in metrics.items():
        total, count = sums[name]
        torch.testing.assert_close(total / count, value, rtol=1e-6, atol=1e-7)


def test_logs_trl_names_and_validates_with_a_prefix() -> None:
    ours = module()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader([pairs(0, 1)], batch_size=None)
    trainer.fit(ours, loader, loader)
    names = {
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
    }
    logged = set(trainer.callback_metrics)
    assert names <= logged
    assert {f"val_{name}" for name in names} <= logged
    assert {"train_loss", "val_loss", "grad_norm", "lr", "tokens_per_second"} - logged <= {
        "tokens_per_second"  # needs a second step
    }
    assert int(trainer.callback_metrics["tokens_seen"]) == int(pairs(0, 1)["completion_mask"].sum())


def test_predict_gives_the_rewards_of_each_pair() -> None:
    ours = module()
    fit(ours, [pairs(0, 1)], max_epochs=5)
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (rewards,) = trainer.predict(ours, DataLoader([pairs(0, 1)], batch_size=None))
    _, sums = step(ours, pairs(0, 1))
    assert rewards.shape == (2, 2)
    torch.testing.assert_close(rewards.sum(0)[0], sums["rewards/chosen"][0])
    torch.testing.assert_close(rewards.sum(0)[1], sums["rewards/rejected"][0])


# Checkpoints


def test_checkpoint_rebuilds_policy_and_reference_from_a_folder(tmp_path: Path) -> None:
    module().model.save_pretrained(tmp_path / "folder")
    ours = DPOModule(str(tmp_path / "folder"), optimizer=partial(torch.optim.SGD, lr=0.5))
    fit(ours, [pairs(0, 1)]).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    restored = DPOModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(weights(restored), weights(ours))
    assert torch.equal(
        weights(restored.reference_layers.model), weights(ours.reference_layers.model)
    )


def test_checkpoint_against_another_reference_is_refused(tmp_path: Path) -> None:
    """A configuration with random weights gives another reference each time."""
    fit(module(), [pairs(0, 1)]).save_checkpoint(tmp_path / "a.ckpt")
    pl.seed_everything(2, verbose=False)
    with pytest.raises(ValueError, match="was trained against another reference"):
        DPOModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def test_a_checkpoint_says_what_differs_in_the_reference(tmp_path: Path) -> None:
    ours = module()
    fit(ours, [pairs(0, 1)]).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    other = copy.deepcopy(module().model)
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    with pytest.raises(ValueError, match="another reference, which differs in its configuration"):
        fit(module(ref_model=other), [pairs(0, 1)], ckpt_path=tmp_path / "a.ckpt")
    with torch.no_grad():
        other.lm_head.weight.neg_()
    with pytest.raises(ValueError, match="which differs in its weights and configuration"):
        fit(module(ref_model=other), [pairs(0, 1)], ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_an_older_version_is_read_with_a_warning(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """It holds one hash, an XOR: of other weights it is refused, where they were not cast since."""
    fit(module(), [pairs(0, 1)]).save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)

    def resume(reference: str) -> None:
        checkpoint["reference"] = reference
        torch.save(checkpoint, tmp_path / "old.ckpt")
        ours = module().to(dtype)
        fit(ours, [pairs(0, 1)], ckpt_path=tmp_path / "old.ckpt", max_epochs=2)

    with pytest.warns(UserWarning, match="cannot be told for certain"):
        resume(fingerprint_until_0_1(module().reference_layers.model))
    if dtype == torch.float32:
        with pytest.raises(ValueError, match="trained against another reference"):
            resume("0" * 32)
    else:
        with pytest.warns(UserWarning, match="cannot be told for certain"):
            resume("0" * 32)


@pytest.mark.parametrize("family", CONFIGS)
def test_activation_checkpointing_is_bit_identical(family: str) -> None:
    plain, recomputed = (
        module(CONFIGS[family], activation_checkpointing=on) for on in (False, True)
    )
    for ours in (plain, recomputed):
        fit(ours, [pairs(0, 1), pairs(2)])
    assert torch.equal(weights(plain), weights(recomputed))


def test_turn_off_dropout_reaches_modules_and_functional_probabilities() -> None:
    from transformers import AutoModelForCausalLM

    for config in CONFIGS.values():
        model = AutoModelForCausalLM.from_config(config).train()
        tokens = pairs(0)["input_ids"]
        assert not torch.equal(model(tokens).logits, model(tokens).logits)
        turn_off_dropout(model)
        assert torch.equal(model(tokens).logits, model(tokens).logits)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"DPOModule\(beta=0.0\): must be positive"),
        ({"beta": 10**400}, r"DPOModule\(beta=10+\): must be positive and finite"),
        ({"loss_type": "dpo"}, r"loss_type='dpo'\): must be one of 'cdpo', 'hinge', 'ipo'"),
        ({"label_smoothing": 0.5, "loss_type": "cdpo"}, r"label_smoothing=0.5\): must be in"),
        ({"label_smoothing": 0.1}, r"must be 0 with loss_type='sigmoid'"),
        ({"ref_model": llama(vocab_size=60)}, r"its vocabulary has 60 rows and that of model 61"),
        ({"ref_model": LlamaConfig}, r"ref_model=.*must be a module, a Hugging Face name"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_policy_and_reference_must_be_two_objects() -> None:
    model = module().model
    with pytest.raises(ValueError, match="must be another object than model"):
        DPOModule(model, ref_model=model)
    assert DPOModule(model, ref_model=copy.deepcopy(model)).model is model


class HandWrittenDecoder(nn.Module):
    """A decoder that knows nothing of us: causal means over the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        steps = torch.arange(1, hidden.shape[1] + 1).view(1, -1, 1)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden.cumsum(1) / steps))
        return self.head(hidden)


def test_aligns_a_hand_written_model() -> None:
    pl.seed_everything(1, verbose=False)
    ours = DPOModule(HandWrittenDecoder(), optimizer=partial(torch.optim.SGD, lr=0.5))
    trainer = fit(ours, [pairs(0, 1, 2, 3)], max_epochs=20)
    assert float(trainer.callback_metrics["rewards/accuracies"]) == 1.0


def test_gpt2_config_is_a_class_of_its_own() -> None:
    assert isinstance(CONFIGS["gpt2"], GPT2Config)
