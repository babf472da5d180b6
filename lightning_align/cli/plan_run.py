"""The run that a plan is laid over: the user's file, or a first one for a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_align._errors import argument_error
from lightning_align.cli.plan_given import said
from lightning_align.cli.plan_yaml import arguments_of, last_name

# Objective -> module, datamodule, and what stands for the user's data.
_PARTS = {
    "pretrain": ("PretrainModule", "TextDataModule", "pride_and_prejudice"),
    "dpo": ("DPOModule", "PreferenceDataModule", "pairs.jsonl"),
}
# Of the user's records, or of another meaning in the other module.
_OF_RECORDS, _OTHERWISE = ("paths", "val_paths"), ("label_smoothing",)


def run_for(model: str, objective: str) -> tuple[dict[str, Any], list[str]]:
    """A configuration with the module of an objective, and what of the user's file it has not.

    Args:
        model: What the user named: a Hugging Face name, a folder, or the YAML of a run.
        objective: pretrain or dpo.

    Raises:
        ValueError: If the file's module is of the other objective, and its tokenizer is not known.
    """
    if not model.endswith((".yaml", ".yml")):
        module, data, paths = _PARTS[objective]
        return {
            "model": {"class_path": module, "init_args": {"model": model}},
            "data": {"class_path": data, "init_args": {"tokenizer": model, "paths": paths}},
        }, []
    content: dict[str, Any] = yaml.safe_load(Path(model).read_text())
    if said(model)["objective"] == objective:
        return content, []
    return _with_module_of(objective, content, model)


def _with_module_of(
    objective: str, content: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], list[str]]:
    """The file with the other module, which is given what both of them take."""
    from lightning_align import modules  # seconds, for Lightning

    module, data, paths = _PARTS[objective]
    of_model, of_data = (arguments_of(content.get(part)) for part in ("model", "data"))
    kept, dropped = _taken(getattr(modules, module), of_model)
    kept_data, _ = _taken(getattr(modules, data), of_data)
    kept_data = {name: value for name, value in kept_data.items() if name not in _OF_RECORDS}
    named = kept.get("model")
    tokenizer = kept_data.get("tokenizer") or (named if isinstance(named, str) else None)
    if tokenizer is None:
        rule = f"{path} makes its tokenizer from its texts, and {data} needs one that is there"
        way_out = "Name its folder in data.init_args.tokenizer, and that of the model in model"
        raise argument_error("plan", "objective", objective, rule, way_out)
    made = {
        **content,
        "model": {"class_path": module, "init_args": kept},
        "data": {
            "class_path": data,
            "init_args": {**kept_data, "tokenizer": tokenizer, "paths": paths},
        },
    }
    before = last_name(content.get("model"), "PretrainModule")
    without = f", without {', '.join(dropped)}" if dropped else ""
    told = f"{module} takes the place of the file's {before}{without}; data.paths is {paths}, for"
    return made, [f"{told} yours"]


def _taken(kind: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments that a class takes, and the names of those that it does not."""
    known = inspect.signature(kind).parameters.keys() - _OTHERWISE
    return {n: given[n] for n in given if n in known}, [n for n in given if n not in known]
