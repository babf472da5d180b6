"""RooflineMonitor where each rank has a part of every parameter: the work of this rank, once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_align import DPOModule, GaLoreAdamW, Muon, PretrainModule
from lightning_align.planner.op_flops import MESSAGE
from tests.callbacks.test_roofline import Analyses
from tests.helpers.ranks import ForkedRanks, run_ranks
from tests.helpers.spiky import Regression
from tests.modules.test_dpo import pairs
from tests.modules.test_pretrain import llama, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

WIDTH = 16
# Four attention matrices, three of the feed-forward part and two norms; embedding, norm and head.
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * 32 + 2 * WIDTH
SMALL = 400  # bytes at most of norms, token counts and losses that a step sums over ranks


def pretrain(**options: Any) -> Callable[[], pl.LightningModule]:
    config = {"num_hidden_layers": options.pop("layers", 2)}
    optimizer = partial(options.pop("optimizer", torch.optim.AdamW), lr=1e-2)
    return lambda: PretrainModule(llama(**config), optimizer=optimizer, **options)


def dpo() -> pl.LightningModule:
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return DPOModule(llama(), optimizer=optimizer, prefix_sharing=False)


def whole(module: nn.Module) -> torch.Tensor:
    every = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in every])


def fit(
    rank: int, strategy: Any, module: pl.LightningModule, data: Any, *callbacks: Any, **options: Any
) -> torch.Tensor:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        plugins=[ForkedRanks(rank, 2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        max_epochs=1,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return whole(module)


def analysed(folder: Path, build: Any, batches: Any, **options: Any) -> list[dict[str, Any]]:
    """What a step of the first rank comes to: under DDP, and sharded. Weights stay as without."""

    def on_a_rank(rank: int) -> list[dict[str, Any]]:
        found, where = [], {"default_root_dir": str(folder), **options}
        for strategy in (DDPStrategy, ModelParallelStrategy):
            weights, seen = [], Analyses(every_n_steps=2)
            for callbacks in ([seen], []):
                torch.manual_seed(0)
                data = batches[rank::2]
                weights.append(fit(rank, strategy(), build(), data, *callbacks, **where))
            assert torch.equal(*weights)
            report = seen.report
            assert report is not None
            messages = [each for each in report.trace.records if each.kind == MESSAGE]
            found.append(
                {
                    "flops": {phase: cost.flops for phase, cost in report.phases.items()},
                    "model_flops": report.model_flops,
                    "pointwise": report.phases["optimizer"].pointwise_flops,
                    "sent": report.sent_bytes,
                    "names": {each.name for each in messages if each.sent > SMALL},
                    "uncounted": report.uncounted,
                    "peak": report.peak_bytes,
                    "saved": report.saved_bytes,
                    "values": seen.values,
                }
            )
        return found

    return run_ranks(on_a_rank, timeout_s=120)[0]


TEXT = [rows(number, number + 1) for number in range(10)]


@pytest.mark.parametrize("window", [1, 2])
def test_flops_are_ddps_and_messages_those_of_the_formula(window: int, tmp_path: Path) -> None:
    """Blocks are gathered twice and summed once, what is outside of them gathered once.

    A ring of N ranks sends (N - 1) / N of each: here a half.
    """
    theirs, ours = analysed(
        tmp_path, pretrain(), TEXT, accumulate_grad_batches=window, gradient_clip_val=1.0
    )
    assert ours["flops"] == theirs["flops"]
    assert ours["model_flops"] == theirs["model_flops"] > 0
    assert ours["uncounted"] == theirs["uncounted"] == {}
    assert ours["saved"] == theirs["saved"]
    # The update is of half of the elements; scales and norms of a few more numbers.
    assert ours["pointwise"] == pytest.approx(theirs["pointwise"] / 2, rel=0.02)
    outside = 4 * (2 * 62 * WIDTH + WIDTH)  # 61 rows are cut into 31 and 31
    blocks = 2 * 4 * BLOCK
    expected = window * (3 * blocks + 2 * outside) / 2
    assert expected <= ours["sent"] <= expected + SMALL
    names = {"c10d._allgather_base_", "c10d._reduce_scatter_base_"}
    assert ours["names"] == names
    reduced = 4 * (2 * BLOCK + 2 * 61 * WIDTH + WIDTH)  # by DDP, once in a window
    assert reduced <= theirs["sent"] <= reduced + SMALL
    values = ours["values"]
    assert values["sent_gb"] == ours["sent"] / 1e9
    assert 0 < values["communication_share"] < 1
    assert sum(v for k, v in values.items() if k.endswith("_share")) == pytest.approx(1)
    assert "communication_share" not in theirs["values"]
    # Tokens of both ranks, and FLOPs over the peak of one device.
    learned = values["tokens_per_s"] * values["step_s"]
    assert learned == pytest.approx(theirs["values"]["tokens_per_s"] * theirs["values"]["step_s"])
    assert values["mfu"] * values["step_s"] * 1e9 == pytest.approx(ours["model_flops"])


def test_of_memory_one_or_two_blocks_are_whole_at_a_time(tmp_path: Path) -> None:
    layers = 12
    theirs, ours = analysed(tmp_path, pretrain(layers=layers), TEXT)
    block, outside = 4 * BLOCK, 4 * (2 * 61 * WIDTH + WIDTH)
    held = 16 * (layers * BLOCK + outside // 4)  # by DDP: weights, gradients, moments
    assert theirs["peak"] > held
    # Gathered are a block and its flat copy, one that comes next, and what is outside likewise.
    assert ours["peak"] < theirs["peak"] - held / 2 + 6 * block + 3 * outside
    assert ours["peak"] > held / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "batches"),
    [
        (pretrain(activation_checkpointing=True), TEXT),
        (pretrain(optimizer=Muon), TEXT),
        (pretrain(optimizer=partial(GaLoreAdamW, rank=4, update_proj_gap=3)), TEXT),
        (dpo, [pairs(number, number + 1) for number in range(12)]),
    ],
    ids=["recomputed", "Muon", "GaLoreAdamW", "DPO"],
)
def test_of_other_steps_too(build: Any, batches: Any, tmp_path: Path) -> None:
    theirs, ours = analysed(tmp_path, build, batches)
    for phase in ("forward", "recompute", "backward"):
        assert ours["flops"][phase] == theirs["flops"][phase], phase
    assert ours["flops"]["optimizer"] <= theirs["flops"]["optimizer"]
    assert ours["model_flops"] == theirs["model_flops"]
    assert ours["uncounted"] == theirs["uncounted"]


class WholeOnEach(Regression):
    """Shards nothing."""

    def configure_model(self) -> None:
        """Nothing."""


def test_layers_that_are_divided_are_refused() -> None:
    def on_a_rank(rank: int) -> None:
        rule = r"^RooflineMonitor\(strategy='ModelParallelStrategy'\): it divides layers among"
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        with pytest.raises(ValueError, match=rule):
            fit(rank, strategy, WholeOnEach(), TEXT, Analyses())

    run_ranks(on_a_rank)
