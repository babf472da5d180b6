"""Where the chain of a module is cut into stages, and the table that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed

from lightning_align.pipelining import partition, partition_table
from lightning_align.strategies.pipeline import layer_costs
from lightning_align.strategies.pipeline.chain import WHERE, Chain

Stretches = list[tuple[int, int]]  # (begin, end) of each stage's layers


class CostsOfLayers:
    """What the layers of a chain cost; a module that has been timed is cut there again."""

    def __init__(self) -> None:
        self._timed: tuple[pl.LightningModule, layer_costs.LayerCosts] | None = None

    def of(
        self,
        trainer: pl.Trainer,
        chain: Chain,
        count_for: Callable[[Any], int],
        group: distributed.ProcessGroup,
    ) -> layer_costs.LayerCosts:
        """Their times where there is training to take them of, else their parameters; collective.

        Arguments are those of ``time_layers``.
        """
        if self._timed is None or self._timed[0] is not chain.module:
            if trainer.state.fn != TrainerFn.FITTING:
                return layer_costs.count_parameters(chain)
            self._timed = chain.module, layer_costs.time_layers(trainer, chain, count_for, group)
        return self._timed[1]


def cut(
    chain: Chain,
    costs: layer_costs.LayerCosts,
    method: str | list[int],
    num_ranks: int,
    num_stages_per_rank: int,
) -> tuple[Stretches, str]:
    """The layers of each stage, and a table of them.

    Args:
        chain: The module as a chain.
        costs: Of its layers.
        method: How they are shared out, as ``partition_method`` of the strategy.
        num_ranks: Ranks of the pipeline.
        num_stages_per_rank: Stages on each.

    Raises:
        ValueError: If the method, or the number of stages, does not fit the layers.
    """
    ends = {"first_cost": costs.first, "last_cost": costs.last}
    stretches = partition(
        costs.layers,
        num_ranks * num_stages_per_rank,
        method,
        type_names=[type(layer).__name__ for layer in chain.layers],
        where=WHERE,
        stages_argument="num_stages_per_rank" if num_stages_per_rank > 1 else "devices",
        **ends,
    )
    table = partition_table(stretches, costs.layers, num_ranks=num_ranks, unit=costs.unit, **ends)
    return stretches, table
