"""Private APIs of torch for the rooms that never import Lightning, with a test each.

The twin of ``_compat.py``; ``tests/test_compat.py`` covers both.
"""

from __future__ import annotations

from typing import Any


def torch_pipeline_rank(
    schedule: str, rank: int, pp: int, num_microbatches: int, num_stages_per_rank: int
) -> list[Any]:
    """The actions that torch's schedule class makes for one rank, without stages or processes.

    ``get_schedule_ops`` answers the same question, but it also plans the communication of all
    ranks, which takes a second for 32 of them and grows with the square.
    """
    from torch.distributed.pipelining import schedules

    maker = object.__new__(schedules.get_schedule_class(schedule))
    rounds = max(1, num_microbatches // pp)
    maker.__dict__.update(
        pp_group_size=pp,
        n_local_stages=num_stages_per_rank,
        num_stages=pp * num_stages_per_rank,
        number_of_rounds=rounds,
        microbatches_per_round=num_microbatches // rounds,
        _n_microbatches=num_microbatches,
    )
    actions = maker._calculate_single_rank_operations(rank)
    # An overlapped forward and backward is a pair of actions under one that has no number.
    return [
        part
        for action in actions
        if action is not None
        for part in (action.sub_actions or (action,))
    ]
