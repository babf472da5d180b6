"""PretrainModule: the loss, exact weighting under accumulation and over ranks, logging, bad
input."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import GPT2Config, LlamaConfig

from lightning_align import PretrainModule
from tests.helpers.exact import assert_as_exact_as
from tests.helpers.resume import VOCABULARY, Sequences

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def llama(**overrides: Any) -> LlamaConfig:
    return LlamaConfig(**{**LLAMA, **overrides})


def gpt2(dropout: float = 0.0) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )


def sgd_module(config: Any = None, **options: Any) -> PretrainModule:
    pl.seed_everything(1, verbose=False)
    return PretrainModule(config or llama(), optimizer=partial(torch.optim.SGD, lr=0.5), **options)


def fit(module: pl.LightningModule, batches: list[dict[str, torch.Tensor]], **options: Any) -> Any:
    options = {"max_epochs": 1, "logger": False, **options}
    ckpt_path = options.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def rows(*indices: int) -> dict[str, torch.Tensor]:
    return Sequences()[indices]


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assert_same_sums(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Equal but for the order of additions, which float64 tells from any other cause.

    The weight of a window is an fp32 tensor: 1e-7 of a step of about 0.1.
    """
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float64}
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_loss_is_cross_entropy_of_the_models_own_logits(config: Any) -> None:
    module = sgd_module(config)
    batch = rows(0, 1, 2)
    loss, sums = module.loss_from_hidden(module.forward_hidden(**module.model_inputs(batch)), batch)
    logits = module.model(batch["input_ids"]).logits[:, :-1]
    theirs = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    wide = copy.deepcopy(module.model).double()(batch["input_ids"]).logits[:, :-1]
    exact = F.cross_entropy(wide.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert_as_exact_as(loss, theirs, exact)
    assert sums["loss"][1] == (batch["labels"][:, 1:] != -100).sum()
    assert sums["tokens"][0] == sums["loss"][1]


@pytest.mark.parametrize("clip", [None, 0.1], ids=["free", "clipped"])
def test_accumulation_with_unequal_token_counts_equals_the_one_big_batch(
    clip: float | None,
) -> None:
    """Eight rows with 2 to 12 targets each: in one batch, and in four windows parts of unequal
    size."""
    one, many = sgd_module().double(), sgd_module().double()
    fit(one, [rows(*range(8))], gradient_clip_val=clip)
    parts = [rows(0), rows(1, 2, 3), rows(4, 5), rows(6, 7)]
    counts = {int((part["labels"][:, 1:] != -100).sum()) for part in parts}
    assert len(counts) > 1
    fit(many, parts, accumulate_grad_batches=4, gradient_clip_val=clip)
    assert_same_sums(many, one)


def test_short_last_window_is_weighted_by_its_own_tokens() -> None:
    """Three batches at accumulate 2: the second window has one batch, which Lightning still
    halves."""
    ours, theirs = sgd_module().double(), sgd_module().double()
    fit(ours, [rows(0, 1), rows(2), rows(3, 4)], accumulate_grad_batches=2)
    fit(theirs, [rows(0, 1, 2), rows(3, 4)])
    assert_same_sums(ours, theirs)


@pytest.mark.parametrize("clip", [None, 0.1], ids=["free", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_with_unequal_token_counts_equal_the_one_big_batch(
    accumulate: int, clip: float | None
) -> None:
    """Two forked gloo ranks: DDP's own mean of means would weigh the short rank's tokens more."""
    one, two = sgd_module().double(), sgd_module().double()
    parts = [rows(0), rows(1, 2, 3), rows(4, 5), rows(6)][: 2 * accumulate]
    fit(one, [rows(*range(7 if accumulate == 2 else 4))], gradient_clip_val=clip)
    trainer = fit(
        two,
        parts,
        strategy="ddp_fork",
        devices=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
    )
    assert trainer.world_size == 2
    assert_same_sums(two, one)


def test_batch_without_targets_changes_nothing() -> None:
    module = sgd_module()
    before = weights(module)
    batch = rows(0, 1)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    fit(module, [batch])
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("config", [llama(), gpt2(0.1)], ids=["llama", "gpt2-dropout"])
def test_activation_checkpointing_is_bit_identical(config: Any) -> None:
    plain = sgd_module(config)
    recomputed = sgd_module(config, activation_checkpointing=True)
    for module in (plain, recomputed):
        pl.seed_everything(3, verbose=False)
        fit(module, [rows(0, 1), rows(2, 3)])
    assert torch.equal(weights(plain), weights(recomputed))


def test_logs_what_it_promises(tmp_path: Path) -> None:
    module = sgd_module()
    trainer = fit(module, [rows(0, 1), rows(2, 3)], logger=CSVLogger(tmp_path))
    metrics = trainer.callback_metrics
    assert {
        "train_loss",
        "train_perplexity",
        "tokens_seen",
        "tokens_per_second",
        "grad_norm",
        "lr",
    } <= set(metrics)
    assert metrics["train_perplexity"] == pytest.approx(math.exp(metrics["train_loss"]), rel=1e-5)
    targets = sum(int((rows(*i)["labels"][:, 1:] != -100).sum()) for i in [(0, 1), (2, 3)])
    assert metrics["tokens_seen"] == targets == module.tokens_seen
    assert metrics["lr"] == 0.5


def test_train_loss_is_the_mean_of_the_whole_window() -> None:
    module = sgd_module()
    expected = module.loss_from_hidden(
        module.forward_hidden(**module.model_inputs(rows(0, 1, 2))), rows(0, 1, 2)
    )[1]["loss"]
    trainer = fit(module, [rows(0), rows(1, 2)], accumulate_grad_batches=2)
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(
        float(expected[0] / expected[1]), rel=1e-5
    )


def test_validation_perplexity_weighs_every_token_alike() -> None:
    module = sgd_module()
    batches = [rows(0), rows(1, 2, 3)]
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (result,) = trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    together = rows(0, 1, 2, 3)
    logits = module.model(together["input_ids"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), together["labels"][:, 1:].flatten())
    assert result["val_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert result["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_regularisers_are_trained_on_but_not_reported_as_loss() -> None:
    plain, regularised = sgd_module(), sgd_module(z_loss=0.1, label_smoothing=0.1)
    trainers = [fit(module, [rows(0, 1)]) for module in (plain, regularised)]
    losses = [float(trainer.callback_metrics["train_loss"]) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert float(trainers[1].callback_metrics["train_objective"]) > losses[1]
    assert not torch.equal(weights(plain), weights(regularised))


def test_predict_gives_the_mean_loss_of_each_row() -> None:
    module = sgd_module()
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (predicted,) = trainer.predict(module, DataLoader([rows(0, 1)], batch_size=None))
    alone = trainer.validate(module, DataLoader([rows(1)], batch_size=None), verbose=False)
    assert float(predicted[1]) == pytest.approx(alone[0]["val_loss"], rel=1e-5)


# Checkpoints and folders


@pytest.mark.parametrize("given", ["config", "module"])
def test_checkpoint_loads_with_weights_only_and_rebuilds_the_module(
    tmp_path: Path, given: str
) -> None:
    module = sgd_module()
    if given == "module":
        module = PretrainModule(module.model, optimizer=partial(torch.optim.SGD, lr=0.5))
    trainer = fit(module, [rows(0, 1)])
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    extra = {"model": llama()} if given == "module" else {}
    restored = PretrainModule.load_from_checkpoint(path, weights_only=True, **extra)
    assert torch.equal(weights(restored), weights(module))
    assert restored.tokens_seen == module.tokens_seen > 0


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z_loss": -1.0}, r"PretrainModule\(z_loss=-1.0\): must not be negative"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0\): must lie in \[0, 1\)"),
        ({"chunk_size": 0}, r"chunk_size=0\): must be at least 1 row"),
        ({"dtype": "fp8"}, r"dtype='fp8'\): must be one of"),
        ({"model": 3}, r"model=3\): must be a Module or text or a PreTrainedConfig"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainModule(**{"model": llama(), **options})


def test_unknown_model_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PretrainModule\(model='.*absent'\)"):
        PretrainModule(str(tmp_path / "absent"))
