"""Sizes of a model that has a configuration of transformers: by name, folder, YAML or object."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_align._errors import argument_error
from lightning_align.data.hub import resolve_pretrained
from lightning_align.layers import find_layers
from lightning_align.planner.block_analysis import sizes_of_layers

WHERE = "ModelSpec.from_config"
MOST_TOKENS = 4096  # of a row, if nothing else is said
_LENGTHS = ("block_size", "max_length")  # of the data modules


def sizes_of(config: Any, seq_len: int | None) -> dict[str, Any]:
    """Arguments of ``ModelSpec``.

    Args:
        config: A name, a folder, a YAML file, or a configuration.
        seq_len: Tokens of a row; None takes what the file or the configuration says.

    Raises:
        ValueError: If it is none of these, or its model has no decoder's layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    if isinstance(config, (str, Path)) and str(config).endswith((".yaml", ".yml")):
        config, given = _of_yaml(Path(config))
        seq_len = given if seq_len is None else seq_len
    if isinstance(config, (str, Path)):
        resolve_pretrained(WHERE, "config", str(config))
        try:
            config = AutoConfig.from_pretrained(str(config))
        except (OSError, ValueError) as error:
            rule = f"transformers cannot read a configuration from it ({error})"
            raise argument_error(WHERE, "config", config, rule) from error
    if not isinstance(config, PretrainedConfig):
        rule = "must be a Hugging Face name or folder, a YAML file, or a configuration"
        raise argument_error(WHERE, "config", config, rule)
    builder: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = builder.from_config(config)
    except ValueError as error:  # its message names a hundred other configurations
        rule = "is no decoder that transformers can build"
        way_out = "Use ModelSpec.from_module, or give its sizes"
        name = type(config).__name__
        raise argument_error(WHERE, "config", name, rule, way_out) from error
    positions = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
    tokens = min(int(positions), MOST_TOKENS) if seq_len is None else seq_len
    return {**sizes_of_layers(find_layers(model), "config"), "seq_len": tokens}


def _of_yaml(path: Path) -> tuple[Any, int | None]:
    """What a run's file says of its model, and of the length of its rows."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise argument_error(WHERE, "config", str(path), f"cannot be read ({error})") from error
    model = _inside(content, "model", "init_args", "model")
    if model is None:
        rule = "has no model.init_args.model"
        raise argument_error(WHERE, "config", str(path), rule)
    data = _inside(content, "data", "init_args") or {}
    tokens = next((data[name] for name in _LENGTHS if data.get(name)), None)
    return (_built(model, path) if isinstance(model, Mapping) else model), tokens


def _built(model: Mapping[str, Any], path: Path) -> Any:
    """The configuration that a class and its arguments make."""
    import transformers

    module, _, name = str(model.get("class_path")).rpartition(".")
    made: Any = getattr(transformers, name, None)
    is_config = isinstance(made, type) and issubclass(made, transformers.PretrainedConfig)
    if not is_config or module not in ("", "transformers"):
        rule = (
            f"its model is a {model.get('class_path')}, and must be a configuration of transformers"
        )
        way_out = "Use ModelSpec.from_module"
        raise argument_error(WHERE, "config", str(path), rule, way_out)
    given = model.get("init_args") or {}
    config = made(**given)
    _check_known(config, made(), given, path)
    return config


def _check_known(config: Any, plain: Any, given: Mapping[str, Any], path: Path) -> None:
    """Refuse what a configuration keeps and nothing will ever read."""
    for key, value in given.items():
        if hasattr(config, key) and not hasattr(plain, key):
            close = difflib.get_close_matches(key, plain.to_dict(), n=1)
            rule = f"{type(plain).__name__} has no {key}={value!r}"
            way_out = f"Did you mean {close[0]}" if close else ""
            raise argument_error(WHERE, "config", str(path), rule, way_out)


def _inside(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content
