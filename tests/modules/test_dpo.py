"""DPOModule: the frozen reference, dropout, weighting of unequal batches, metrics, bad input."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from lightning_align import DPOModule, PreferenceDataModule
from lightning_align.losses import dpo_loss_from_batch, with_margins
from lightning_align.modules.frozen_reference import turn_off_dropout
from lightning_align.modules.reference import fingerprint_until_0_1
from tests.helpers.byte_tokenizer import ByteTokenizer
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
    batch = ours.prepared(batch)
    return ours.loss_from_hidden(ours.forward_hidden(**ours.model_inputs(batch)), batch)


@pytest.mark.parametrize("family", CONFIGS)
def test_first_loss_is_log_two_in_training_mode_with_dropout_in_the_config(family: str) -> None:
    """Policy and reference agree before the first step, so sigmoid(0) = 1/2 for every pair."""
    ours = module(CONFIGS[family]).train()
    loss, sums = step(ours, pairs(0, 1, 2))
    assert float(loss) / 3 == pytest.approx(0.6931471805599453, rel=1e-6)
    assert float(sums["rewards/margins"][0]) == 0.0
    assert float(sums["kl/k2"][0]) == 0.0


def moved(ours: DPOModule) -> DPOModule:
    """The same, its policy a little away from its reference."""
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return ours


def test_the_progress_bar_has_loss_accuracy_and_margin() -> None:
    trainer = fit(module(), [pairs(0, 1)])
    shown = {"train_loss", "rewards/accuracies", "rewards/margins"}
    assert shown <= set(trainer.progress_bar_metrics)


def assert_step_equals_the_function(
    ours: DPOModule, batch: dict[str, torch.Tensor], **options: Any
) -> None:
    loss, sums = step(moved(ours), batch)
    reference = ours.frozen_modules().get("reference")
    theirs, metrics = dpo_loss_from_batch(ours.model, reference, batch, **options)
    torch.testing.assert_close(loss / sums["loss"][1], theirs, rtol=1e-6, atol=0)
    means = {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}
    means = ours.derived_metrics(means)
    for name, value in metrics.items():
        torch.testing.assert_close(means[name], value, rtol=1e-6, atol=1e-7)
    assert means.keys() - metrics.keys() == {"loss", "tokens"}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_step_equals_the_function_on_the_batch(family: str, loss_type: str) -> None:
    smoothing = 0.1 if loss_type == "cdpo" else 0.0
    options = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": smoothing}
    assert_step_equals_the_function(module(CONFIGS[family], **options), pairs(0, 1, 2), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss_type": ["hinge", "aot"], "label_smoothing": 0.1},
        {"loss_type": ["simpo", "sft"], "sft_mean": "pairs"},
        {"loss_type": "orpo"},
        {"use_weighting": True, "ld_alpha": 0.5, "length_alpha": 0.01},
        {"f_divergence_type": "js_divergence", "reference_free": True},
    ],
    ids=str,
)
def test_step_with_options_equals_the_function_on_the_batch(options: dict[str, Any]) -> None:
    assert_step_equals_the_function(module(**options), pairs(0, 1, 2), **options)


@pytest.mark.parametrize("options", [{"loss_type": "cpo"}, {"reference_free": True}], ids=str)
def test_a_loss_that_needs_no_reference_has_none(options: dict[str, Any], tmp_path: Path) -> None:
    """Neither a copy in memory nor its forward; checkpoints know of none."""
    ours = module(**options)
    assert ours.frozen_modules() == ours.frozen_copies() == {}
    trainer = fit(ours, [pairs(0, 1)], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "kl/k2" not in trainer.callback_metrics
    again = module(**options)
    fit(again, [pairs(0, 1)], ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert not torch.equal(weights(again), weights(ours))


UNPAIRED = {
    **{name: rows[:3] for name, rows in pairs(0, 1, 2).items()},
    **{f"KL_{name}": rows[[2, 0, 1]] for name, rows in pairs(0, 1, 2).items()},
    "label": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_unpaired_step_equals_the_function_on_the_batch(loss_type: str) -> None:
    options = {"loss_type": loss_type, "beta": 0.3, "desirable_weight": 1.5}
    assert_step_equals_the_function(module(**options), UNPAIRED, **options)


def test_training_on_unpaired_records_tells_good_from_bad() -> None:
    ours = module(loss_type="kto")
    trainer = fit(ours, [UNPAIRED], max_epochs=20)
    assert float(trainer.callback_metrics["rewards/margins"]) > 0
    assert float(trainer.callback_metrics["rewards/chosen"]) > 0
    rewards = ours.predict_step(UNPAIRED, 0)
    assert rewards.shape == (3,)
    assert rewards[1] < min(rewards[0], rewards[2])


def unpaired_data(folder: Path, **options: Any) -> PreferenceDataModule:
    rows = [
        {"prompt": f"{n % 7}", "completion": "yes" if n % 3 else "no", "label": n % 3 > 0}
        for n in range(10)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreferenceDataModule(folder / "records.jsonl", ByteTokenizer(), **options)


def test_trains_on_unpaired_records_from_a_file(tmp_path: Path) -> None:
    ours = module(llama(vocab_size=300), loss_type="kto")
    trainer = pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(ours, unpaired_data(tmp_path, batch_size=4, val_fraction=0.3))
    metrics = trainer.callback_metrics
    assert metrics["rewards/margins"] > 0
    assert metrics["kl"] >= 0
    assert {"val_rewards/chosen", "val_kl", "val_loss"} <= metrics.keys()


def test_kto_needs_other_records_in_a_batch(tmp_path: Path) -> None:
    ours, data = (
        module(llama(vocab_size=300), loss_type="kto"),
        unpaired_data(tmp_path, batch_size=1),
    )
    with pytest.raises(ValueError, match=r"loss_type='kto'\): estimates a KL.*batch_size to 2"):
        pl.Trainer(max_epochs=1, accelerator="cpu", logger=False).fit(ours, data)


def test_kto_says_that_its_kl_is_of_each_micro_batch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(module(loss_type="kto"), [UNPAIRED, UNPAIRED], accumulate_grad_batches=2)
    assert caplog.text.count("on each rank alone, the KL of kto of that of all ranks, as TRL") == 1


def test_unpaired_records_accumulate_exactly_without_a_kl() -> None:
    parts = [{name: rows[part] for name, rows in UNPAIRED.items()} for part in ([0], [1, 2])]
    options = {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0}
    one, many = module(**options).double(), module(**options).double()
    fit(one, [UNPAIRED])
    fit(many, parts, accumulate_grad_batches=2)
    assert_same_sums(many, one)


def test_batches_of_the_other_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_type='sigmoid'\): is a loss of pairs; the batch"):
        step(module(), UNPAIRED)
    with pytest.raises(ValueError, match=r"loss_type='kto'\): is a loss of unpaired records"):
        step(module(loss_type="kto"), pairs(0, 1))
    without = {name: rows for name, rows in UNPAIRED.items() if not name.startswith("KL_")}
    with pytest.raises(ValueError, match=r"must hold .* lacks KL_input_ids, KL_"):
        step(module(loss_type="kto"), without)


def mixture_of_experts(**options: Any) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        **options,
    )


COUPLED = [
    (CONFIGS["llama"], {"loss_type": "aot_unpaired", "beta": 5.0}),
    (CONFIGS["llama"], {"loss_type": ["sigmoid", "sft"]}),
    (mixture_of_experts(), {"router_aux_loss_coef": 0.5}),
]


@pytest.mark.parametrize(("config", "options"), COUPLED, ids=["aot", "sft", "router"])
def test_a_loss_of_the_whole_batch_is_taken_of_each_micro_batch(
    config: Any, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Said once at set-up: the mean of theirs, weighed by pairs, as in TRL with equal batches."""
    batches = [pairs(0), pairs(1, 2, 3)]
    ours = moved(module(config, **options))
    parts = [step(ours, batch)[0] for batch in batches]
    whole = step(ours, pairs(0, 1, 2, 3))[0]
    assert not torch.allclose(sum(parts), whole, rtol=1e-6)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(module(config, **options), batches, accumulate_grad_batches=2)
        assert caplog.text.count("depends on all of its pairs together") == 1
        caplog.clear()
        fit(module(config, **options), batches)
        assert "depends on" not in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "sft_mean": "pairs"},
        {"loss_type": ["simpo", "orpo"], "use_weighting": True},
        {"ld_alpha": 0.3, "f_divergence_type": "forward_kl"},
    ],
    ids=str,
)
def test_all_other_losses_accumulate_exactly(options: dict[str, Any]) -> None:
    one, many = module(**options).double(), module(**options).double()
    fit(one, [pairs(0, 1, 2, 3)])
    fit(many, [pairs(0), pairs(1, 2, 3)], accumulate_grad_batches=2)
    assert_same_sums(many, one)


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


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": ["orpo", "sft"], "sft_mean": "pairs", "use_weighting": True}],
    ids=["sigmoid", "a list"],
)
def test_two_ranks_with_unequal_pair_counts_equal_the_one_big_batch(
    options: dict[str, Any],
) -> None:
    one, two = module(**options).double(), module(**options).double()
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
    loss, sums = step(moved(ours), batch)
    theirs, metrics = dpo_loss_from_batch(ours.model, ours.reference_layers.model, batch)
    assert int(sums["loss"][1]) == 2
    torch.testing.assert_close(loss / 2, theirs, rtol=1e-6, atol=0)
    means = with_margins({name: total / count for name, (total, count) in sums.items()})
    for name, value in metrics.items():
        torch.testing.assert_close(means[name], value, rtol=1e-6, atol=1e-7)


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


def test_checkpoint_knows_lists_and_options(tmp_path: Path) -> None:
    options = {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5], "simpo_gamma": 1.0}
    module().model.save_pretrained(tmp_path / "folder")
    ours = DPOModule(str(tmp_path / "folder"), **options)
    fit(ours, [pairs(0, 1)]).save_checkpoint(tmp_path / "a.ckpt")
    restored = DPOModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert restored.options == ours.options
    assert restored.options.loss_types == ("simpo", "sft")


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
        ({"beta": -0.1}, r"DPOModule\(beta=-0.1\): must be positive and finite"),
        ({"beta": 10**400}, r"DPOModule\(beta=10+\): must be positive and finite"),
        ({"loss_type": "dpo"}, r"loss_type='dpo'\): must be one of 'alphapo',.*nearest is 'cdpo'"),
        ({"loss_type": ["sigmoid", "stf"]}, r"loss_type=\['sigmoid', 'stf'\]\).*nearest is 'sft'"),
        ({"loss_weights": [1.0, 1.0]}, r"loss_weights=\[1.0, 1.0\]\): must have one weight"),
        ({"loss_weights": [0.0]}, r"loss_weights=\[0.0\]\): must be finite numbers, not all 0"),
        ({"loss_type": "exo_pair"}, r"label_smoothing=0.0\): must be above 0 with exo_pair"),
        ({"loss_type": "aot", "use_weighting": True}, r"use_weighting=True\): must be False with"),
        (
            {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"},
            r"f_divergence_type='forward_kl'\): must be 'reverse_kl' with 'apo_zero'",
        ),
        ({"simpo_gamma": 1.0}, r"simpo_gamma=1.0\): must be 0.5 with loss_type='sigmoid'"),
        ({"desirable_weight": 2.0}, r"desirable_weight=2.0\): must be 1.0.*'apo_zero_unpaired' or"),
        (
            {"loss_type": "simpo", "ref_model": llama()},
            r"ref_model='LlamaConfig'\): must be None",
        ),
        ({"reference_free": True, "ref_model": llama()}, "must be None with reference_free=True"),
        ({"router_aux_loss_coef": 0.1}, r"router_aux_loss_coef=0.1\): .*no mixture of experts"),
        ({"router_aux_loss_coef": -0.1}, "must be finite, not negative"),
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
    with pytest.raises(
        ValueError, match=r"DPOModule\(ref_model=.*shares 'model.embed_tokens.weight"
    ):
        DPOModule(model, ref_model=copy.copy(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert DPOModule(model, ref_model=copy.deepcopy(model)).model is model


@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero_unpaired"])
def test_a_reference_that_gives_no_number_stops_the_run(loss_type: str) -> None:
    """Not a loss of nan, after which every weight is one. At set-up a probe sees it, too."""
    ours, batch = module(loss_type=loss_type), UNPAIRED if "un" in loss_type else pairs(0, 1)
    with torch.no_grad():
        ours.frozen_modules()["reference"].lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"reference.logps_B=.*must be finite; the reference"):
        step(ours, batch)
    with pytest.raises(ValueError, match="the largest is nan"):
        fit(ours, [batch])


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
