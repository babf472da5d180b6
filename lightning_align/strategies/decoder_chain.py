"""A decoder cut between its blocks, with its own forward kept.

Each stage calls the model's whole forward, so rotary embeddings, masks and per-layer settings are
the model's own. What belongs to other stages passes its input on; the block before the stage's
first returns what was received, and the block after its last is where the output is caught. The
blocks of the stage itself are untouched, which matters when activation checkpointing calls them
again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers
from lightning_align.strategies.chain import WHERE, Chain, Step, replaced

_NOWHERE = (-9, -9)  # a stretch that no block is in, before or after


class DecoderChain(Chain):
    """The blocks of a module that has ``layers`` and calls ``forward_hidden`` once a step."""

    def __init__(self, module: pl.LightningModule) -> None:
        decoder: Any = module.layers
        assert isinstance(decoder, ModelLayers)
        self._decoder = decoder
        self._stretch: tuple[int, int] | None = None  # None: everything runs as it is
        self._received: Tensor | None = None
        self._caught: Tensor | None = None
        self._present: set[nn.Module] = set()
        self._calls: list[nn.Module] = []  # what passed its input on
        blocks = decoder.blocks
        in_blocks = {part for block in blocks for part in block.modules()}
        outside = [
            part
            for part in decoder.model.modules()
            if part not in in_blocks and part._parameters and part is not decoder.model
        ]
        self._overridden: list[nn.Module] = []
        for index, block in enumerate(blocks):
            self._override(block, partial(self._block, index))
        for part in outside:
            self._override(part, self._outside)
        before, after = self._trace(blocks, outside)
        super().__init__(module, blocks, before, after)

    def _override(self, part: nn.Module, forward: Any) -> None:
        inner = vars(part).get("forward", partial(type(part).forward, part))
        vars(part)["forward"] = partial(forward, part, inner)
        self._overridden.append(part)

    @override
    def close(self) -> None:
        for part in self._overridden:
            inner = vars(part).pop("forward").args[-1]
            if getattr(inner, "func", None) is not type(part).forward:
                vars(part)["forward"] = inner
        self._overridden.clear()

    def _block(self, index: int, block: nn.Module, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self._stretch is None or self._stretch[0] <= index < self._stretch[1]:
            return inner(*args, **kwargs)
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        begin, end = self._stretch
        if index == begin - 1:
            assert self._received is not None
            return self._received
        if index == end:
            self._caught = hidden_BTD
        self._calls.append(block)
        return hidden_BTD

    def _outside(self, part: nn.Module, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self._stretch is None or part in self._present:
            return inner(*args, **kwargs)
        self._calls.append(part)
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        width = getattr(part, "embedding_dim", None) or getattr(part, "out_features", None)
        if width is None:
            return given
        # Of the right shape and dtype, from which the model makes its masks, and of no cost.
        lead = given.shape if isinstance(part, nn.Embedding) else given.shape[:-1]
        weight: Any = part.weight
        return torch.zeros(*lead, width, dtype=weight.dtype, device=given.device)

    def _trace(
        self, blocks: list[nn.Module], outside: list[nn.Module]
    ) -> tuple[list[nn.Module], list[nn.Module]]:
        """What is called before the first block, and the rest; nothing is computed."""
        device = next(buffer.device for buffer in [*self._decoder.model.buffers(), torch.zeros(0)])
        tokens_BT = torch.zeros(1, 2, dtype=torch.long, device=device)
        with torch.no_grad(), self._at(*_NOWHERE):
            self._decoder.hidden_states(tokens_BT)
            calls = list(self._calls)
        if [part for part in calls if part in blocks] != blocks:
            name = type(self._decoder.model).__name__
            rule = "each of its blocks must be called once, in their order"
            way_out = "Name the chain with pipeline_layers() on the LightningModule"
            raise argument_error(WHERE, "model", name, rule, way_out)
        before = set(calls[: calls.index(blocks[0])])
        return [p for p in outside if p in before], [p for p in outside if p not in before]

    @contextmanager
    def _at(self, begin: int, end: int, received: Tensor | None = None) -> Iterator[None]:
        self._stretch, self._received = (begin, end), received
        self._present = set(self.owned(begin, end)) if end > begin else set()
        self._calls.clear()
        try:
            yield
        finally:
            # Backward may call blocks again: they run as they are.
            self._stretch = self._received = self._caught = None

    @override
    def run(self, begin: int, end: int, received: tuple[Tensor, ...], step: Step) -> Any:
        module: Any = self.module
        with self._at(begin, end, received[0] if begin else None):
            hidden_BTD = module.forward_hidden(**module.model_inputs(step.batch))
            return hidden_BTD if end == len(self.layers) else self._caught

    @contextmanager
    @override
    def seam(self, output: Any) -> Iterator[None]:
        calls = 0

        def forward_hidden(*_: Any, **__: Any) -> Any:
            nonlocal calls
            calls += 1
            return output

        with replaced(self.module, "forward_hidden", forward_hidden):
            yield
        if calls != 1:
            rule = f"a step must call forward_hidden once, not {calls} times"
            raise argument_error(WHERE, "model", type(self.module).__name__, rule)


def has_decoder(module: pl.LightningModule) -> bool:
    """Whether a module is cut between the blocks of its decoder."""
    layers = getattr(module, "layers", None)
    return isinstance(layers, ModelLayers) and hasattr(module, "forward_hidden")
