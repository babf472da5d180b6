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


def offloaded(folder, module, count=2, stays=(), every=2, **memory):
    """Its engine.

    Args:
        folder: Of the files.
        module: With blocks as children.
        count: Blocks in memory at a time.
        stays: Attributes of blocks that say what of it stays in memory.
        every: Of which blocks: each second one.
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
    store = ShardStore(folder, blocks, threads)
    modules = dict(module.named_children())
    engine = OffloadEngine(modules, store, threads, Memory(count, **memory))
    engine.whole.store_values()
    engine.attach()
    return engine
