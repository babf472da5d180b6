"""Host memory, stages and drives on two ranks, against DDP, to the bit."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_align import Muon
from lightning_align.modules import PretrainModule
from lightning_align.offload import striped
from tests.helpers.covers import cover, with_slow
from tests.helpers.offloaded import ADAMW, Regression, small, text
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import TINY_MODELS
from tests.strategies.zero_infinity.test_ranks import (
    assert_same,
    both,
    compare,
    fit,
    largest_difference,
    points_of,
)

HOST = {"offload_params_device": "cpu", "offload_optimizer_device": "cpu"}
PLACES = {
    "cpu": HOST,
    "half": {"offload_fraction": 0.5},
    "stage 2": {"stage": 2},
    "stage 1": {"stage": 1},
    "state on the drive": {"offload_params_device": "cpu"},
}
RUNS = {"plain": {}, "clipped": {"gradient_clip_val": 0.05}}


@cover(arguments=PLACES, options=RUNS)
def test_wherever_it_lies_ranks_train_as_under_ddp(tmp_path, arguments, options):
    clipped = "gradient_clip_val" in options

    def build():
        module = Regression(width=48, schedule=True)
        # Gradients of biases before a batch norm are rounding, which AdamW makes whole steps of:
        # with sums in another order the runs would part, on some processors.
        module.norm = nn.LayerNorm(48) if clipped else module.norm
        return module

    options = {"accumulate_grad_batches": 2, **options}
    pair = both(tmp_path, build, points_of, arguments=arguments, **options)
    if not clipped:
        assert_same(*pair)
    # Norms of weights that are cut are put together from squares: another order of sums.
    assert largest_difference(*pair) < 1e-5


@pytest.mark.parametrize(
    "arguments", with_slow({"cpu": HOST, "stage 2": {"stage": 2}}, ["stage 2"])
)
def test_a_tied_language_model(tmp_path, arguments):
    build = lambda: PretrainModule(TINY_MODELS["llama_tied"](), optimizer=ADAMW)  # noqa: E731
    compare(tmp_path, build, text, arguments=arguments, accumulate_grad_batches=2)


@pytest.mark.parametrize("arguments", with_slow({"cpu": HOST, "stage 2": {"stage": 2}}, ["cpu"]))
def test_whole_matrices_in_sections_of_memory(tmp_path, arguments):
    build = partial(Muon, lr=1e-2)
    module = lambda: PretrainModule(TINY_MODELS["llama"](), optimizer=build)  # noqa: E731
    assert largest_difference(*both(tmp_path, module, text, arguments=arguments)) < 1e-5


@pytest.mark.parametrize("count", with_slow([2, 4], ["4"]))
def test_drives_are_taken_rank_by_rank(tmp_path, monkeypatch, count):
    """With more of them than ranks each stripes its files over two."""
    monkeypatch.setattr(striped, "STRIPE", 4096)
    paths = [str(tmp_path / f"drive{number}") for number in range(count)]
    build = lambda: Regression(width=48)  # noqa: E731
    whole = compare_and_count(tmp_path, build, paths)
    assert [sorted(found) for found in whole] == [
        [f"rank{number % 2:05d}"] for number in range(count)
    ]


def compare_and_count(tmp_path, build, paths):
    compare(tmp_path, build, points_of, arguments={"nvme_path": paths})
    return [[p.name for p in (tmp_path / path).iterdir() if p.is_dir()] for path in paths]


@pytest.mark.parametrize("arguments", [HOST, {"offload_fraction": 0.5}], ids=["cpu", "half"])
def test_nothing_is_committed_and_a_section_is_all_that_a_rank_has(tmp_path, arguments):
    def run(rank):
        strategy = small(**arguments)
        fit(tmp_path, rank, Regression(width=48), points_of(), strategy)
        store = strategy._engine.store
        held = {file._memory.numel() for file in store._files.values() if hasattr(file, "_memory")}
        sections = {block.section_nbytes for block in store.blocks.values()}
        state = [
            value.numel()
            for each in strategy.optimizers[0].state.values()
            for value in each.values()
            if isinstance(value, torch.Tensor) and value.numel() > 1
        ]
        numel = sum(p.numel() for p in strategy.lightning_module.parameters())
        strategy.close()
        return held <= sections, store.commits, sum(state) < 1.3 * numel  # of 2 for each

    assert run_ranks(run) == [(True, False, True)] * 2
    assert not list(tmp_path.rglob("committed"))
