"""Which parameters LISA trains when: the draw of blocks, and what lies outside of them.

Functions of numbers and modules; the callback in lisa.py says when they are called.
"""

import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, find_layers
from lightning_align.layers.find import find_language_models, inner_attribute, kept_layers
from lightning_align.layers.parts import find_parts
from lightning_align.seeds import derive_seed


def draw_blocks(
    seed: int, interval: int, num_draws: int, weights: Sequence[float]
) -> tuple[int, ...]:
    """Blocks of an interval, ascending: one after the other, with probability by weight.

    Drawn without replacement as the largest of u^(1/w), u uniform: Efraimidis and Spirakis 2006,
    https://doi.org/10.1016/j.ipl.2005.11.003, algorithm A. The same wherever it is called.

    Args:
        seed: Of the run.
        interval: Which interval of the run, counted from 0.
        num_draws: How many blocks.
        weights: One for each block, at least ``num_draws`` of them above 0.
    """
    generator = random.Random(derive_seed("lisa", seed, interval))
    # -log(u^(1/w)) is w's exponential variable; compared by logarithms, so that no weight is too
    # small or too large to divide by. The bound is below what 1 - u can give, but for 0.
    exponentials = [max(-math.log(1 - generator.random()), 1e-17) for _ in weights]
    keys = [
        (math.log(weight) - math.log(exponential) if weight > 0 else -math.inf, block)
        for block, (exponential, weight) in enumerate(zip(exponentials, weights, strict=True))
    ]
    return tuple(sorted(block for _, block in sorted(keys, reverse=True)[:num_draws]))


def weight_norms(blocks: Iterable[nn.Module]) -> list[float]:
    """Norm of all weights of each block together, computed in fp32."""
    norms = [
        torch.stack([_norm(parameter) for parameter in block.parameters()]).norm()
        for block in blocks
    ]
    return [float(norm) for norm in torch.stack(norms).cpu()]


def _norm(parameter: Tensor) -> Tensor:
    """Norm of all of it, wherever its parts are."""
    norm = parameter.detach().norm(dtype=torch.float32)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@dataclass(frozen=True)
class Partition:
    """The parameters that LISA may switch, each in one place.

    Attributes:
        always: Trained in every interval.
        never: Frozen in every interval.
        blocks: Those of each block; two blocks may share one.
    """

    always: frozenset[nn.Parameter]
    never: frozenset[nn.Parameter]
    blocks: tuple[frozenset[nn.Parameter], ...]

    def trained(self, active: Iterable[int]) -> set[nn.Parameter]:
        """What trains while the blocks ``active`` do."""
        return set(self.always).union(*(self.blocks[block] for block in active))

    def frozen(self, active: Iterable[int]) -> set[nn.Parameter]:
        """The others, without those that were frozen before LISA came."""
        return set(self.never).union(*self.blocks) - self.trained(active)


def partition(
    pl_module: nn.Module, layers: ModelLayers, *, train_embeddings: bool, train_head: bool
) -> Partition:
    """Sort the trainable parameters of a module.

    The head comes with the final norm, the token embedding with all else of the language model that
    is in no block. A parameter that is also outside of the blocks is not switched with them.

    Raises:
        ValueError: If embedding and head are one weight of which only one is to train, or if a
            block has nothing to train.
    """
    parts = find_parts(layers)
    named = dict(layers.model.named_parameters(remove_duplicate=False))
    embedding, head, *used = (
        {named[name] for name in parts.used_by(part)}
        for part in ("embedding", "head", *range(len(layers.blocks)))
    )
    if train_embeddings != train_head and embedding & head:
        rule = "embedding and head of this model are one weight, which trains or does not"
        way_out = "Give train_embeddings and train_head the same value"
        raise argument_error("LISA", "train_embeddings", train_embeddings, rule, way_out)
    never = set() if train_head else head
    never = never if train_embeddings else never | (embedding - head)
    trainable = {parameter for parameter in pl_module.parameters() if parameter.requires_grad}
    blocks = [trainable & parameters - embedding - head for parameters in used]
    for name, block in zip(layers.block_names, blocks, strict=True):
        if not block:
            rule = f"its block '{name}' has no parameter that requires a gradient"
            way_out = "Freeze nothing before LISA does: it freezes and releases blocks by itself"
            raise argument_error("LISA", "model", type(layers.model).__name__, rule, way_out)
    always = trainable.difference(never, *blocks)
    return Partition(frozenset(always), frozenset(trainable & never), tuple(map(frozenset, blocks)))


def language_model(pl_module: nn.Module, layers_attribute: str | None) -> ModelLayers:
    """The map of the language model that a module holds, or is.

    Args:
        pl_module: The module.
        layers_attribute: Dotted name of the list of blocks, from the model or from the module; None
            finds it.

    Raises:
        ValueError: If it cannot be read, or holds adapters of PEFT.
    """
    _refuse_adapters(pl_module)
    kept = kept_layers(pl_module)
    if kept is not None and layers_attribute is None:
        return kept
    models = find_language_models(pl_module).values()
    model = kept.model if kept is not None else next(iter(models), pl_module)
    if layers_attribute is not None:
        layers_attribute = inner_attribute(pl_module, model, layers_attribute)
    return find_layers(model, layers_attribute)


def _refuse_adapters(pl_module: nn.Module) -> None:
    # Nobody has such layers without having imported peft, so we need not import it.
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return
    for name, module in pl_module.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            rule = (
                f"it holds adapters of PEFT ('{name}'), beside which all other weights are frozen"
            )
            way_out = "Merge them with merge_and_unload(), or leave LISA out"
            raise argument_error("LISA", "model", type(pl_module).__name__, rule, way_out)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors on this rank, each counted once."""
    each = {id(tensor): tensor for tensor in tensors}.values()
    return sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in each)
