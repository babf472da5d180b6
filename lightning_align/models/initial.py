"""Random initial weights for a part of a model, the same whatever the part is.

The modules say themselves how they are filled: by ``reset_parameters()``, as torch's do, and by
``_init_weights(part)`` of the model around them, as in Hugging Face models and nanoGPT. Draws are
seeded by the name of the parameter that they fill, so neither the rank that draws nor what it has
drawn before matters, and no rank needs the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._compat.torch_modules import BeforeDraws
from lightning_align._errors import argument_error
from lightning_align.offload.away import Away
from lightning_align.seeds import derive_seed, fork_generators, seed_torch


@torch.no_grad()
def initialize(module: nn.Module, empty: Mapping[str, Tensor], seed: int, *, where: str) -> None:
    """Fill parameters of a module by what its parts define; the generators stay as they are.

    Args:
        module: The whole module; parameters of other ranks may be on the meta device.
        empty: name -> parameter on the CPU that needs values.
        seed: Seed of the run, the same on all ranks.
        where: Class the user called, for error messages.

    Raises:
        ValueError: If no part of the module fills one of them.
    """
    wanted, begun = set(empty.values()), set[Tensor]()
    with fork_generators(torch.device("cpu")), BeforeDraws(_seeding(empty, seed)):
        # From the inside out, as Hugging Face does: a block may set what its layers have drawn.
        for name, part, model in reversed(list(_parts(module))):
            if wanted.isdisjoint(part.parameters()):
                continue
            for parameter in wanted.intersection(part.parameters(recurse=False)) - begun:
                parameter.fill_(torch.nan)
                begun.add(parameter)
            seed_torch(derive_seed(seed, name, "module"))  # for draws into temporary tensors
            reset = getattr(part, "reset_parameters", None)
            reset = reset or getattr(part, "_reset_parameters", None)
            if reset is not None:
                reset()
            if model is not None:
                model._init_weights(part)
    for name, parameter in empty.items():
        if parameter.sum().isnan():
            _refuse(module, name, where)


def _parts(module: nn.Module, name: str = "", model: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """(name, part, the nearest module from there outwards that has ``_init_weights``)."""
    model = module if callable(getattr(module, "_init_weights", None)) else model
    yield name, module, model
    for child_name, child in module.named_children():
        yield from _parts(child, f"{name}.{child_name}", model)


def _seeding(parameters: Mapping[str, Tensor], seed: int) -> Callable[[Tensor], None]:
    """Called before each draw into a tensor: seeds by its name, and how often it was drawn into."""
    draws = Counter[str]()

    def seed_for(tensor: Tensor) -> None:
        # A part of a parameter may be drawn by itself. What is drawn into is in memory, and others
        # may have been where it is before.
        name = next((n for n, p in parameters.items() if _share(p, tensor)), None)
        if name is not None:
            seed_torch(derive_seed(seed, name, draws[name]))
            draws[name] += 1

    return seed_for


def _share(parameter: Tensor, drawn: Tensor) -> bool:
    if drawn.is_meta or isinstance(parameter, Away):
        return False
    return parameter.untyped_storage().data_ptr() == drawn.untyped_storage().data_ptr()


def _refuse(module: nn.Module, name: str, where: str) -> None:
    holder, _, attribute = name.rpartition(".")
    part = type(module.get_submodule(holder)).__name__
    rule = (
        f"its parameters are on the meta device, and neither reset_parameters() of {part} nor"
        f" _init_weights() of a module around it gives values to {attribute!r} of {name!r}"
    )
    way_out = f"Define {part}.reset_parameters(), or build the module with its values"
    raise argument_error(where, "model", type(module).__name__, rule, way_out)
