"""Which model can be the reference of another: one that stays what it is, over the same tokens."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, find_layers


def reference_layers(where: str, policy: ModelLayers, ref_model: nn.Module) -> ModelLayers:
    """The layers of a reference.

    Args:
        where: Class or function the user called.
        policy: The model that learns.
        ref_model: The reference.

    Raises:
        ValueError: If it is the policy, would learn with it because they share weights, or has
            another vocabulary.
    """
    if ref_model is policy.model:
        rule = "must be another object than model: it stays what it is while model learns"
        way_out = "Leave it out to freeze a copy, or use copy.deepcopy(model)"
        raise argument_error(where, "ref_model", "model", rule, way_out)
    if shared := _shared_and_trained(policy.model, ref_model):
        rule = f"shares {shared!r} with model, and would learn with it"
        way_out = "Use copy.deepcopy(model), or freeze in model what both share"
        raise argument_error(where, "ref_model", type(ref_model).__name__, rule, way_out)
    layers = find_layers(ref_model)
    if layers.vocab_size != policy.vocab_size:
        rule = (
            f"its vocabulary has {layers.vocab_size} rows and that of model"
            f" {policy.vocab_size}; they must be the same"
        )
        raise argument_error(where, "ref_model", type(ref_model).__name__, rule)
    return layers


def _shared_and_trained(model: nn.Module, ref_model: nn.Module) -> str | None:
    """Name of a weight that learns and is the reference's, too, as one parameter or one memory."""
    objects = {id(parameter) for parameter in ref_model.parameters()}
    memory = {_memory(parameter) for parameter in ref_model.parameters()} - {0}
    learns = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return next((name for name, p in learns if id(p) in objects or _memory(p) in memory), None)


def _memory(parameter: Tensor) -> int:
    """Address of its memory; 0 for what has none here.

    That is what lies on "meta", and every subclass: it wraps another tensor, or is away and would
    be brought by asking.
    """
    if type(parameter) not in (Tensor, nn.Parameter):
        return 0
    return parameter.untyped_storage().data_ptr()
