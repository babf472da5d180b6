"""``partition_method="profile"``: layers are timed on the first batch, and what is cut by that."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_align import PretrainModule
from lightning_align.strategies.pipeline import layer_costs
from tests.helpers.pipelines import Batches, Chained, Run
from tests.helpers.ranks import run_ranks
from tests.helpers.sequential import fit_sequential
from tests.helpers.sleeping_pipeline import SleepingStage
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.pipeline.test_checkpoints import SaveAt

PROFILE = {"schedule": "1F1B", "num_microbatches": 4, "partition_method": "profile"}
RUN = Run("chain", PROFILE, steps=4, data={"masked": False})

SLOW = pytest.mark.slow  # `make test-laws` runs them


class Sleeping(pl.LightningModule):
    """Layers of one parameter each, of which one takes ten times as long."""

    def __init__(self, slow: int) -> None:
        super().__init__()
        seconds = [0.02 if index == slow else 0.002 for index in range(6)]
        self.net = nn.Sequential(*(SleepingStage(i, s, s, []) for i, s in enumerate(seconds)))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.alone  # times layers
@pytest.mark.parametrize(("slow", "cut"), [(0, [1, 5]), pytest.param(5, [5, 1], marks=SLOW)])
def test_a_costly_layer_is_cut_around(slow: int, cut: list[int]) -> None:
    def train(rank: int) -> Any:
        with RUN.setting(rank) as (trainer, seen):
            trainer.fit(Sleeping(slow), DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=4))
            here = [not p.is_meta for p in trainer.lightning_module.parameters()]
        return trainer.strategy.table, here, seen.losses

    (table, first, losses), (other_table, last, other_losses) = run_ranks(train)
    assert table == other_table
    assert "ms" in table.splitlines()[0]
    assert (sum(first), sum(last)) == tuple(cut)
    assert losses == other_losses
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "model", ["chain", pytest.param("llama_tied", marks=SLOW), pytest.param("gpt2", marks=SLOW)]
)
def test_timing_leaves_the_numbers_of_the_run_alone(model: str) -> None:
    """Every rank cuts alike; and not a bit of data, noise or sums is another."""
    run = replace(RUN, model=model, overrides={"dropout": 0.0} if model == "chain" else {})

    def train(rank: int) -> Any:
        results = []
        for method in ("profile", [3, 3] if model == "chain" else [2, 2]):
            assert run.strategy is not None
            here = replace(run, strategy={**run.strategy, "partition_method": method})
            with here.setting(rank) as (trainer, seen):
                pl.seed_everything(1, verbose=False)
                data = Batches(4, masked=model != "chain")
                loader = DataLoader(
                    data, batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(2)
                )
                trainer.fit(here.module(), loader)
            results.append((seen.losses, seen.logged, torch.rand(2).tolist()))
            results.append(trainer.strategy.table)
        return results

    first, second = run_ranks(train)
    assert first == second
    (losses, logged, drawn), table, (plain_losses, plain_logged, plain_drawn), _ = first
    assert table.split()[:4] == ["stage", "rank", "layers", "ms"]
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for ours, theirs in zip(logged, plain_logged, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert drawn == plain_drawn


@pytest.mark.slow
def test_timing_leaves_no_trace_in_batch_norm() -> None:
    buffers = [end[1] for end in run_ranks(lambda rank: fit_sequential(rank, PROFILE, norm=True))]
    # On the rank that has the layer each micro-batch counts once, on the other none does.
    assert sorted(b["net.1.num_batches_tracked"] for b in buffers) == [0, 5 * 4]


class Parts:
    """Which modules are timed, and how many parameters have memory then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timed: Counter[str] = Counter()
        self.most = 0
        median = layer_costs._Timing._median

        def watched(timing: Any, call: Any, inputs: Any, parts: Any) -> float:
            self.timed.update(type(part).__name__ for part in parts)
            here = (p.numel() for p in timing.chain.module.parameters() if not p.is_meta)
            self.most = max(self.most, sum(here))
            return median(timing, call, inputs, parts)

        monkeypatch.setattr(layer_costs._Timing, "_median", watched)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "block", "times"),
    [
        ("llama", "LlamaDecoderLayer", 1),
        ("gpt2", "GPT2Block", 1),
        ("gemma2", "Gemma2DecoderLayer", 2),
    ],
)
def test_a_model_without_values_is_timed_a_kind_of_layers_at_a_time(
    model: str, block: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "n_layer" if model == "gpt2" else "num_hidden_layers"
    TINY_MODELS[model](**{name: 6}).save_pretrained(tmp_path)
    parts = Parts(monkeypatch)

    def train(rank: int) -> Any:
        with replace(RUN, model=model).setting(rank) as (trainer, seen):
            with trainer.init_module(empty_init=True):
                module = PretrainModule(str(tmp_path))
            trainer.fit(module, DataLoader(Batches(4), batch_size=None))
            whole = sum(p.numel() for p in module.parameters())
            blocks = sum(p.numel() for p in module.layers.blocks[0].parameters())
        return dict(parts.timed), parts.most, whole - 5 * blocks, seen.losses

    (timed, most, allowed, losses), (nothing, none, _, _) = run_ranks(train)
    assert timed[block] == times, "attention to a window and to all are two kinds"
    assert 0 < most <= allowed, "embedding, head and one block of six"
    assert (nothing, none) == ({}, 0), "one rank takes the times"
    assert losses[-1] < losses[0]


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(Batches(4, masked=False).batches)


class Once(nn.Module):
    """Can be called once for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("again")
        return hidden


@pytest.mark.parametrize("case", ["stream", "once"])
def test_what_cannot_be_timed_is_refused_on_all_ranks(case: str) -> None:
    def refused(rank: int) -> str:
        with RUN.setting(rank) as (trainer, _):
            module = Chained()
            loader: DataLoader[Any] = RUN.loader()
            if case == "stream":
                loader = DataLoader(Stream(), batch_size=None)
            else:
                module.blocks[1] = Once()  # type: ignore[assignment]
            with pytest.raises(ValueError, match=r"^PipelineStrategy\(partition_method=") as told:
                trainer.fit(module, loader)
            assert all(p.grad is None for p in module.parameters())
        return str(told.value)

    first, second = run_ranks(refused, timeout_s=30)
    assert first == second
    expected = {
        "stream": "first batch cannot be made, or not without a trace in the loader. Use a DataLoa",
        "once": "layer 2 (Once) cannot be timed by itself: RuntimeError: again. Use 'parameters'",
    }
    assert expected[case] in first


class Stateful(DataLoader[Any]):
    """Knows its place in the data."""

    place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": 17}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.mark.slow
def test_a_resumed_run_is_timed_too_and_its_loader_finds_its_place(tmp_path: Path) -> None:
    def train(rank: int) -> Any:
        found = []
        path = tmp_path / "middle.ckpt"
        for options in ({}, {"ckpt_path": path, "weights_only": False}):
            with RUN.setting(rank) as (trainer, seen):
                loader = Stateful(Batches(4, masked=False), batch_size=None)
                trainer.callbacks.append(SaveAt(2, path))
                trainer.fit(Chained(), loader, **options)
            found.append((trainer.strategy.table.split()[3], loader.place, seen.losses))
        return found

    (unit, place, losses), (again, found, _) = run_ranks(train)[0]
    assert (unit, place, len(losses)) == ("ms", 0, 4)
    assert (again, found) == ("ms", 17)
