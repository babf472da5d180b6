"""A Linear in tiles trains as in one piece, and either side reads the other's checkpoints."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_align import ExactResume, Muon
from lightning_align.modules import PretrainModule
from lightning_align.strategies import ZeROInfinityStrategy
from tests.helpers.covers import cover
from tests.helpers.offloaded import Both, Regression, fit, points, small, text, trainer_of
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.zero_infinity.test_ranks import both, largest_difference

# AdamW divides by the square roots of sums that are rounding errors where the gradient is zero.
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def assert_close(ours, theirs, tolerance=1e-6):
    """To that part of their norm: gradients of inputs are sums over tiles, in another order."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error, norm = ((each.double().norm()) for each in (ours[name] - value, value))
        assert error <= tolerance * norm, f"{name}: {error / norm}"


CLIPPED = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}


@pytest.mark.parametrize(("options", "recompute"), [({}, False), (CLIPPED, True)])
def test_a_language_model_in_tiles_trains_as_in_memory(tmp_path, options, recompute):
    data = text()
    found = []
    for strategy in ("auto", small(tile_numel=300)):
        module = PretrainModule(
            TINY_MODELS["llama"](), optimizer=SGD, activation_checkpointing=recompute
        )
        # Twelve steps amplify rounding: what is right to 1e-6 in one of them is told in doubles.
        trainer = fit(tmp_path, module, data, strategy, precision="64-true", **options)
        states = trainer.strategy.optimizer_state(trainer.optimizers[0])
        found.append((trainer.strategy.lightning_module_state_dict(), states))
    largest = max(b.nbytes for b in trainer.strategy._engine.blocks if not b.kept)
    assert largest <= 300 * 8 + 4096
    assert_close(found[1][0], found[0][0], 1e-12)
    ours, theirs = found[1][1], found[0][1]
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert_close(ours["state"][index], state, 1e-12)


@cover(window=[1, 2], first=["tiles", "whole"])
def test_checkpoints_are_read_with_and_without_tiles(tmp_path, first, window):
    """Of two batches a window is open where the checkpoint is written."""
    data = Both(points())
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    strategies = [small(tile_numel=200), "auto"]
    begun, goes_on = strategies if first == "tiles" else reversed(strategies)
    options = {"val_check_interval": 3, "accumulate_grad_batches": window}
    saving = {**options, "enable_checkpointing": True, "callbacks": [ExactResume(), save]}
    trainer = fit(tmp_path, Regression(SGD), data, begun, **saving)
    expected = trainer.strategy.lightning_module_state_dict()
    path = tmp_path / f"step={3 // window}.ckpt"
    options["callbacks"] = [ExactResume()]
    trainer = fit(tmp_path, Regression(SGD), data, goes_on, path, **options)
    assert_close(trainer.strategy.lightning_module_state_dict(), expected, 1e-5)  # a small bias


def test_a_run_in_tiles_goes_on_with_its_last_step(tmp_path):
    data = points()
    whole = fit(tmp_path / "whole", Regression(), data, small(tile_numel=200))
    expected = whole.strategy.lightning_module_state_dict()
    begun = fit(tmp_path, Regression(), data, small(tile_numel=200), max_steps=3)
    begun.strategy.close()
    strategy = small(tile_numel=200)
    fit(tmp_path, Regression(), data, strategy, "last")
    found = strategy.lightning_module_state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_gathered_takes_the_name_of_the_whole_weight(tmp_path):
    strategy = small(tile_numel=200)
    module = Regression()
    fit(tmp_path, module, points(), strategy)
    name = "parts.1.0.weight"
    tiles = [p for n, p in module.parts[1][0].named_parameters() if n != "bias"]
    assert len(tiles) == 4
    with strategy.gathered([name], modify=True), torch.no_grad():
        for tile in tiles:
            tile.fill_(2.0)
        with pytest.raises(RuntimeError, match=r"parts\.0\.0\.weight_tile0"):
            module.parts[0][0].weight_tile0.sum()
    assert (strategy.lightning_module_state_dict()[name] == 2).all()


class Wide(pl.LightningModule):
    """One Linear that is far larger than all else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.Sequential(nn.Linear(7, 64), nn.Linear(64, 2048), nn.Linear(2048, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.parts(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def test_a_linear_above_the_memory_limit_trains_as_in_memory(tmp_path):
    data = points()
    theirs = Wide()
    weight = theirs.parts[1].weight.nbytes
    fit(tmp_path, theirs, data)
    options = {"memory_limit": weight // 2, "sub_group_size": 4096}
    with pytest.raises(ValueError, match="must be at least"):
        fit(tmp_path, Wide(), data, ZeROInfinityStrategy(**options))
    held = []

    class Held(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            held.append(trainer.strategy._engine.pool.allocated_bytes)

    strategy = ZeROInfinityStrategy(tile_numel=4096, **options)
    fit(tmp_path, Wide(), data, strategy, callbacks=[Held()])
    assert max(held) <= weight // 2
    assert_close(strategy.lightning_module_state_dict(), theirs.state_dict())


def test_optimizers_of_whole_matrices_are_refused(tmp_path):
    data = text()
    module = PretrainModule(TINY_MODELS["llama"](), optimizer=partial(Muon, lr=1e-2))
    with pytest.raises(ValueError, match=r"tile_numel=300.*Muon looks at whole matrices"):
        trainer_of(tmp_path, small(tile_numel=300)).fit(module, data)


def test_a_tile_has_at_least_one_element():
    with pytest.raises(ValueError, match="tile_numel=0"):
        small(tile_numel=0)


@pytest.mark.slow  # `make test-laws` runs it
def test_ranks_train_in_tiles_as_under_ddp(tmp_path):
    build = lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=SGD)  # noqa: E731
    arguments = {"tile_numel": 300}
    pair = both(tmp_path, build, text, arguments=arguments, precision="64-true")
    assert largest_difference(*pair) < 1e-12
