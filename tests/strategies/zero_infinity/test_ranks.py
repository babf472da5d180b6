"""ZeRO-Infinity on two forked gloo ranks against DDP on as many, to the bit."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_align import GaLoreAdamW, Muon, StableAdamW
from lightning_align.modules import PretrainModule
from tests.helpers.offloaded import ADAMW, Regression, assert_same, batches, points, small
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.tiny_models import TINY_MODELS


def trainer_of(folder, rank, strategy, size=2, **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=strategy,
        plugins=[ForkedRanks(rank, size)],
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(folder, rank, module, data, strategy, ckpt_path=None, size=2, **options):
    trainer = trainer_of(folder, rank, strategy, size, **options)
    pl.seed_everything(11)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def logged(trainer):
    values = trainer.callback_metrics.items()
    return {name: float(value) for name, value in values if name != "tokens_per_second"}


def both(folder, build_module, build_data, size=2, arguments=None, **options):
    """States of parameters and optimizers on the first rank: theirs, ours."""

    def run(rank):
        theirs = build_module()
        trainer = fit(folder, rank, theirs, build_data(), "ddp", size=size, **options)
        expected = theirs.state_dict(), trainer.optimizers[0].state_dict()
        metrics = logged(trainer)
        ours = build_module()
        strategy = small(timeout=timedelta(seconds=60), **(arguments or {}))
        trainer = fit(folder, rank, ours, build_data(), strategy, size=size, **options)
        found = (
            trainer.strategy.lightning_module_state_dict(),
            trainer.strategy.optimizer_state(trainer.optimizers[0]),
        )
        # Where weights are cut, their norms are put together in another order.
        assert logged(trainer) == pytest.approx(metrics, rel=1e-5)
        trainer.strategy.close()
        return found, expected

    found, expected = run_ranks(run, size, timeout_s=120)[0]
    return found, expected


def compare(*args, **options):
    found, expected = both(*args, **options)
    assert_same(found, expected)


def largest_difference(found, expected):
    """Of parameters and moments, relative to the largest number of a tensor."""
    pairs = [(found[0][name], value) for name, value in expected[0].items()]
    for key, state in expected[1]["state"].items():
        pairs += [(found[1]["state"][key][name], value) for name, value in state.items()]
    tensors = [pair for pair in pairs if isinstance(pair[1], torch.Tensor) and pair[1].numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in tensors)


def points_of():
    return DataLoader(points(), batch_size=4)


def text():
    """Packed text, with unequal numbers of labels, so that ranks weigh unequally."""
    return DataLoader(batches(), batch_size=2)


@pytest.mark.parametrize("early", ["auto", False])
@pytest.mark.parametrize("window", [1, 2])
def test_a_module_written_by_hand_trains_as_under_ddp(tmp_path, window, early):
    build = lambda: Regression(ADAMW, width=48, schedule=True)  # noqa: E731
    arguments = {"update_in_backward": early}
    compare(tmp_path, build, points_of, arguments=arguments, accumulate_grad_batches=window)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize("window", [1, 3])
def test_language_models_train_as_under_ddp(tmp_path, name, window):
    """The last window of an epoch is shorter, and tokens are not counted equally."""
    build = lambda: PretrainModule(TINY_MODELS[name](), optimizer=ADAMW)  # noqa: E731
    compare(tmp_path, build, text, accumulate_grad_batches=window)


def frozen(module):
    """Two blocks frozen, and a part of another."""
    module.parts[1].requires_grad_(False)
    module.parts[2].requires_grad_(False)
    module.parts[3][0].bias.requires_grad_(False)
    return module


@pytest.mark.parametrize("early", ["auto", False])
def test_frozen_blocks_stay_and_the_others_train_as_under_ddp(tmp_path, early):
    arguments = {"update_in_backward": early}
    compare(tmp_path, lambda: frozen(Regression(ADAMW, width=48)), points_of, arguments=arguments)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_that_of_ddp(tmp_path, algorithm):
    """Norms of weights that are cut are put together from squares: another order of sums."""
    options = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": algorithm}
    build = lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)  # noqa: E731
    pair = both(tmp_path, build, text, accumulate_grad_batches=2, **options)
    assert largest_difference(*pair) < (1e-6 if algorithm == "norm" else 1e-30)


@pytest.mark.parametrize(
    "build",
    [
        partial(StableAdamW, lr=1e-2),
        partial(Muon, lr=1e-2),
        partial(GaLoreAdamW, lr=1e-2, rank=4, update_proj_gap=2),
        partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    ],
    ids=lambda build: build.func.__name__,
)
def test_each_optimizer_steps_as_under_ddp(tmp_path, build):
    """Those that look at whole matrices find each on one rank."""
    compare(tmp_path, lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=build), text)


def test_three_ranks_train_as_ddp_up_to_the_order_of_sums(tmp_path):
    build = lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)  # noqa: E731
    pair = both(tmp_path, build, text, size=3, accumulate_grad_batches=2)
    assert largest_difference(*pair) < 1e-4
