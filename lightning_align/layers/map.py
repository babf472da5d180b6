"""Where the layers of a model are: embedding, blocks, final norm, head.

Freezing, cutting, fetching, checkpointing and reporting all work by block, and every loss of ours
needs the hidden state before the head. They ask this map, so nobody else walks ``named_modules()``.

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.layers import probe
from lightning_align.layers.head import Head
from lightning_align.layers.hugging_face import argument_names, base_model, no_cache
from lightning_align.layers.parts import parameter_names
from lightning_align.layers.surgery import identity


@dataclass(frozen=True, eq=False)
class ModelLayers:
    """Where the layers of ``model`` are. Made by ``find_layers``.

    Holds names, and looks the modules up at every access: a head that was resized or tied again is
    the one you get. The numbers are those of the moment of ``find_layers``.

    Attributes:
        model: The model that was read. All names are relative to it.
        embedding_name: Dotted name of the token embedding.
        blocks_name: Dotted name of the list of blocks.
        final_norm_name: Dotted name of the norm after the last block, or None.
        head_name: Dotted name of the output projection.
        hidden_size: Width D that the head takes.
        vocab_size: Number V of logits.
        logit_scale: Factor on the logits.
        softcap: Bound of the tanh on the logits, or None.
    """

    model: nn.Module = field(repr=False)
    embedding_name: str
    blocks_name: str
    final_norm_name: str | None
    head_name: str
    hidden_size: int
    vocab_size: int
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_submodule(self.embedding_name)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in the order of the model's list."""
        return list(self.model.get_submodule(self.blocks_name).children())

    @property
    def block_names(self) -> list[str]:
        """Dotted names of the blocks."""
        blocks = self.model.get_submodule(self.blocks_name)
        return [f"{self.blocks_name}.{name}" for name, _ in blocks.named_children()]

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block, or None."""
        if self.final_norm_name is None:
            return None
        return self.model.get_submodule(self.final_norm_name)

    @property
    def head_module(self) -> nn.Module:
        """The module of the output projection."""
        return self.model.get_submodule(self.head_name)

    @property
    def head(self) -> Head:
        """The output projection as it is now."""
        module: Any = self.head_module
        return Head(module.weight, module.bias, self.logit_scale, self.softcap)

    @property
    def tied_parameters(self) -> tuple[tuple[str, ...], ...]:
        """Groups of dotted names that share one parameter."""
        groups = parameter_names(self.model).values()
        return tuple(tuple(group) for group in groups if len(group) > 1)

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the model up to its head, which is not computed.

        Args:
            input_ids_BT: Tokens, (B, T).
            position_ids: Positions as the model's own forward takes them.
            attention_mask: Mask as the model's own forward takes it, or one for each layer type.

        Returns:
            What the head would have been given, (B, T, D).

        Raises:
            ValueError: If the model has no such argument, or does not give its head every token.
        """
        base, extra = self._called(position_ids, attention_mask)
        if base is not None:
            return base(input_ids_BT, **extra)[0]  # type: ignore[no-any-return]

        with identity(self.head_module) as inputs:
            self.model(input_ids_BT, **extra)
        shapes = [tuple(hidden.shape[:-1]) for hidden in inputs]
        if shapes != [tuple(input_ids_BT.shape)]:
            rule = (
                f"forward must call its head '{self.head_name}' once, on every token; given tokens "
                f"of shape {tuple(input_ids_BT.shape)} it did on {shapes or 'nothing'}"
            )
            way_out = "Give all the logits, through that module"
            raise probe.model_error(self.model, "hidden_states", rule, way_out)
        return inputs[0]

    def hidden_states_and_router_logits(
        self,
        input_ids_BT: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """``hidden_states`` of a mixture of experts, and what its routers said.

        Args:
            input_ids_BT: Tokens, (B, T).
            position_ids: Positions as the model's own forward takes them.
            attention_mask: Mask as the model's own forward takes it, or one for each layer type.

        Returns:
            What the head would have been given, (B, T, D), and of each layer with experts the
            logits of its router, (B T, E); none of a model that does not give them.

        Raises:
            ValueError: If the model has no such argument.
        """
        base, extra = self._called(position_ids, attention_mask)
        if base is None:
            return self.hidden_states(input_ids_BT, position_ids, attention_mask), []
        outputs = base(input_ids_BT, **extra, output_router_logits=True)
        return outputs[0], list(getattr(outputs, "router_logits", None) or ())

    def gives_router_logits(self) -> bool:
        """Whether the model is a mixture of experts that says what its routers did.

        Costs a forward of 16 tokens. Modes and random number generators are left as they were.
        """
        return probe.gives_router_logits(self)

    def _called(
        self, position_ids: Tensor | None, attention_mask: Tensor | Mapping[str, Tensor] | None
    ) -> tuple[Any, dict[str, Any]]:
        """What is called for hidden states, None for the model itself, and with which arguments."""
        base: Any = base_model(self.model)
        called = self.model if base is None else base
        given = {"position_ids": position_ids, "attention_mask": attention_mask}
        extra: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
        for name in extra.keys() - argument_names(type(called).forward):
            rule = f"{type(called).__name__}.forward has no argument of that name"
            raise argument_error("ModelLayers.hidden_states", name, "...", rule, "Leave it out")
        extra.update(no_cache(self.model))
        return base, extra

    def probe(self) -> None:
        """Check on a few tokens that ``head`` on ``hidden_states`` gives the model's own logits.

        Costs three forwards of 16 tokens. Modes and random number generators are left as they were.

        Raises:
            ValueError: If the logits differ, or if the hidden state of a token depends on later
                tokens, so that the model is no decoder.
        """
        probe.check_logits(self)

    def probe_documents(self) -> None:
        """Check that documents that share a row do not see each other.

        Their ``position_ids`` start again at 0. Other tokens in the first document must not move
        the hidden states of the second by a bit. In a mixture of experts they may, because an
        expert multiplies the tokens of all documents at once and rounds by their number: then no
        gradient may flow from the second document to the first, exactly. Costs up to three forwards
        of 16 tokens.

        Raises:
            ValueError: If the model takes no ``position_ids`` or its documents see each other.
        """
        probe.check_documents(self)
