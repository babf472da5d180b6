"""The load-balancing loss of a module whose model is a mixture of experts, from a step's forward.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_align.layers import ModelLayers
from lightning_align.losses import (
    experts_per_token,
    load_balancing_loss,
    no_router_error,
    router_coefficient,
)


class RouterLoss:
    """What the routers of a model say in a forward, and the loss of it.

    Args:
        where: Class the user called.
        model: The model in training.
        given: Weight that the user gave; None for what the model's configuration says.

    Attributes:
        coefficient: Weight of the loss; 0 for a model without routers.

    Raises:
        ValueError: If the weight is out of its range, or the model is no mixture of experts.
    """

    def __init__(self, where: str, model: nn.Module, given: float | None) -> None:
        self.where, self.is_given = where, given is not None
        self.coefficient = router_coefficient(model, given, where)
        self._logits: list[Tensor] = []

    def set_up(self, layers: ModelLayers) -> None:
        """A weight that the user gave must weigh something; one of a configuration may not.

        Raises:
            ValueError: If the user gave one, and the routers say nothing.
        """
        if not self.coefficient or layers.gives_router_logits():
            return
        self.go_without(layers.model)

    def go_without(self, model: nn.Module) -> None:
        """Of a model that gives no router logits.

        Raises:
            ValueError: If the user gave a weight.
        """
        if self.is_given:
            raise no_router_error(model, self.coefficient, self.where)
        rank_zero_warn(
            f"{self.where}(model={type(model).__name__!r}): its configuration has a weight for the"
            " load-balancing loss, and it gives no router logits. It trains without that loss."
        )
        self.coefficient = 0.0

    @property
    def is_heard(self) -> bool:
        """Whether the routers said anything in the latest forward."""
        return bool(self._logits)

    def hidden_states(self, layers: ModelLayers, *inputs: Any) -> Tensor:
        """Of the model, whose routers are heard for ``take``."""
        hidden_BTD, self._logits = layers.hidden_states_and_router_logits(*inputs)
        return hidden_BTD

    def forget(self) -> None:
        """What was heard is not asked for: attributes are saved, and hold memory."""
        self._logits = []

    def take(self, layers: ModelLayers, batch: dict[str, Any], counted_B: Tensor) -> Tensor:
        """The loss of what was heard last, without its weight, a scalar; forgets it.

        Args:
            layers: Whose forward it was.
            batch: ``attention_mask`` (B, T), and the ``layout`` of its rows if they are shared.
            counted_B: 1 for each sequence that counts.
        """
        logits, layout = self._logits, batch.get("layout")
        self.forget()
        if layout is not None:  # as in separate rows: what is shared counts for both sequences
            logits = [of_places[layout.index_BT.flatten()] for of_places in logits]
        mask_BT = batch["attention_mask"] * counted_B[:, None]
        return load_balancing_loss(logits, experts_per_token(layers.model), mask_BT)
