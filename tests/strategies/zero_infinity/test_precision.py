"""Half precision on one rank against the same in memory, and steps that must not be taken."""

import copy
from datetime import timedelta
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_align import GaLoreAdamW, Muon, StableAdamW
from lightning_align.modules import PretrainModule
from tests.helpers.covers import cover
from tests.helpers.offloaded import (
    ADAMW,
    Regression,
    assert_same,
    compare,
    fit,
    points,
    small,
    text,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.zero_infinity import test_ranks as ranks


@cover(precision=["64-true", "bf16-mixed"], recompute=[False, True])
def test_a_language_model_trains_as_in_memory(tmp_path, precision, recompute):
    data = text()
    compare(
        tmp_path,
        lambda: PretrainModule(
            TINY_MODELS["llama"](), optimizer=ADAMW, activation_checkpointing=recompute
        ),
        data,
        precision=precision,
        accumulate_grad_batches=2,
    )


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_a_module_written_by_hand_trains_as_in_memory(tmp_path, precision):
    data = points()
    build = partial(torch.optim.AdamW, lr=1e-2)  # under autocast Lightning clips no fused one
    options = {"precision": precision, "gradient_clip_val": 0.05}
    compare(tmp_path, lambda: Regression(build), data, **options)


@cover(build={"AdamW": ADAMW, "Muon": partial(Muon, lr=1e-2)}, kind=["commit", "checkpoint"])
def test_masters_are_gone_on_with(tmp_path, kind, build):
    data = points()
    run = {"precision": "bf16-true", "enable_checkpointing": kind == "checkpoint"}
    whole = small()
    trainer = fit(tmp_path / "whole", Regression(build), data, whole, **run)
    states = copy.deepcopy(trainer.strategy.optimizer_state(trainer.optimizers[0]))
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [save] if kind == "checkpoint" else []
    begun = small()
    fit(tmp_path, Regression(build), data, begun, max_steps=3, callbacks=callbacks, **run)
    begun.close()
    path = "last" if kind == "commit" else tmp_path / "step=3.ckpt"
    strategy = small(overwrite=kind == "checkpoint")
    run["enable_checkpointing"] = False
    trainer = fit(tmp_path, Regression(build), data, strategy, path, **run)
    assert_same(strategy.lightning_module_state_dict(), whole.lightning_module_state_dict())
    found = strategy.optimizer_state(trainer.optimizers[0])
    assert_same(found["state"], states["state"])
    masters = [state["master"] for state in found["state"].values()]
    assert all(master.dtype == torch.float32 for master in masters)
    assert len(masters) == len(list(Regression(build).parameters()))


class Spoilt(Regression):
    """Its third step has a gradient that is not finite, in one block."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            loss = loss + self.spoil(self.parts[2](torch.ones(2, 20))).sum()
        return loss

    def spoil(self, x):
        return x * torch.inf


class Files(pl.Callback):
    """What is committed behind each step: values and optimizer state of all blocks."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, *_):
        values = trainer.strategy.lightning_module_state_dict()
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
        copy = partial(torch.utils._pytree.tree_map_only, torch.Tensor, torch.clone)
        self.states.append((copy(values), copy(state)))


@pytest.mark.parametrize("build", [StableAdamW, Muon, partial(GaLoreAdamW, rank=4)])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path, build):
    data = points()
    found = []
    for strategy in ("auto", small()):
        files = Files()
        module = Spoilt(partial(build, lr=1e-2))
        fit(tmp_path, module, data, strategy, callbacks=[files])
        found.append(files.states)
    theirs, ours = found
    for name, value in ours[2][0].items():  # what batch norm has seen is the forward's
        if not name.startswith("norm.running"):
            assert name == "norm.num_batches_tracked" or torch.equal(value, ours[1][0][name]), name
    moments = [
        [{k: v for k, v in of.items() if torch.is_tensor(v) and v.ndim} for of in state.values()]
        for _, state in ours[1:3]
    ]
    assert_same(moments[1], moments[0])
    assert_same(ours[-1], theirs[-1])
    assert all(value.isfinite().all() for value in ours[-1][0].values())


@pytest.mark.parametrize("build", [StableAdamW, Muon, partial(GaLoreAdamW, rank=4)])
def test_raising_leaves_the_step_before_on_disk(tmp_path, build):
    data = points()
    build = partial(build, lr=1e-2, on_nonfinite="raise")
    expected = fit(tmp_path / "whole", Regression(build), data, small(), max_steps=4)
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(tmp_path, Spoilt(build), data, small())
    trainer = fit(tmp_path, Regression(build), data, small(), "last", max_steps=4)
    values = trainer.strategy.lightning_module_state_dict()
    assert_same(values, expected.strategy.lightning_module_state_dict())


@pytest.mark.parametrize("build", [ADAMW, partial(Muon, lr=1e-2)])
def test_ranks_round_off_masters_that_are_cut(tmp_path, build):
    def run(rank):
        strategy = small(timeout=timedelta(seconds=60))
        data, options = ranks.points_of(), {"precision": "bf16-true"}
        trainer = ranks.fit(tmp_path, rank, Regression(build, width=48), data, strategy, **options)
        states = strategy.optimizer_state(trainer.optimizers[0]).get("state", {})
        values = strategy.lightning_module_state_dict()
        masters = [state["master"] for state in states.values()]
        names = {p: name for name, p in trainer.lightning_module.named_parameters()}
        order = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        return [values[names[p]] for p in order if values], masters

    values, masters = run_ranks(run, 2, timeout_s=120)[0]
    assert len(masters) == len(values)
    for value, master in zip(values, masters, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(value, master.bfloat16())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)
