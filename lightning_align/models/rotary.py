"""Rotary frequencies that keep their precision when a model is cast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def rotary_in_fp32(module: nn.Module) -> Iterator[None]:
    """Let a cast to 16 bits (``precision="bf16-true"``) pass by the rotary frequencies.

    transformers keeps them in fp32 when it loads a model in bf16. Rounded to bf16, the angles of
    Llama's heads would be off by up to 0.4 radians at position 1000.
    """
    kept = [
        (part, name, frequencies)
        for part in module.modules()
        for name, frequencies in part.named_buffers(recurse=False)
        if name.endswith("inv_freq") and frequencies.dtype == torch.float32
    ]
    yield
    for part, name, frequencies in kept:
        cast = part.get_buffer(name)
        if cast.dtype in (torch.bfloat16, torch.float16):
            setattr(part, name, frequencies.to(cast.device))
