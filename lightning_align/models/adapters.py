"""Adapters of PEFT in a model, which is then run, cut, fetched and saved as any other.

What a module of ours holds is the model itself with PEFT's layers in the places of its own, and not
the wrapper around it: its blocks, its head and its forward stay where they are. The wrapper is
needed to put the layers there, and not afterwards.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_align._compat.peft_layers import peft_layers, switched_off
from lightning_align._errors import argument_error
from lightning_align.layers import ModelLayers, is_hugging_face
from lightning_align.layers.probe import is_moved_by
from lightning_align.models.adapter_config import KINDS, build_config, import_peft

MERGE = "Merge them with merge_and_unload(), and pass that model with peft_config"


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put layers into a model."""
    return bool(peft_layers(model))


def with_adapters(
    model: nn.Module,
    peft_config: Mapping[str, Any] | None,
    *,
    where: str,
    revision: str = "main",
) -> nn.Module:
    """The model with adapters in its layers, which alone train; as it is, if nobody wants any.

    Args:
        model: A model, in which layers are replaced; or one that PEFT has wrapped already.
        peft_config: A configuration of PEFT as plain data, None for no new adapters.
        where: Class the user called, for error messages.
        revision: Of the hub that the model was loaded from.

    Returns:
        The model itself; of one that was wrapped the model inside.

    Raises:
        ValueError: If it has adapters already and is to get others, has several, or trains what a
            folder of adapters would not hold.
    """
    name, model = type(model).__name__, _unwrapped(model)
    if peft_config is None:
        if has_adapters(model):
            _check(model, where, name)
        return model
    if has_adapters(model):
        rule = "the model has adapters already"
        way_out = f"Leave peft_config out to go on with them. {MERGE} to begin with new ones"
        raise argument_error(where, "peft_config", dict(peft_config), rule, way_out)
    if any(parameter.is_meta for parameter in model.parameters()):
        rule = "adapters are added to weights, and those of the model are not there yet"
        way_out = "Build the module without empty_init"
        raise argument_error(where, "peft_config", dict(peft_config), rule, way_out)
    add_adapter(model, peft_config, where=where, revision=revision)
    _check(model, where, name)
    return model


def add_adapter(
    model: nn.Module, peft_config: Mapping[str, Any], *, where: str, revision: str = "main"
) -> Any:
    """Put an adapter into the layers of a model; PEFT's wrapper around it, which can merge it.

    Args:
        model: Its layers are replaced.
        peft_config: A configuration of PEFT as plain data.
        where: Class or function the user called, for error messages.
        revision: Of the hub that the model was loaded from.

    Raises:
        ValueError: If the model cannot have such an adapter.
    """
    config = build_config(peft_config, where)
    if is_hugging_face(model) and config.task_type is None:
        config.task_type = "CAUSAL_LM"  # what PEFT's own loader of such folders looks for
    peft = import_peft(where)
    try:
        with warnings.catch_warnings():
            # It asks transformers 5.23 by a name of before.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            of_base = None if revision == "main" else revision
            return peft.get_peft_model(model, config, revision=of_base)
    except ValueError as error:
        rule = f"PEFT cannot add such adapters to it ({str(error).rstrip('.')})"
        raise argument_error(where, "peft_config", type(config).__name__, rule) from error


def only_adapter(model: nn.Module, where: str = "save_pretrained") -> tuple[str, Any]:
    """Name and configuration of the adapter in a model.

    Raises:
        ValueError: If it has several.
    """
    configs: Any = getattr(model, "peft_config", {})
    if len(configs) != 1:
        rule = f"must have one adapter, and it has {len(configs)}: {', '.join(configs)}"
        way_out = "Delete the others with delete_adapter()"
        raise argument_error(where, "model", type(model).__name__, rule, way_out)
    return next(iter(configs.items()))  # type: ignore[no-any-return]


def adapter_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a model's state that a folder of its adapter holds, by their names there."""
    name, _ = only_adapter(model)
    peft = import_peft("save_pretrained")
    kept = peft.get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False
    )
    return {f"base_model.model.{key}": value for key, value in kept.items()}


def base_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the model that an adapter was added to, by the names that it had before."""
    added = {id(value) for value in adapter_state(model, state).values()}
    wrapped = re.compile(r"\.(base_layer|original_module)(?=\.)")
    return {wrapped.sub("", name): x for name, x in state.items() if id(x) not in added}


def own_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that belong to adapters and not to the layers that they adapt, as their dropout."""
    layers = [layer for layer in peft_layers(model).values() if hasattr(layer, "base_layer")]
    adapted = {part for layer in layers for part in layer.base_layer.modules()}
    return {part for layer in layers for part in layer.modules()} - adapted


def check_reference(layers: ModelLayers, where: str) -> None:
    """Refuse adapters without which a model is another one than it is now.

    Raises:
        ValueError: If switching them off does not give the model that training begins with.
    """
    _, config = only_adapter(layers.model)
    if (bias := getattr(config, "bias", "none")) != "none":
        rule = f"with bias={bias!r} biases of the model itself train, so that no reference is left"
        way_out = "Use bias='none', or pass a ref_model"
        raise argument_error(where, "peft_config", type(config).__name__, rule, way_out)
    if is_moved_by(layers, switched_off(layers.model)):
        rule = (
            "the reference is the model without its adapters, and that is another one than the"
            " model that training begins with"
        )
        way_out = f"{MERGE}, or pass a ref_model"
        raise argument_error(where, "peft_config", type(config).__name__, rule, way_out)


def _unwrapped(model: Any) -> nn.Module:
    """The model inside of PEFT's wrapper, or as it is."""
    wrappers: Any = sys.modules.get("peft.peft_model")
    if wrappers is not None and isinstance(model, wrappers.PeftModel) and has_adapters(model):
        return model.get_base_model()  # type: ignore[no-any-return]
    assert isinstance(model, nn.Module)
    return model


def _check(model: Any, where: str, name: str) -> None:
    """Refuse adapters that could not be told, trained or kept.

    Raises:
        ValueError: If they are such.
    """
    _, config = only_adapter(model, where)
    if (kind := str(getattr(config.peft_type, "value", config.peft_type))) not in KINDS:
        rule = f"its adapter is of kind {kind}, and must be one of {', '.join(KINDS)}"
        raise argument_error(where, "model", name, rule)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not trained:
        rule = "nothing in it trains, its adapter neither"
        way_out = "Load it with PeftModel.from_pretrained(..., is_trainable=True)"
        raise argument_error(where, "model", name, rule, way_out)
    refuse_lost(model, where, name)


def refuse_lost(model: nn.Module, where: str, name: str) -> None:
    """Refuse a model with adapters of which a folder of these would not hold all that trains.

    Args:
        model: PEFT has put layers into it.
        where: Class the user called, for error messages.
        name: Class of what the user passed as the model.

    Raises:
        ValueError: If it has several adapters, or trains something beside its adapter.
    """
    only_adapter(model, where)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    kept = {id(p) for p in adapter_state(model, dict(model.named_parameters())).values()}
    if lost := [key for key, p in trained.items() if id(p) not in kept]:
        rule = f"{lost[0]!r} trains, which is in no adapter and would not be kept with it"
        way_out = "Freeze it, or name its module in modules_to_save"
        raise argument_error(where, "model", name, rule, way_out)
