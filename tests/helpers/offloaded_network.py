"""A plain torch module whose blocks come and go."""

import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.engine import Memory, OffloadEngine
from lightning_align.offload.files import Threads
from lightning_align.offload.store import ShardStore


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(4))
    )


def offloaded(folder, module, count=2, **memory):
    blocks = [
        Block(name, {f"{name}.{key}": p for key, p in part.named_parameters()})
        for name, part in module.named_children()
    ]
    threads = Threads()
    store = ShardStore(folder, blocks, threads)
    modules = dict(module.named_children())
    engine = OffloadEngine(modules, store, threads, Memory(count, **memory))
    engine.whole.store_values()
    engine.attach()
    return engine
