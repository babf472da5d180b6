"""Whether a frozen reference model is the one that a run began with.

Two hashes, of what a model computes from: its weights with the buffers that a state holds, bit by
bit, and its configuration. They are the same on every machine and for any number of threads, so
nothing that is computed at construction takes part (rotary frequencies differ in the last bit from
one processor to another, and follow from the configuration).
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_align.models.adapters import base_state

# Of a configuration: where it is from, what is off in a reference, and what generates or draws.
NO_EFFECT = re.compile(
    r"_name_or_path|transformers_version|architectures|(torch_)?dtype|_attn_implementation.*"
    r"|.*dropout.*|.*pdrop|use_cache|output_.*|return_dict|.*_token_id|initializer_range"
    r"|id2label|label2id|problem_type|summary_.*"
)

ADAPTER_STATE = ("active_adapters", "disable_adapters")


def fingerprint(
    model: nn.Module,
    *,
    without_adapters: bool = False,
    reading: Callable[[Tensor], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> dict[str, str]:
    """Hashes ``weights`` and ``configuration``; empty for a model whose weights are on meta.

    Reads each weight once, as fast as memory gives it; not cryptographic. Collective, where ranks
    hold parts of them.

    Args:
        model: The model.
        without_adapters: Whether it counts as the model that its adapters were added to.
        reading: Around what reads one of its tensors.
    """
    state = model.state_dict(keep_vars=True)  # nothing is read yet: values may be on disk
    state = base_state(model, state) if without_adapters else state
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    if any(tensor.is_meta for tensor in tensors.values()):
        return {}
    weights = xxhash.xxh3_128()
    digests: dict[Tensor, str] = {}  # a tied weight has two names, and is read once
    for name, tensor in sorted(tensors.items()):
        if tensor not in digests:
            with reading(tensor):
                digests[tensor] = xxhash.xxh3_128_hexdigest(_bytes(tensor))
        described = f"{name} {tuple(tensor.shape)} {tensor.dtype} {digests[tensor]}\n"
        weights.update(described.encode())
    adapters = [] if without_adapters else _adapters(model)
    settings = [configuration(model), adapters] if adapters else configuration(model)
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "weights": weights.hexdigest(),
        "configuration": xxhash.xxh3_128_hexdigest(text.encode()),
    }


def _bytes(tensor: Tensor) -> Any:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    plain = dense.cpu().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy()


def configuration(model: nn.Module) -> Any:
    """The configuration of a transformers model; else the classes, numbers and words of modules."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return _with_effect(config.to_dict())
    settings = {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, (bool, int, float, str)) and name != "training" and name[0] != "_"
    }
    children = [[name, configuration(child)] for name, child in model.named_children()]
    return [type(model).__name__, _with_effect(settings), children]


def _with_effect(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        str(name): _with_effect(item)
        for name, item in value.items()
        if not NO_EFFECT.fullmatch(str(name))
    }


def _adapters(model: nn.Module) -> list[Any]:
    """What LoRA's layers multiply by, and whether they do: peft keeps it beside both."""
    return [
        [name, sorted(scaling.items()), *(getattr(layer, key, None) for key in ADAPTER_STATE)]
        for name, layer in model.named_modules()
        if isinstance(scaling := getattr(layer, "scaling", None), dict)
    ]


def fingerprint_until_0_1(model: nn.Module) -> str:
    """What checkpoints held before: an XOR of the bits of each parameter, blind to their order."""
    hashes = {
        name: int(torch.hash_tensor(parameter).view(torch.int64))
        for name, parameter in model.named_parameters()
    }
    return hashlib.blake2b(repr(sorted(hashes.items())).encode(), digest_size=16).hexdigest()
