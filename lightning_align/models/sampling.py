"""Prompts that a model continues, as rows that can be scored.

Shapes: B prompts, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align.layers.sharding import as_forward


@torch.no_grad()
def continue_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
    pad_token_id: int,
    together: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Rows of prompts, filled up on the left, with what a model writes after each.

    Args:
        model: A model of transformers with ``generate``.
        prompts: Tokens of each prompt.
        max_new_tokens: Tokens to write, at most.
        eos_token_id: Token that ends a completion, and is part of it; None if none does.
        pad_token_id: Token that fills rows up.
        together: Whether all ranks continue prompts at once, as they hold parts of the model; none
            then stops before all have written their last token.
        **options: Of ``generate``, such as ``do_sample``.

    Returns:
        ``input_ids``, ``attention_mask`` and ``completion_mask``, each (B, T), on the model's
        device.
    """
    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), pad_token_id, device=device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.as_tensor(prompt, device=device)
        mask_BT[row, width - len(prompt) :] = 1
    if together:  # the word is of transformers; ranks need no GPU for it
        options["synced_gpus"] = True
    with_generate: Any = model
    generate = partial(
        with_generate.generate,
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
        **options,
    )
    written_BT = as_forward(model, generate)
    # By position: the token that fills up may be the one that ends, or one that was written.
    is_end_BT = written_BT[:, width:] == (-1 if eos_token_id is None else eos_token_id)
    new_BT = (is_end_BT.long().cumsum(1) - is_end_BT.long() == 0).long()
    return {
        "input_ids": written_BT,
        "attention_mask": torch.cat([mask_BT, new_BT], dim=1),
        "completion_mask": torch.cat([torch.zeros_like(mask_BT), new_BT], dim=1),
    }
