"""The stages of a rank: shapes are found without a trace, and an error says where it was."""

import contextlib
import time
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_align.pipelining import Event
from lightning_align.strategies.pipeline.chain import Chain, Step
from lightning_align.strategies.pipeline.stages import BatchInProgress, StageMetas, StageModule
from lightning_align.strategies.pipeline.trees import Meta
from tests.helpers.ranks import run_ranks
from tests.helpers.sequential import Sequential, fit_sequential, pairs

GPIPE = {"schedule": "GPipe", "num_microbatches": 4}


def test_finding_shapes_leaves_no_trace_in_batch_norm() -> None:
    strategy = {**GPIPE, "partition_method": [2, 2]}
    (_, buffers), _ = run_ranks(lambda rank: fit_sequential(rank, strategy, norm=True))
    assert buffers["net.1.num_batches_tracked"] == 5 * 4


def test_an_error_says_where_this_rank_was() -> None:
    def places(rank: int) -> list[str]:
        work = BatchInProgress(stages=(rank, rank + 2))
        seen = [work.place]
        with work.action("F", 2, 0):
            seen.append(work.place)
        with contextlib.suppress(ArithmeticError), work.action("B", 0, 3):
            raise ArithmeticError
        return [*seen, work.place]

    first, second = run_ranks(places)
    assert first == [
        "rank 0, stage 0, 2, before its first micro-batch",
        "rank 0, stage 2, forward of micro-batch 0",
        "rank 0, stage 0, backward of micro-batch 3",
    ]
    assert second[0] == "rank 1, stage 1, 3, before its first micro-batch"


def test_actions_are_timed_where_they_are_recorded() -> None:
    def events(_: int) -> list[Event]:
        work = BatchInProgress(events=[])
        for number in range(2):
            with work.action("F", 1, number):
                time.sleep(0.002)
        return work.events or []

    ((first, second),) = run_ranks(events, 1)
    assert first[:4] == (0, "F", 1, 0)
    assert second[:4] == (0, "F", 1, 1)
    assert first.start_s < first.end_s <= second.start_s < second.end_s


def test_a_stage_hands_on_tensors_without_values_as_they_will_be() -> None:
    """One forward finds the shapes of a key; the next batch of its shape needs none."""
    calls = []

    class Counting(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            calls.append(hidden.shape)
            return super().forward(hidden)

    def find(_: int) -> Any:
        module = Sequential()
        module.net = nn.Sequential(Counting(8, 16), nn.Tanh(), Counting(16, 4))
        chain, work = Chain(module, list(module.net)), BatchInProgress()
        work.steps = [Step(module.training_step, [*next(iter(pairs()))], (0,), seed=1)]
        stages = {i: StageModule(chain, i, *cut, work) for i, cut in enumerate([(0, 1), (1, 3)])}
        metas = StageMetas(stages, 2, distributed.group.WORLD)
        shapes, handed_on = metas.of("key", module.device)
        assert metas.of("key", module.device) == (shapes, handed_on)
        return shapes.layers, handed_on, len(calls)

    layers = [Meta((8, width), torch.float32) for width in (16, 16, 4)]
    assert run_ranks(find, 1) == [(layers, [[layers[0]], [Meta((), torch.float32)]], 2)]
