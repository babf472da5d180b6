"""A plain torch module whose blocks come and go."""

import torch
from torch import nn

from lightning_align.offload.block import Block
from lightning_align.offload.buffers import Memory
from lightning_align.offload.engine import OffloadEngine
from lightning_align.offload.files import Threads
from lightning_align.offload.store import ShardStore


def network(width=6):
    torch.manual_seed(0)
    wider = width * 3 // 2

    def part():
        return nn.Sequential(nn.Linear(width, wider), nn.GELU(), nn.Linear(wider, width))

    return nn.Sequential(*(part() for _ in range(4)))


def offloaded(folder, module, count=2, stays=(), every=2, ranks=None, **memory):
    """Its engine.

    Args:
        folder: Of the files.
        module: With blocks as children.
        count: Blocks in memory at a time.
        stays: Attributes of blocks that say what of it stays in memory.
        every: Of which blocks: each second one.
        ranks: Who trains it.
        **memory: Of ``Memory``.
    """
    blocks = [
        Block(name, {f"{name}.{key}": p for key, p in part.named_parameters()})
        for name, part in module.named_children()
    ]
    for block in blocks[::every]:
        for attribute in stays:
            setattr(block, attribute, attribute != "is_stored")
    threads = Threads()
    store = ShardStore(folder, blocks, threads, ranks=ranks)
    modules = dict(module.named_children())
    engine = OffloadEngine(modules, store, threads, Memory(count, **memory))
    engine.whole.store_values()
    engine.attach()
    return engine
