"""LISA where ranks hold parts of each parameter: FSDP2 under ModelParallelStrategy.

tests/laws/test_fully_sharded.py kills and resumes it under our module.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader

from lightning_align import LISA, ExactResume, GaLoreAdamW, SpikeGuard
from lightning_align.callbacks.lisa import held_bytes
from lightning_align.stability import SpikeDetector
from tests.callbacks.spikes.test_guard_sharded import BadBatch
from tests.callbacks.spikes.test_guard_sharded import fit as fit_guarded
from tests.helpers.lisa import ADAMW, BATCHES, BLOCKS, Layered, build, names_of_blocks
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.modules.test_pretrain import llama, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SLOW = partial(pytest.param, marks=pytest.mark.slow)
SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)
GALORE = partial(GaLoreAdamW, lr=1e-2, rank=2, update_proj_gap=2)
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class ShardedByHand(Layered):
    """Knows nothing of us."""

    def __init__(self, optimizer: Any = ADAMW, **options: Any) -> None:
        super().__init__(optimizer)
        self.options = options  # of fully_shard

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for module in (*self.blocks, self):
            fully_shard(module, mesh=mesh, **self.options)
        for name in ("training_step", "validation_step"):
            register_fsdp_forward_method(self, name)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        Layered.training_step(self, batch, batch_idx)


class Watch(pl.Callback):
    """What there is at each step, gathered."""

    def __init__(self, lisa: LISA) -> None:
        self.lisa = lisa
        self.losses: list[float] = []
        self.weights: list[dict[str, Tensor]] = []
        self.active: list[tuple[int, ...]] = []
        self.states: list[set[str]] = []
        self.gradients: list[set[str]] = []
        self.held: list[dict[str, int]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({n for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.active.append(self.lisa.active_layers)
        self.weights.append(gathered(pl_module))
        state = trainer.optimizers[0].state
        self.states.append({n for n, p in pl_module.named_parameters() if state.get(p)})
        self.held.append(held_bytes(pl_module, trainer.optimizers[0]))


def gathered(module: nn.Module) -> dict[str, Tensor]:
    named: Any = module.named_parameters()
    wholes = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in named}
    return {name: whole.detach().clone() for name, whole in wholes.items()}


def fit(rank: int | None, module: Any, lisa: LISA, *more: Any, **options: Any) -> Watch:
    """On two ranks, each with one row of every batch, or in one process with both."""
    rows = slice(None) if rank is None else slice(rank, rank + 1)
    batches = [{name: part[rows] for name, part in batch.items()} for batch in BATCHES]
    validation = DataLoader(batches[:1], batch_size=None) if options.pop("validate", 0) else None
    ranks: dict[str, Any] = {"devices": 1}
    if rank is not None:
        whole = options.pop("whole", False)
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=not whole)
        ranks = {"devices": 2, "strategy": strategy, "plugins": [ForkedRanks(rank, 2)]}
    watch, ckpt_path = Watch(lisa), options.pop("ckpt_path", None)
    lisa.filename = None
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[lisa, *more, watch],
        **{"gradient_clip_val": 0.5, **ranks, **options},
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), validation, ckpt_path=ckpt_path)
    return watch


@pytest.mark.parametrize("name", ["gpt2", SLOW("llama")])
def test_two_ranks_equal_one_process(name: str) -> None:
    arguments: dict[str, Any] = {"interval_steps": 2, "sampling": "weight_norm"}
    options = {"accumulate_grad_batches": 2}

    def trained(rank: int | None) -> tuple[Any, dict[str, Tensor]]:
        watch = fit(rank, build(name, SGD), LISA(2, **arguments), **options)
        return watch.active, watch.weights[-1]

    ours, (active, theirs) = run_ranks(trained, timeout_s=120), trained(None)
    assert len(set(active)) > 1
    for drawn, weights in ours:
        assert drawn == active
        for key, weight in weights.items():
            # fp32 sums over the rows of two ranks in another order; six steps with momentum.
            torch.testing.assert_close(weight, theirs[key], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 1e-2)])
def test_with_galore_and_validation_and_in_mixed_precision(
    precision: Any, tolerance: float
) -> None:
    arguments: dict[str, Any] = {"interval_steps": 2, "reactivation_warmup_steps": 1}
    options = {"precision": precision, "validate": True, "val_check_interval": 3}

    def losses(rank: int | None) -> list[float]:
        return fit(rank, build("llama", GALORE), LISA(2, **arguments), **options).losses

    ours = run_ranks(losses, timeout_s=120)
    assert list(map(sum, zip(*ours, strict=True))) == pytest.approx(losses(None), rel=tolerance)


@contextmanager
def sent_bytes() -> Iterator[list[int]]:
    """Bytes of gradients that are about to be summed over the ranks."""
    newer = "reduce_scatter_single"  # from torch 2.13 on
    name = newer if hasattr(distributed, newer) else "reduce_scatter_tensor"
    real, sent = getattr(distributed, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        given = options.get("input", arguments[1] if len(arguments) > 1 else None)
        sent[0] += given.nbytes
        return real(*arguments, **options)

    with mock.patch.object(distributed, name, counted):
        yield sent


@pytest.mark.parametrize("state", ["drop", SLOW("keep")])
def test_what_is_frozen_is_bit_equal_holds_nothing_and_is_not_sent(state: str) -> None:
    def on_a_rank(rank: int) -> None:
        module, lisa = build("gpt2"), LISA(2, interval_steps=2, optimizer_state=state)
        sums: list[int] = []

        class Sent(pl.Callback):
            def on_train_batch_end(self, *_: Any) -> None:
                sums.append(sent[0])
                sent[0] = 0

        with sent_bytes() as sent:
            watch = fit(rank, module, lisa, Sent())
        names, shapes = names_of_blocks(module), {n: p.shape for n, p in watch.weights[0].items()}
        seen: set[int] = set()
        assert len(set(watch.active)) > 1
        for step in range(1, len(watch.active)):
            active, seen = watch.active[step], seen | set(watch.active[step - 1])
            before, after = watch.weights[step - 1], watch.weights[step]
            moved = {name for name in before if not torch.equal(before[name], after[name])}
            outside = shapes.keys() - set().union(*names)
            trained = outside.union(*(names[block] for block in active))
            assert watch.gradients[step] == trained
            for block in range(BLOCKS):
                assert bool(moved & names[block]) is (block in active)
                kept = active if state == "drop" else seen | set(active)
                assert bool(names[block] & watch.states[step]) is (block in kept)
            # Each rank gets as many rows of a gradient as the other, some of them empty.
            padded = {n: 2 * math.ceil(s[0] / 2) * s[1:].numel() for n, s in shapes.items()}
            assert sums[step] == 4 * sum(padded[name] for name in trained)
            own = sum(p.to_local().numel() for n, p in module.named_parameters())
            assert watch.held[step]["weights_bytes"] == 4 * own
            assert watch.held[step]["gradients_bytes"] == 0  # they are gone when a step is done

    run_ranks(on_a_rank, timeout_s=120)


def test_blocks_that_a_validation_has_left_gathered_follow() -> None:
    """By then torch has looked which of them train."""

    def on_a_rank(rank: int) -> None:
        module, lisa = ShardedByHand(reshard_after_forward=False), LISA(1, interval_steps=2)
        watch = fit(rank, module, lisa, validate=True, val_check_interval=2)
        names = names_of_blocks(module)
        assert len(set(watch.active)) > 1
        for (active,), gradients in zip(watch.active, watch.gradients, strict=True):
            assert gradients & set().union(*names) == names[active]

    run_ranks(on_a_rank, timeout_s=120)


def test_gradients_of_what_was_frozen_at_first_are_summed_as_its_policy_says() -> None:
    def on_a_rank(rank: int) -> None:
        module = ShardedByHand(mp_policy=HALF)
        watch = fit(rank, module, LISA(1, interval_steps=1))
        assert set(watch.active) == {(block,) for block in range(BLOCKS)}
        dtypes: list[Any] = [state["exp_avg"].dtype for state in _states(module)]
        assert set(dtypes) == {torch.float32}

    run_ranks(on_a_rank, timeout_s=120)


def _states(module: pl.LightningModule) -> list[dict[str, Any]]:
    return [state for state in module.trainer.optimizers[0].state.values() if state]


class SaveAt(pl.Callback):
    """Saves after a batch."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *place: Any) -> None:
        if place[-1] == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("state", "optimizer", "whole"),
    [
        pytest.param("drop", GALORE, False, id="drop-GaLore-folder"),
        pytest.param("drop", ADAMW, True, id="drop-AdamW-file"),
        SLOW("keep", ADAMW, False, id="keep-AdamW-folder"),
    ],
)
def test_resumes_in_mid_interval_and_mid_accumulation(
    state: str, optimizer: Any, whole: bool, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"interval_steps": 2, "optimizer_state": state}
    arguments["reactivation_warmup_steps"] = 1
    options = {"accumulate_grad_batches": 2, "whole": whole}

    def on_a_rank(rank: int) -> None:
        saved = tmp_path / "seven.ckpt"  # of six batches a window is complete, of four an interval
        more = ExactResume(), SaveAt(6, saved)
        straight = fit(rank, ShardedByHand(optimizer), LISA(1, **arguments), *more, **options)
        module, lisa = ShardedByHand(optimizer), LISA(1, **arguments)
        resumed = fit(rank, module, lisa, ExactResume(), ckpt_path=saved, **options)
        assert len(set(straight.active)) > 1
        assert resumed.active == straight.active[7:]
        assert resumed.losses == straight.losses[7:]
        assert resumed.states == straight.states[7:]
        assert all(map(torch.equal, *(w.weights[-1].values() for w in (resumed, straight))))

    run_ranks(on_a_rank, timeout_s=120)


def test_another_schedule_is_refused_at_resume(tmp_path: Path) -> None:
    """Though this strategy loads a checkpoint late."""

    def on_a_rank(rank: int) -> None:
        saved = tmp_path / "two.ckpt"
        fit(rank, build("gpt2"), LISA(2), SaveAt(1, saved), max_steps=2)
        module, lisa = build("gpt2"), LISA(2, seed=1)
        with pytest.raises(ValueError, match=r"LISA\(seed=1\): the checkpoint was written with 0"):
            fit(rank, module, lisa, ckpt_path=saved)

    run_ranks(on_a_rank, timeout_s=120)


class Eager(SpikeDetector):
    """Judges four steps after a draw."""

    def __init__(self) -> None:
        super().__init__(window=16, warmup=4)


@pytest.mark.slow
def test_a_rewind_goes_back_past_a_draw_as_under_ddp(tmp_path: Path) -> None:
    """Which blocks train, and whose moments there are, is as it was on each rank."""

    def run(rank: int, strategy: Any) -> tuple[Any, list[Any], dict[str, Tensor]]:
        pl.seed_everything(1, verbose=False)
        module = BadBatch(llama(num_hidden_layers=BLOCKS), optimizer=GALORE)
        back: dict[str, Any] = {"rewind_steps": 6, "snapshot_every_n_steps": 2}
        folder = str(tmp_path / strategy.__name__)
        guard = SpikeGuard("rewind", Eager(), report_dir=folder, skip_batches=1, **back)
        lisa, watch = LISA(1, interval_steps=7, seed=4, filename=None), Weights()
        halves = [rows(number) for number in range(rank, 32, 2)]  # the bad one is before step 12
        fit_guarded(rank, module, halves, strategy=strategy(), callbacks=[guard, lisa, watch])
        return guard.report.incidents, lisa.history, watch.weights

    def on_a_rank(rank: int) -> Any:
        return [run(rank, strategy) for strategy in (DDPStrategy, ModelParallelStrategy)]

    for (_, drawn, theirs), ((incident,), also_drawn, ours) in run_ranks(on_a_rank, timeout_s=120):
        assert (incident.step, incident.action) == (12, "rewind")
        assert drawn == also_drawn
        assert drawn[0][1] != drawn[1][1]
        for name, weight in ours.items():
            # fp32 sums in another order, over steps that Adam makes of one size
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)


class Weights(pl.Callback):
    """All of them, at the end."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = gathered(pl_module)
