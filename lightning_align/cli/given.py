"""What a command line gives before it is parsed: files and options, laid over each other.

A parser that refuses a configuration leaves nothing to look at. This is the same laying of layers,
with neither types nor defaults.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import yaml

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def read_layer(path: str) -> Any:
    """What a YAML file holds; an OSError or the like if there is none."""
    with fsspec.open(path, encoding="utf-8", mode="rt") as file:
        try:
            return yaml.safe_load(file)
        except ValueError as error:  # an integer of 5000 digits, bytes that are no text
            raise yaml.YAMLError(error) from None


def options_with_values(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every option with its value; the text is empty if none follows."""
    for word, following in zip(args, [*args[1:], ""], strict=False):
        if found := re.match(r"(--\w[^=]*|-[a-zA-Z])(=?)(.*)", word, re.DOTALL):
            alone = not (found[2] or found[3])
            follows = alone and not re.match(r"--?[a-zA-Z]", following)
            yield found[1], following if follows else found[3]


def option_as_layer(name: str, text: str) -> Any:
    """What a file would hold in place of an option; text that is no mapping or list stays text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    layer = value if isinstance(value, (dict, list)) else text
    for key in reversed(name.split(".")):
        layer = {key: layer}
    return layer


def by_argument(layer: Any, known: Iterable[str], above: str = "") -> Iterator[tuple[str, Any]]:
    """Values by the names of arguments, such as trainer.max_steps; other keys as they stand."""
    for key, value in layer.items() if isinstance(layer, Mapping) else ():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and any(other.startswith(f"{name}.") for other in known):
            yield from by_argument(value, known, f"{name}.")
        else:
            yield name, value


def lay_over(given: dict[str, Any], layer: Any, known: Iterable[str], append: bool = False) -> None:
    """Put a layer over what was given before, in place; to append is for a list's ``+=``."""
    for name, value in by_argument(layer, known):
        if append:
            added = value if isinstance(value, list) else [value]
            given[name] = [*(given.get(name) or []), *added]
        else:
            given[name] = over(given.get(name), value)


def over(old: Any, new: Any) -> Any:
    """One value over another, as layers lie: another class begins anew, a list replaces a list."""
    if isinstance(old, list) and old and isinstance(new, Mapping):
        return [*old[:-1], over(old[-1], new)]  # an option goes to the element before it
    if isinstance(old, str) and isinstance(new, Mapping):
        old = {"class_path": old}
    if not isinstance(old, Mapping):
        return new
    if isinstance(new, str) and short_name(new) == short_name(old.get("class_path")):
        new = {"class_path": new}
    if not isinstance(new, Mapping):
        return new
    if "class_path" in old:
        if short_name(new.get("class_path", old["class_path"])) != short_name(old["class_path"]):
            return new
        if not any(key in CLASS_KEYS for key in new):
            new = {"init_args": new}  # short for the arguments of a class that is known already
    return {**old, **{key: over(old.get(key), value) for key, value in new.items()}}


def short_name(path: Any) -> str:
    """The name of a class without its modules."""
    return str(path).rpartition(".")[2]
