"""The folder of an adapter, as PEFT writes and loads it: its weights and its configuration."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_align._errors import argument_error
from lightning_align.models.adapter_config import import_peft, plain_config
from lightning_align.models.adapters import adapter_state, only_adapter

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder has an adapter, which is no model by itself."""
    return Path(folder, CONFIG_FILE).is_file()


def save_adapter(
    model: nn.Module, folder: str | Path, state: Mapping[str, Any] | None = None
) -> None:
    """Write the adapter in a model as a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        model: It has one adapter.
        folder: Where to write.
        state: The model's state; None takes it from the model.
    """
    from safetensors.torch import save_file

    values = adapter_state(model, model.state_dict() if state is None else state)
    # A copy of each: what is tied, or a view, cannot be saved as it is.
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in values.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(copies, Path(folder, WEIGHTS_FILE), metadata={"format": "pt"})
    config = copy.deepcopy(only_adapter(model)[1])
    config.inference_mode = True  # as PEFT does: whoever loads it does not mean to train it
    if not config.base_model_name_or_path:
        warnings.warn(
            f"{folder} holds an adapter alone, and the model that it belongs to has no name: keep"
            " that model, or write both as one with lightning-align export --merge",
            stacklevel=2,
        )
    config.save_pretrained(str(folder))


def read_config(folder: str | Path, where: str) -> dict[str, Any]:
    """The configuration of an adapter as plain data.

    Raises:
        ValueError: If PEFT cannot read it, or it is of a kind that we do not know.
    """
    peft = import_peft(where)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, TypeError, ValueError, KeyError) as error:
        rule = f"PEFT cannot read its {CONFIG_FILE} ({error})"
        raise argument_error(where, "ckpt", str(folder), rule) from error
    plain = plain_config(config, where)
    assert plain is not None
    return plain


def base_name(folder: str | Path, where: str) -> tuple[str, str]:
    """Name or folder of the model that an adapter was trained on, and its revision.

    Raises:
        ValueError: If the folder does not say.
    """
    config = json.loads(Path(folder, CONFIG_FILE).read_text())
    name = config.get("base_model_name_or_path")
    if not name:
        rule = "is an adapter, and does not tell the model that it was trained on"
        way_out = "Give that model's name or folder as model (--model)"
        raise argument_error(where, "ckpt", str(folder), rule, way_out)
    return str(name), str(config.get("revision") or "main")


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, where: str) -> None:
    """Fill the adapter in a model from a folder, which must have its weights and no others.

    Raises:
        ValueError: If it has others, or none that can be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        theirs = load_file(Path(folder, WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        rule = f"its {WEIGHTS_FILE} cannot be read ({error})"
        raise argument_error(where, "ckpt", str(folder), rule) from error
    ours: dict[str, Tensor] = adapter_state(model, dict(model.named_parameters()))
    here, there = ({n: tuple(x.shape) for n, x in each.items()} for each in (ours, theirs))
    if different := sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n)):
        name = different[0]
        rule = (
            f"holds another adapter than its {CONFIG_FILE} says: {len(different)} weight(s) differ,"
            f" first {name!r} with shape {here.get(name)} by the configuration and"
            f" {there.get(name)} in the file"
        )
        raise argument_error(where, "ckpt", str(folder), rule)
    for name, parameter in ours.items():
        parameter.copy_(theirs[name])
