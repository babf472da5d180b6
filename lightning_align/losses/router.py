"""What a mixture of experts adds to any loss, so that its router goes on using all experts.

Shapes: B sequences, T tokens, N = B T tokens of a layer, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error, finite_number


def load_balancing_loss(
    router_logits: Sequence[Tensor], experts_per_token: int, mask_BT: Tensor
) -> Tensor:
    """Switch Transformers' auxiliary loss (Fedus et al., arXiv:2101.03961, Eq. 4 to 6), a scalar.

    The number of experts times the sum over them of the share of tokens that one gets and the mean
    probability that it has, which is least where all experts are used alike. The means go over the
    tokens of all layers together, as in the models of transformers.

    Args:
        router_logits: Of each layer, (N, E).
        experts_per_token: How many experts see a token.
        mask_BT: 1 for tokens, 0 for those that are left out, as padding.
    """
    probabilities_LNE = torch.stack([of.flatten(0, -2) for of in router_logits]).float().softmax(-1)
    weights_N = mask_BT.flatten().to(probabilities_LNE)
    chosen_LNK = probabilities_LNE.topk(experts_per_token, -1).indices
    is_chosen_LNE = torch.zeros_like(probabilities_LNE).scatter(-1, chosen_LNK, 1.0)
    num_tokens = (weights_N.sum() * len(router_logits)).clamp(min=1)
    shares_E = torch.einsum("lne,n->e", is_chosen_LNE, weights_N) / num_tokens
    means_E = torch.einsum("lne,n->e", probabilities_LNE, weights_N) / num_tokens
    return (shares_E * means_E).sum() * probabilities_LNE.shape[-1]


def router_coefficient(model: nn.Module, given: float | None, where: str) -> float:
    """Weight of ``load_balancing_loss`` for ``model``; 0 if it has no router.

    Args:
        model: The model in training.
        given: What the user asked for; None for what the model's configuration says.
        where: Class or function the user called, for the message of an error.

    Raises:
        ValueError: If a weight is given that is not finite or negative, or for another model than a
            mixture of experts.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    has_router = hasattr(config, "output_router_logits")
    if given is None:
        return float(getattr(config, "router_aux_loss_coef", 0.0)) if has_router else 0.0
    if (finite_number(given) or 0.0) < 0 or finite_number(given) is None:
        raise argument_error(where, "router_aux_loss_coef", given, "must be finite, not negative")
    if given and not has_router:
        rule = f"must be None or 0: {type(model).__name__} is no mixture of experts"
        raise argument_error(where, "router_aux_loss_coef", given, rule)
    return float(given)


def no_router_error(model: nn.Module, given: float, where: str) -> ValueError:
    """The error for a weight of a loss that there is none of.

    Args:
        model: The model in training.
        given: The weight that the user gave.
        where: Class or function the user called.
    """
    rule = f"must be None or 0: {type(model).__name__} gives no router logits"
    return argument_error(where, "router_aux_loss_coef", given, rule)


def experts_per_token(model: Any) -> int:
    """How many experts of a mixture of experts of transformers see a token."""
    return int(model.config.get_text_config().num_experts_per_tok)
