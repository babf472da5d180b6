"""Where a chain is cut into stages, and that it is cut there again."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
from torch import nn

from lightning_align.strategies.pipeline.chain import Chain
from lightning_align.strategies.pipeline.cutting import cut
from lightning_align.strategies.pipeline.layer_costs import LayerCosts, count_parameters
from tests.helpers.pipelines import Chained, Run
from tests.helpers.ranks import run_ranks

PROFILE = {"schedule": "1F1B", "num_microbatches": 4, "partition_method": "profile"}
RUN = Run("chain", PROFILE, steps=4, data={"masked": False})


@pytest.mark.slow
def test_a_module_that_has_been_cut_is_cut_there_again() -> None:
    def tables(rank: int) -> list[str]:
        found = []
        with RUN.setting(rank) as (trainer, _):
            loader = RUN.loader()
            trainer.validate(Chained(), loader, verbose=False)
            found.append(trainer.strategy.table)
            module = Chained()
            trainer.fit(module, loader)
            found.append(trainer.strategy.table)
            trainer.validate(module, loader, verbose=False)
            found.append(trainer.strategy.table)
        return found

    untrained, trained, after = run_ranks(tables)[0]
    assert "parameters" in untrained.splitlines()[0], "there is no training batch to take times of"
    assert "ms" in trained.splitlines()[0]
    assert after == trained


@contextmanager
def chain_of(*layers: nn.Module) -> Iterator[Chain]:
    module = pl.LightningModule()
    module.layers = nn.Sequential(*layers)  # type: ignore[assignment]
    chain = Chain(module, layers)
    yield chain
    chain.close()


def test_a_cut_shares_out_costs_and_what_rides_on_the_ends() -> None:
    costs = LayerCosts([1.0, 1.0, 1.0, 1.0], first=0.0, last=2.0, unit="ms")
    with chain_of(*(nn.Linear(1, 1) for _ in range(4))) as chain:
        stretches, table = cut(chain, costs, "parameters", 2, 1)
    assert stretches == [(0, 3), (3, 4)]
    assert "ms" in table.splitlines()[0]
    assert len(table.splitlines()) == 1 + len(stretches)


def test_layers_are_counted_or_named() -> None:
    parts = [nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)]
    with chain_of(*parts) as chain:
        costs = count_parameters(chain)
        assert cut(chain, costs, [1, 4], 2, 1)[0] == [(0, 1), (1, 5)]
        stretches, _ = cut(chain, costs, "type:Tanh", 2, 1)
    assert [sum(isinstance(parts[i], nn.Tanh) for i in range(*each)) for each in stretches] == [
        1,
        1,
    ]


@pytest.mark.parametrize(("per_rank", "named"), [(1, "devices"), (2, "num_stages_per_rank")])
def test_too_few_layers_name_the_argument_that_made_the_stages(per_rank: int, named: str) -> None:
    with chain_of(nn.Linear(1, 1)) as chain:
        costs = count_parameters(chain)
        with pytest.raises(ValueError, match=rf"PipelineStrategy\({named}={2 * per_rank}\)"):
            cut(chain, costs, "parameters", 2, per_rank)
