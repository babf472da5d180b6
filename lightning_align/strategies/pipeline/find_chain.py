"""Where a module has its chain of layers, and what goes with the first and the last of them.

In this order: the module names it with ``pipeline_layers()``; it holds one decoder, its own or one
of transformers, which is cut between blocks; or all its parameters are in one ``nn.Sequential``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_align._compat import torch_modules
from lightning_align.layers import ModelLayers, find_layers, is_hugging_face
from lightning_align.layers.find import kept_layers
from lightning_align.run.protocols import NamesLayers
from lightning_align.strategies.pipeline.chain import Chain, chain_error, refuse_compiled


def find_chain(module: pl.LightningModule) -> Chain:
    """The chain of a module; calls of its parts are intercepted until ``close``.

    Raises:
        ValueError: If there is none, or it is compiled.
    """
    refuse_compiled(module)
    if isinstance(module, NamesLayers):
        layers = list(module.pipeline_layers())
        if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
            rule = "its pipeline_layers() must return modules in the order they are called"
            raise chain_error(module, rule)
        return Chain(module, layers)
    if (decoder := kept_layers(module)) is not None:
        return _decoder_chain(module, decoder)
    holder: nn.Module = module
    while not isinstance(holder, nn.Sequential):
        if is_hugging_face(holder):
            return _decoder_chain(module, find_layers(holder))
        children = holder.named_children()
        trained = {n: child for n, child in children if next(child.parameters(), None) is not None}
        if len(trained) != 1 or next(holder.parameters(recurse=False), None) is not None:
            names = sorted(trained)
            rule = f"cannot tell the chain of layers that stages are cut from; it holds {names}"
            way_out = "Define pipeline_layers() that returns the modules in the order of their"
            raise chain_error(module, rule, f"{way_out} calls, or use nn.Sequential")
        (holder,) = trained.values()
    return Chain(module, list(holder))


def _decoder_chain(module: pl.LightningModule, decoder: ModelLayers) -> Chain:
    """The blocks of a decoder; its other parts go with the first of them, or with the last."""
    blocks = decoder.blocks
    taken = {decoder.model, *(part for block in blocks for part in block.modules())}
    outside = [p for p in decoder.model.modules() if p not in taken and p._parameters]
    name, way_out = type(decoder.model).__name__, "Name the chain with pipeline_layers()"
    try:
        calls = _calls(decoder, blocks, outside)
    except Exception as error:  # such as a view that takes its inputs for other shapes
        rule = f"the forward of its {name} must run on values that are all zero, and fails: {error}"
        raise chain_error(module, rule, way_out) from error
    if [part for part in calls if part in blocks] != blocks:
        rule = f"each block of its {name} must be called once, in their order"
        raise chain_error(module, rule, way_out)
    called_first = set(calls[: calls.index(blocks[0])])
    before = [part for part in outside if part in called_first]
    return Chain(module, blocks, before, [part for part in outside if part not in called_first])


def _calls(
    decoder: ModelLayers, blocks: list[nn.Module], outside: list[nn.Module]
) -> list[nn.Module]:
    """What a decoder calls of these, in order; nothing is computed."""
    calls: list[nn.Module] = []
    buffers = [*decoder.model.buffers(), torch.zeros(0)]
    tokens_BT = torch.zeros(1, 2, dtype=torch.long, device=buffers[0].device)

    def called(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(part)
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        width = getattr(part, "embedding_dim", None) or getattr(part, "out_features", None)
        if width is None:
            return given
        # Of the right shape and dtype, from which the model makes its masks.
        lead = given.shape if isinstance(part, nn.Embedding) else given.shape[:-1]
        weight: Any = part.weight
        return torch.zeros(*lead, width, dtype=weight.dtype, device=given.device)

    with torch.no_grad(), _intercepted([*blocks, *outside], called, decoder.head_module):
        decoder.hidden_states(tokens_BT)
    return calls


@contextmanager
def _intercepted(parts: list[nn.Module], called: Any, head: nn.Module) -> Iterator[None]:
    intercepted = [part for part in parts if part is not head]  # ``hidden_states`` minds the head
    for part in intercepted:
        torch_modules.intercept_calls(part, partial(called, part))
    try:
        yield
    finally:
        for part in intercepted:
            torch_modules.intercept_calls(part, None)
