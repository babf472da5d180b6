"""A model without its weights, and the weights of a part of it.

Where each rank needs a part of a model, none should load all of it: the model is built with its
parameters on the meta device, and each rank reads what it keeps from the safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_align._errors import argument_error

_ATTRIBUTE = "pretrained_weights_folder"
_BUILDING = ContextVar("parameters_on_meta", default=False)
_IN_PARTS = ContextVar("weights_in_parts", default=False)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters on the meta device as they are registered; buffers are computed as ever."""
    register = nn.Module.register_parameter
    on_meta = WeakIdKeyDictionary()  # what is registered twice stays one

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            if parameter not in on_meta:
                empty = torch.empty_like(parameter, device="meta")
                on_meta[parameter] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = on_meta[parameter]

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    token = _BUILDING.set(True)
    try:
        with torch.device("cpu"), _remembering_pretrained():
            yield
    finally:
        _BUILDING.reset(token)
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def weights_in_parts() -> Iterator[None]:
    """Have models that are loaded read one tensor after the other: memory has no room for all."""
    token = _IN_PARTS.set(True)
    try:
        yield
    finally:
        _IN_PARTS.reset(token)


def are_read_in_parts() -> bool:
    """Whether a model that is loaded now is to be read one tensor after the other."""
    return _IN_PARTS.get()


@contextmanager
def _remembering_pretrained() -> Iterator[None]:
    """Note where the weights are of models that transformers' ``from_pretrained`` makes."""
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    load = vars(base)["from_pretrained"]

    def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
        made = load.__func__(cls, name, *args, **options)
        if name is not None:
            model = made[0] if isinstance(made, tuple) else made
            folder = Path(str(name), options.get("subfolder") or "")
            remember_weights(model, str(folder), options.get("revision") or "main")
        return made

    base.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        base.from_pretrained = load


def is_built_on_meta() -> bool:
    """Whether a model that is built now is to have no weights."""
    return _BUILDING.get() or torch.get_default_device().type == "meta"


def remember_weights(model: nn.Module, name: str, revision: str) -> None:
    """Note on a model where its weights are; a hub name is downloaded to the cache."""
    folder = name
    if not Path(name).expanduser().is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    vars(model)[_ATTRIBUTE] = str(Path(folder).expanduser())


def weights_reader(module: nn.Module) -> Callable[[list[str]], Tensor] | None:
    """What reads a parameter of a module by its names, or None if nothing says where they are."""
    for prefix, part in module.named_modules():
        if (folder := vars(part).get(_ATTRIBUTE)) is not None:
            return _Reader(part, f"{prefix}." if prefix else "", Path(folder)).read
    return None


def fill_parameters(
    module: nn.Module, make: Callable[[nn.Parameter, list[str]], nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Put parameters in the place of those on the meta device; what is tied stays tied.

    Args:
        module: Some of its parameters are on the meta device.
        make: Given one of them and its names, what takes its place.

    Returns:
        What was put there, by its first name.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, empty in module.named_parameters(remove_duplicate=False):
        if empty.is_meta:
            names.setdefault(empty, []).append(name)
    filled = {}
    for empty, all_names in names.items():
        filled[all_names[0]] = parameter = make(empty, all_names)
        for name in all_names:
            holder, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(holder), attribute, parameter)
    return filled


class _Reader:
    """Reads tensors one at a time out of a folder's safetensors files."""

    def __init__(self, model: Any, prefix: str, folder: Path) -> None:
        self._prefix, self._folder = prefix, folder
        self._base = f"{getattr(model, 'base_model_prefix', '')}."
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            self._files = {key: folder / file for key, file in files.items()}
        else:
            with self._open(folder / "model.safetensors") as file:
                self._files = dict.fromkeys(file.keys(), folder / "model.safetensors")

    def read(self, names: list[str]) -> Tensor:
        """The tensor with one of these names.

        Raises:
            ValueError: If the files have none of them.
        """
        for name in names:
            name = name.removeprefix(self._prefix)
            for key in (name, name.removeprefix(self._base), self._base + name):
                if key in self._files:
                    with self._open(self._files[key]) as file:
                        return file.get_tensor(key)  # type: ignore[no-any-return]
        rule = f"its safetensors files have no {names[0].removeprefix(self._prefix)!r}"
        way_out = "Build the module without empty_init, which loads through transformers"
        raise argument_error("init_module", "model", str(self._folder), rule, way_out)

    def _open(self, path: Path) -> Any:
        from safetensors import safe_open

        if not path.exists():
            rule = f"has no {path.name}, and only safetensors can be read in parts"
            way_out = "Build the module without empty_init"
            raise argument_error("init_module", "model", str(self._folder), rule, way_out)
        return safe_open(path, framework="pt")
