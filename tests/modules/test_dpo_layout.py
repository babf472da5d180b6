"""DPOModule on rows of pairs: the same training as on separate rows."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import BloomConfig, MistralConfig

from lightning_align import DPOModule
from lightning_align.losses import dpo_loss_from_batch
from tests.modules.test_dpo import VOCABULARY, mixture_of_experts, module, moved, pairs, step
from tests.modules.test_pretrain import fit, gpt2, llama, weights

MISTRAL = MistralConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=3,
)
CONFIGS = {"llama": llama(), "gpt2": gpt2(0.3), "mistral": MISTRAL}
BLOOM = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
SKEWED = (0, 3, 1)  # 9, 15 and 11 tokens: cheaper in one row than in three
SHARED: dict[str, Any] = {"prefix_sharing": True}
PACKED: dict[str, Any] = {"prefix_sharing": True, "packing": True}


def trained(
    config: Any, batches: list[dict[str, torch.Tensor]], *, trainer: Any = None, **options: Any
) -> DPOModule:
    ours = module(config, **options)
    fit(ours, batches, **(trainer or {}))
    return ours


def set_up(config: Any, **options: Any) -> DPOModule:
    """A module that a trainer has set up, its policy a little away from its reference."""
    return moved(trained(config, [pairs(9)], trainer={"limit_train_batches": 0}, **options))


@pytest.mark.parametrize("options", [SHARED, PACKED], ids=["shared", "packed"])
@pytest.mark.parametrize("family", CONFIGS)
def test_training_on_rows_of_pairs_matches_separate_rows(
    family: str, options: dict[str, Any]
) -> None:
    batches, trainer = [pairs(0, 1, 2), pairs(3), pairs(*SKEWED)], {"accumulate_grad_batches": 2}
    theirs = trained(CONFIGS[family], batches, trainer=trainer, prefix_sharing=False)
    ours = trained(CONFIGS[family], batches, trainer=trainer, **options)
    assert (theirs.layout, ours.layout) == (
        "separate",
        "packed" if "packing" in options else "shared",
    )
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
        {"loss_type": "simpo"},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_step_equals_the_function_on_separate_rows(options: dict[str, Any]) -> None:
    ours, batch = set_up(CONFIGS["mistral"], **PACKED, **options), pairs(0, 1, 2)
    loss, sums = step(ours, batch)
    reference = ours.frozen_modules().get("reference")
    theirs, metrics = dpo_loss_from_batch(ours.model, reference, batch, **options)
    assert ours.layout == "packed"
    torch.testing.assert_close(loss / sums["loss"][1], theirs, rtol=1e-5, atol=0)
    means = {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}
    means = ours.derived_metrics(means)
    for name, value in metrics.items():
        torch.testing.assert_close(means[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_reference_of_another_architecture_has_masks_of_its_own() -> None:
    ours, batch = set_up(llama(), ref_model=MISTRAL, **PACKED), pairs(0, 1, 2)
    loss, sums = step(ours, batch)
    theirs, _ = dpo_loss_from_batch(ours.model, ours.frozen_modules()["reference"], batch)
    torch.testing.assert_close(loss / sums["loss"][1], theirs, rtol=1e-5, atol=0)


def test_a_router_counts_what_is_shared_for_both_sequences() -> None:
    batch = pairs(0, 1, 2)
    separate, packed = (
        set_up(mixture_of_experts(), loss_type="simpo", **options)
        for options in ({"prefix_sharing": False}, PACKED)
    )
    packed.load_state_dict(separate.state_dict())
    (theirs, their_sums), (ours, our_sums) = step(separate, batch), step(packed, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_sums["aux_loss"], their_sums["aux_loss"], rtol=1e-5, atol=1e-5)


def long_completions() -> dict[str, torch.Tensor]:
    """Two pairs: a prompt of one token, completions of 39."""
    ids = torch.randint(1, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(0))
    ids[2:, 0] = ids[:2, 0]
    completion = (torch.arange(40) > 0).long().expand(4, -1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
    }


def test_auto_takes_for_each_batch_what_costs_less() -> None:
    ours = set_up(llama())
    step(ours, pairs(0, 1, 2))
    assert ours.layout == "shared"
    step(ours, long_completions())
    assert ours.layout == "separate"
    always = set_up(llama(), **SHARED)
    step(always, long_completions())
    assert always.layout == "shared"


def test_activation_checkpointing_is_bit_identical_with_masks_of_ours() -> None:
    batches = [pairs(0, 1, 2), pairs(*SKEWED)]
    plain, recomputed = (
        trained(MISTRAL, batches, activation_checkpointing=on, **PACKED) for on in (False, True)
    )
    assert torch.equal(weights(recomputed), weights(plain))


def test_predict_gives_the_same_rewards() -> None:
    ours, batch = set_up(llama(), **PACKED), pairs(*SKEWED)
    theirs = set_up(llama(), prefix_sharing=False)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        ours.predict_step(batch, 0), theirs.predict_step(batch, 0), rtol=1e-5, atol=1e-5
    )
    assert ours.layout == "packed"


def test_auto_says_once_why_a_model_cannot_and_true_refuses() -> None:
    with pytest.warns(UserWarning, match=r"prompt of a pair twice.*no position_ids") as record:
        ours = trained(BLOOM, [pairs(0), pairs(1)])
    assert ours.layout == "separate"
    assert sum("prompt of a pair twice" in str(warning.message) for warning in record) == 1
    with pytest.raises(ValueError, match=r"prefix_sharing=True\): this model cannot.*'auto' or"):
        trained(BLOOM, [pairs(0)], **SHARED)


def test_single_completions_share_nothing_and_nobody_is_warned() -> None:
    batch = pairs(0, 1, 2)
    batch["label"] = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*prompt of a pair twice")
        ours = trained(llama(), [batch], loss_type="apo_zero_unpaired")
    assert ours.layout == "separate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_sharing": "always"}, "must be one of 'auto', True, False"),
        ({"prefix_sharing": False, "packing": True}, "what is packed are rows that share"),
        ({"prefix_sharing": True, "loss_type": "kto"}, "is of single completions"),
        ({"packing": True, "loss_type": "apo_zero_unpaired"}, "is of single completions"),
    ],
)
def test_sharing_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize(
    "options", [{}, pytest.param(PACKED, marks=pytest.mark.slow)], ids=["auto", "packed"]
)
def test_a_resumed_run_is_bit_identical(options: dict[str, Any], tmp_path: Path) -> None:
    """Which layout a batch has is a function of the batch; nothing of one is in a checkpoint."""
    batches = [pairs(0, 1, 2), long_completions(), pairs(*SKEWED), pairs(4, 5)]

    def run(ckpt_path: str | None = None) -> DPOModule:
        ours = module(MISTRAL, **options)
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            callbacks=ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1),
        )
        trainer.fit(ours, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
        assert trainer.global_step == 4
        return ours

    whole = run()
    (checkpoint,) = tmp_path.glob("*step=2.ckpt")
    resumed = run(str(checkpoint))
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.layout == whole.layout
