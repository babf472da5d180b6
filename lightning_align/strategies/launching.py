"""Processes of a strategy: how they are started, and how they become one group."""

from __future__ import annotations

import atexit
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import reset_seed
from torch import distributed

from lightning_align._compat import lightning_processes
from lightning_align.run.protocols import GathersParameters
from lightning_align.strategies import failure


def launcher(strategy: Any) -> Any:
    """What starts the processes, unless torchrun or a cluster has, and lets them end together."""
    if strategy.start_method != "popen":
        whole = strategy.gathered if isinstance(strategy, GathersParameters) else nullcontext
        return lightning_processes.multiprocessing_launcher(strategy, strategy.start_method, whole)
    return lightning_processes.ScriptLauncher(
        strategy.cluster_environment,
        strategy.num_processes,
        strategy.num_nodes,
        lambda: failure.end_together(strategy.global_rank),
    )


def join_ranks(strategy: Any) -> None:
    """Make the processes one group, unless they are."""
    reset_seed()
    environment = strategy.cluster_environment
    environment.set_global_rank(strategy.node_rank * strategy.num_processes + strategy.local_rank)
    environment.set_world_size(strategy.num_nodes * strategy.num_processes)
    lightning_processes.set_rank(strategy.global_rank)
    if not distributed.is_initialized():  # left before the interpreter ends: gloo has threads
        atexit.register(failure.leave)
    lightning_processes.join_process_group(
        environment, strategy.root_device, strategy.process_group_backend, strategy.timeout
    )
    failure.keep_second_store(environment.main_address, strategy.num_nodes)


def agree_on_generators(device: torch.device) -> None:
    """Bring the generators of all ranks to one seed if they have different ones; collective.

    A shuffled data loader draws its order from them, and all ranks must load the same batches.
    """
    seed = torch.tensor([torch.initial_seed() % 2**63], device=device)
    first = seed.clone()
    distributed.broadcast(first, 0)
    differs = (seed != first).long()
    distributed.all_reduce(differs)
    if differs:
        torch.manual_seed(int(first[0]))
        random.seed(int(first[0]))
        np.random.seed(int(first[0]) % 2**32)
