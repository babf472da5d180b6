"""The reference before training where ranks hold parts of it: the same cache, the same training."""

import os
import signal
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.numpy import load_file
from torch.distributed.tensor import DTensor

from lightning_align.data import reference_cache
from lightning_align.modules import precomputed
from lightning_align.run.protocols import gathered
from tests.helpers.offloaded import small
from tests.helpers.ranks import ForkedRanks, end_of_ranks, run_ranks
from tests.modules.test_precomputed import (
    counted,
    data,
    files,
    fit,
    module,
    trainer_of,
    vocabulary,
    write_pairs,
)
from tests.modules.test_pretrain import llama, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

HOST = {"offload_params_device": "cpu", "offload_optimizer_device": "cpu"}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "model_parallel": ModelParallelStrategy,
    "zero_infinity": partial(small, overwrite=True),
    "zero_infinity_cpu": partial(small, **HOST),
}
OFFLOADED = pytest.param("zero_infinity", marks=pytest.mark.slow)
BY_STRATEGY = pytest.mark.parametrize("name", ["model_parallel", OFFLOADED, "zero_infinity_cpu"])
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: Any) -> None:
    """Of 20 completions 8, 8 and 4: in the second round one rank has none, and calls as often."""
    monkeypatch.setattr(reference_cache, "PIECE", 8)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl")


def options_of(kind: str) -> dict[str, Any]:
    if kind == "adapters":
        return {"peft_config": LORA}
    return {} if kind == "the policy" else {"ref_model": llama(vocab_size=vocabulary())}


def fit_on(
    rank: int, ours: Any, name: str, pairs: Path, ckpt_path: Any = None, **options: Any
) -> tuple[Any, list[int]]:
    """Half of each batch; the values of the model then, whole, and what the reference was asked."""
    strategy = options.pop("strategy", None) or STRATEGIES[name]()
    on_ranks = {"devices": 2, "plugins": [ForkedRanks(rank, 2)], "strategy": strategy}
    with counted() as asked:
        options = {"default_root_dir": str(pairs.parent), **options}
        fit(ours, data(pairs, batch_size=1), ckpt_path, **{**options, **on_ranks})
    with gathered(strategy, list(ours.parameters())):
        values = [p.full_tensor() if isinstance(p, DTensor) else p for p in ours.parameters()]
        found = torch.cat([p.detach().flatten() for p in values]).numpy()
    return found, asked


def values_of(cache: Path) -> dict[str, np.ndarray]:
    return {path.name: load_file(path)["values"] for path in cache.rglob("*.safetensors")}


@BY_STRATEGY
@pytest.mark.parametrize(
    "kind",
    ["the policy", "a model beside it", pytest.param("adapters", marks=pytest.mark.slow)],
)
def test_cache_and_training_are_those_of_one_process(
    name: str, kind: str, tmp_path: Path, pairs: Path
) -> None:
    def on_a_rank(rank: int, cache: str) -> Any:
        ours = module(tmp_path / cache, **options_of(kind))
        beside = [weakref.ref(each) for each in ours.frozen_modules().values()]
        assert len(beside) == (kind == "a model beside it")
        found, asked = fit_on(rank, ours, name, pairs)
        assert ours.frozen_modules() == {}
        assert not any(each() for each in beside), "it is released"
        return found, asked

    ranks = run_ranks(lambda rank: on_a_rank(rank, "ranks"), timeout_s=120)
    alone = module(tmp_path / "one", **options_of(kind))
    fit(alone, data(pairs))
    assert [asked for _, asked in ranks] == [[8, 4], [8, 0]]
    for found, _ in ranks:
        np.testing.assert_allclose(found, weights(alone).numpy(), rtol=0, atol=1e-5)
    ours, theirs = values_of(tmp_path / "ranks"), values_of(tmp_path / "one")
    assert len(theirs) == 3
    assert ours.keys() == theirs.keys()
    for file, values in theirs.items():
        np.testing.assert_allclose(ours[file], values, rtol=1e-5, atol=1e-6)
    warm = run_ranks(lambda rank: on_a_rank(rank, "one"), timeout_s=120)
    assert [asked for _, asked in warm] == [[], []]


@BY_STRATEGY
def test_killed_before_training_it_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, pairs: Path
) -> None:
    write = reference_cache.ReferenceCache.write

    def on_a_rank(rank: int, cache: str, dies: bool = False) -> Any:
        def last_write(self: Any, values: Any) -> None:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, values)

        with pytest.MonkeyPatch.context() as patch:
            if dies:
                patch.setattr(reference_cache.ReferenceCache, "write", last_write)
            return fit_on(rank, module(tmp_path / cache), name, pairs)

    whole = run_ranks(lambda rank: on_a_rank(rank, "whole"), timeout_s=120)
    ended = end_of_ranks(lambda rank: on_a_rank(rank, "killed", dies=True), timeout_s=30, grace_s=2)
    assert ended[1].exit_code == -signal.SIGKILL
    assert len(files(tmp_path / "killed")) == 1
    resumed = run_ranks(lambda rank: on_a_rank(rank, "killed"), timeout_s=120)
    assert [asked for _, asked in resumed] == [[8], [4]]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert np.array_equal(resumed[0][0], whole[0][0])


@BY_STRATEGY
def test_a_value_that_is_not_finite_on_one_rank_is_told_to_all(
    name: str, tmp_path: Path, pairs: Path
) -> None:
    def on_a_rank(rank: int) -> None:
        def broken(*rows: Any, **options: Any) -> Any:
            scored = score(*rows, **options)
            return scored._replace(token_logps_BT=torch.nan * scored.token_logps_BT)

        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(precomputed, "completion_logps", broken)
            with pytest.raises(ValueError, match=r"reference\.logps_B=nan\): must be finite"):
                fit_on(rank, module(tmp_path / "cache"), name, pairs)

    score = precomputed.completion_logps
    run_ranks(on_a_rank, timeout_s=60)
    assert files(tmp_path / "cache") == {}


@BY_STRATEGY
def test_a_policy_is_asked_between_evaluations_as_long_as_it_has_not_learned(
    name: str, tmp_path: Path, pairs: Path
) -> None:
    more = write_pairs(tmp_path / "more.jsonl", 13)

    def on_a_rank(rank: int) -> Any:
        ours, found = module(tmp_path / "cache"), []
        on_ranks = {"devices": 2, "plugins": [ForkedRanks(rank, 2)], "strategy": STRATEGIES[name]()}
        trainer = trainer_of(default_root_dir=str(tmp_path), **on_ranks)
        for path in (pairs, more):
            with counted() as asked:
                held_out = data(path, batch_size=1, val_fraction=0.3)
                (metrics,) = trainer.validate(ours, held_out, verbose=False)
            found.append((sum(asked), metrics["val_loss"]))
        with counted() as asked:
            trainer.fit(ours, data(pairs, batch_size=1))
        assert asked == []
        path = write_pairs(tmp_path / f"other{rank}.jsonl", 10, 36)
        other = data(path, batch_size=1, val_fraction=0.3)
        with pytest.raises(ValueError, match="has moved on"):
            trainer.validate(ours, other)
        return found

    ranks = run_ranks(on_a_rank, timeout_s=120)
    assert sum(found[0][0] for found in ranks) == 20
    assert sum(found[1][0] for found in ranks) == 6
    for found in ranks:
        assert [loss for _, loss in found] == pytest.approx([0.6931471805599453] * 2, rel=1e-5)


@pytest.mark.parametrize("name", ["zero_infinity", "zero_infinity_cpu"])
def test_blocks_of_a_reference_that_is_released_take_no_memory(
    name: str, tmp_path: Path, pairs: Path
) -> None:
    """Its embedding and head among them, which stay in host memory as long as it is asked."""

    def on_a_rank(rank: int) -> Any:
        ours = module(tmp_path / "cache", **options_of("a model beside it"))
        strategy = STRATEGIES[name]()
        fit_on(rank, ours, name, pairs, strategy=strategy)
        store = strategy._engine.store
        frozen = [block for block in store.blocks.values() if block.read_only]
        assert len(frozen) == 3
        assert all(block.memory is None and not block.kept for block in frozen)
        learned = [block for block in store.blocks.values() if not block.read_only]
        in_memory = name == "zero_infinity_cpu"
        assert store.host_nbytes == in_memory * sum(block.section_nbytes for block in learned)
        strategy.close()

    run_ranks(on_a_rank, timeout_s=60)


@pytest.mark.parametrize("name", ["zero_infinity", "zero_infinity_cpu"])
def test_one_rank_asks_its_blocks_alone(name: str, tmp_path: Path, pairs: Path) -> None:
    found = []
    for strategy in ("auto", STRATEGIES[name]()):
        ours = module(tmp_path / str(len(found)), **options_of("a model beside it"))
        fit(ours, data(pairs), strategy=strategy, default_root_dir=str(tmp_path))
        whole = nullcontext() if strategy == "auto" else strategy.gathered()
        with whole:
            found.append((weights(ours).clone(), files(tmp_path / str(len(found)))))
    strategy.close()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.slow
def test_a_committed_step_goes_on_without_the_memory_of_its_reference(
    tmp_path: Path, pairs: Path
) -> None:
    found = []
    for limits in ((-1,), (3, -1)):
        for max_steps in limits:
            ours = module(tmp_path / "cache", **options_of("a model beside it"))
            strategy = small(nvme_path=str(tmp_path / f"nvme{len(found)}"))
            fit(ours, data(pairs), "last", strategy=strategy, max_steps=max_steps)
            with strategy.gathered():
                values = weights(ours).clone()
            strategy.close()
        found.append(values)
    assert torch.equal(found[0], found[1])
