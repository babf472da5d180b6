"""ZeRO-Infinity on two forked gloo ranks against DDP on as many, to the bit."""

from __future__ import annotations

import errno
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from lightning_align import GaLoreAdamW, Muon, StableAdamW
from lightning_align.modules import PretrainModule
from lightning_align.offload.files import DirectFile
from tests.helpers.covers import cover
from tests.helpers.offloaded import ADAMW, STEPS, Both, Regression, assert_same, points, small, text
from tests.helpers.ranks import ForkedRanks, end_of_ranks, run_ranks
from tests.helpers.tiny_models import TINY_MODELS

SLOW = pytest.mark.slow


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


points_of = partial(points, 4)  # of a rank


@cover(early=["auto", False], window=[1, 2])
def test_a_module_written_by_hand_trains_as_under_ddp(tmp_path, window, early):
    build = lambda: Regression(width=48, schedule=True)  # noqa: E731
    arguments = {"update_in_backward": early}
    compare(tmp_path, build, points_of, arguments=arguments, accumulate_grad_batches=window)


@cover(name=["llama", "gpt2", "llama_tied"], window=[1, 3])
def test_language_models_train_as_under_ddp(tmp_path, name, window):
    """The last window of an epoch is shorter, and tokens are not counted equally."""
    build = lambda: PretrainModule(TINY_MODELS[name](), optimizer=ADAMW)  # noqa: E731
    compare(tmp_path, build, text, accumulate_grad_batches=window)


def test_a_validation_sees_the_buffers_of_the_first_rank_as_under_ddp(tmp_path):
    """Running means, which each rank has of its own batches."""
    build = lambda: Regression(width=48)  # noqa: E731
    compare(tmp_path, build, lambda: Both(points_of()), limit_val_batches=2)


@SLOW
def test_a_validation_and_two_fits_are_those_of_ddp(tmp_path):
    """The second optimizer begins anew, with nothing of what the first one has stored."""

    def run(rank):
        found = []
        for strategy in ("ddp", small(timeout=timedelta(seconds=60))):
            module, trainer = Regression(width=48), trainer_of(tmp_path, rank, strategy)
            pl.seed_everything(11)
            (validated,) = trainer.validate(module, points_of(), verbose=False)
            for epochs in (1, 2):
                trainer.fit_loop.max_epochs = epochs
                trainer.fit(module, points_of())
            found.append((validated, dict(trainer.strategy.lightning_module_state_dict())))
        return found

    theirs, ours = run_ranks(run, timeout_s=90)[0]
    assert_same(ours, theirs)


def frozen(module):
    """Two blocks frozen, and a part of another."""
    module.parts[1].requires_grad_(False)
    module.parts[2].requires_grad_(False)
    module.parts[3][0].bias.requires_grad_(False)
    return module


@pytest.mark.parametrize("early", ["auto", False])
def test_frozen_blocks_stay_and_the_others_train_as_under_ddp(tmp_path, early):
    arguments = {"update_in_backward": early}
    compare(tmp_path, lambda: frozen(Regression(width=48)), points_of, arguments=arguments)


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
        pytest.param(partial(torch.optim.SGD, lr=1e-2, momentum=0.9), marks=SLOW),
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


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_whose_peer_has_failed_names_it_with_step_and_path(tmp_path, failing):
    def run(rank):
        count = []
        write = DirectFile.write

        def broken(file, *args):
            count.append(1)
            if rank == failing and len(count) == 10:  # in a step, not at set-up
                raise OSError(errno.EIO, "cannot", str(file.path))
            return write(file, *args)

        DirectFile.write = broken
        module = PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)
        fit(tmp_path, rank, module, text(), small(timeout=timedelta(seconds=30)))

    ended = end_of_ranks(run, timeout_s=60)
    assert not any(end.stuck for end in ended)
    assert "OSError: [Errno 5] cannot: " in ended[failing].error
    other = ended[1 - failing].error
    assert f"The failure was at rank {failing}, after step " in other
    assert f"rank{failing:05d}/" in other


class Wanders(Regression):
    """Calls its blocks in another order on the second rank, from its third batch on."""

    def forward(self, x):
        x = self.inlet(x)
        late = self.global_rank == 1 and self.trainer.global_step > 1
        for part in reversed(self.parts) if late else self.parts:
            x = x + part(x)
        return self.outlet(self.norm(x))


def test_ranks_that_call_blocks_in_another_order_are_refused(tmp_path):
    """All blocks are of one size, so that values of one could be taken for those of another."""

    def run(rank):
        module = Wanders(width=48)
        fit(tmp_path, rank, module, points_of(), small(timeout=timedelta(seconds=30)))

    ended = end_of_ranks(run, timeout_s=60)
    assert not any(end.stuck for end in ended)
    for end in ended:
        assert (
            "RankError: The ranks are at different places (rank 0: the values of parts."
            in end.error
        )


class Watches(pl.Callback):
    """Looks at all gradients before the update."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})


def test_hooks_see_the_gradients_that_they_see_under_ddp(tmp_path):
    def run(rank):
        seen = []
        for strategy in ("ddp", small(timeout=timedelta(seconds=60))):
            watches = Watches()
            module = PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)
            options = {"callbacks": [watches], "accumulate_grad_batches": 2}
            fit(tmp_path, rank, module, text(), strategy, **options)
            seen.append(watches.seen)
        assert_same(seen[1], seen[0])
        return len(seen[0])

    assert run_ranks(run, timeout_s=60) == [STEPS // 2] * 2


def test_activations_wait_on_disk_as_under_ddp(tmp_path):
    build = lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)  # noqa: E731
    compare(tmp_path, build, text, arguments={"offload_activations": "nvme"})


@pytest.mark.slow
def test_tiles_train_as_under_ddp(tmp_path):
    """A tiled layer's input has a gradient that is summed over tiles, in another order."""
    build = lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=ADAMW)  # noqa: E731
    assert largest_difference(*both(tmp_path, build, text, arguments={"tile_numel": 500})) < 1e-4
