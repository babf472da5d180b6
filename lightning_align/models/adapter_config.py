"""A configuration of PEFT and its plain data, as YAML and checkpoints have it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from typing import Any

from lightning_align._errors import argument_error

# Kinds whose adapters lie in the layers that they adapt, and change nothing else: the model's own
# forward runs them, and without them it is what it was.
KINDS = ("LORA", "LOHA", "LOKR", "OFT", "IA3")
_SET_BY_PEFT = ("peft_type", "auto_mapping", "peft_version", "runtime_config", "inference_mode")

# What names and shapes of weights tell already, or decides nothing once there are values.
_TOLD = re.compile(
    r"base_model_name_or_path|revision|task_type|r|init_.*|.*dropout.*|.*modules.*|layers_.*"
)


def import_peft(where: str) -> Any:
    """The library.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        rule = f"needs the library peft, which cannot be imported ({error})"
        way_out = 'Install it: pip install "lightning-align[peft]"'
        raise argument_error(where, "peft_config", "...", rule, way_out) from error


def plain_config(config: Any, where: str) -> dict[str, Any] | None:
    """A configuration as plain data, ``class_path`` and what differs from its defaults.

    Args:
        config: One of PEFT, a mapping with ``class_path`` and ``init_args``, or None.
        where: Class the user called, for error messages.

    Raises:
        ValueError: If it is neither, or not of a kind that we know.
    """
    if config is None:
        return None
    if isinstance(config, Mapping):
        config = build_config(config, where)
    peft = import_peft(where)
    if not isinstance(config, peft.PeftConfig):
        rule = "must be a configuration of PEFT, such as peft.LoraConfig(r=16), or a mapping with"
        raise argument_error(where, "peft_config", config, f"{rule} class_path and init_args")
    name = type(config).__name__
    if str(getattr(config.peft_type, "value", config.peft_type)) not in KINDS:
        known = ", ".join(KINDS)
        rule = f"must be of a kind whose adapters lie in the layers that they adapt: {known}"
        raise argument_error(where, "peft_config", name, rule)
    _refuse_start(config, where)
    default = type(config)()
    given = {
        field.name: _plain(value)
        for field in fields(config)
        if field.name not in _SET_BY_PEFT
        and (value := getattr(config, field.name)) != getattr(default, field.name)
    }
    return {"class_path": f"peft.{name}", "init_args": given}


def build_config(plain: Mapping[str, Any], where: str) -> Any:
    """The configuration of plain data.

    Args:
        plain: ``class_path`` and ``init_args``; what stands beside them counts as an argument, too.
        where: Class the user called, for error messages.

    Raises:
        ValueError: If the class is none of PEFT's, or has no such argument.
    """
    peft = import_peft(where)
    given = dict(plain)
    path = str(given.pop("class_path", ""))
    kind = getattr(peft, path.rpartition(".")[2], None)
    is_peft = "." not in path or path.startswith("peft.")
    if not (is_peft and isinstance(kind, type) and issubclass(kind, peft.PeftConfig)):
        rule = "its class_path must be a configuration of PEFT, for example peft.LoraConfig"
        raise argument_error(where, "peft_config", dict(plain), rule)
    arguments = {**given.pop("init_args", {}), **given}
    known = [field.name for field in fields(kind) if field.init]
    for name in arguments.keys() - known:
        near = get_close_matches(name, known, 1)
        way_out = f"Did you mean {near[0]!r}" if near else ""
        rule = f"{kind.__name__} has no argument {name!r}"
        raise argument_error(where, "peft_config", dict(plain), rule, way_out)
    try:
        return kind(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        rule = f"{kind.__name__} cannot be built from it ({error})"
        raise argument_error(where, "peft_config", dict(plain), rule) from error


def refuse_another_adapter(config: Any, saved: Mapping[str, Any] | None, where: str) -> None:
    """Refuse to go on with an adapter that makes another model of the weights of a checkpoint.

    What LoRA's product is multiplied by is in its configuration alone.

    Args:
        config: Of the adapter in the model.
        saved: That of the checkpoint as plain data; None if it does not say.
        where: Class the user called, for error messages.

    Raises:
        ValueError: If the two multiply by another number, or are of other kinds.
    """
    ours = plain_config(config, where)
    if saved is None or ours is None:
        return
    here, there = (
        {"class_path": each["class_path"], **each["init_args"]} for each in (ours, saved)
    )
    names = sorted(name for name in here.keys() | there.keys() if not _TOLD.fullmatch(name))
    for name in names:
        if here.get(name) != there.get(name):
            theirs = there.get(name, "the default of PEFT")
            rule = f"the adapter of the checkpoint has {theirs}, without which it is another model"
            raise argument_error(where, f"peft_config.{name}", here.get(name), rule, "Take that")


def _refuse_start(config: Any, where: str) -> None:
    """Refuse adapters that begin by changing the weights that they are added to."""
    start = getattr(config, "init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        rule = (
            f"init_lora_weights={start!r} changes the weights of the model itself, which a folder"
            " of adapters does not hold"
        )
        way_out = "Use True, 'gaussian' or 'orthogonal'"
        raise argument_error(where, "peft_config", type(config).__name__, rule, way_out)
    for name in ("alora_invocation_tokens", "layer_replication", "target_parameters"):
        if getattr(config, name, None):
            rule = f"{name} is not supported: it reaches beyond the layers that are adapted"
            raise argument_error(where, "peft_config", type(config).__name__, rule)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value
