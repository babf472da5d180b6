"""An optimizer or scheduler as YAML names it, a short name or a class path, given in Python."""

import importlib
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import optim
from torch.optim import Optimizer, lr_scheduler

from lightning_align import optimizers as ours
from lightning_align._errors import argument_error


def optimizer_builder(where: str, optimizer: Any) -> Any:
    """What builds an optimizer from parameter groups: a callable as it is, a name as its class.

    Args:
        where: Class the user called.
        optimizer: A callable; the name of an optimizer of ours or torch's, or its path; or a
            mapping with ``class_path`` and ``init_args``.

    Raises:
        ValueError: If it is none of these, such as an optimizer that is built already.
    """
    if isinstance(optimizer, Optimizer):
        rule = "is built already, and must be what builds one from the module's parameter groups"
        way_out = f"Pass functools.partial({type(optimizer).__name__}, lr=...)"
        name = f"<{type(optimizer).__name__}>"
        raise argument_error(where, "optimizer", name, rule, way_out)
    return _builder(where, "optimizer", optimizer, Optimizer, (ours, optim))


def scheduler_builder(where: str, scheduler: Any) -> Any:
    """What builds a learning rate scheduler from an optimizer, likewise.

    Raises:
        ValueError: If it is nothing of the kind, such as a scheduler that is built already.
    """
    if isinstance(scheduler, lr_scheduler.LRScheduler):
        rule = "is built already, and must be what builds one from the optimizer"
        way_out = f"Pass functools.partial({type(scheduler).__name__}, ...)"
        name = f"<{type(scheduler).__name__}>"
        raise argument_error(where, "lr_scheduler", name, rule, way_out)
    return _builder(where, "lr_scheduler", scheduler, lr_scheduler.LRScheduler, (lr_scheduler,))


def _builder(where: str, argument: str, given: Any, base: type, homes: tuple[Any, ...]) -> Any:
    found = given.func if isinstance(given, partial) else given
    if isinstance(found, type) and base is Optimizer and not issubclass(found, base):
        rule = f"{found.__name__} is no Optimizer"
        raise argument_error(where, argument, given, rule, "Give one of torch.optim, or of ours")
    if isinstance(found, type):
        positional, keywords = (given.args, given.keywords) if found is not given else ((), {})
        _check_arguments(where, argument, found, keywords, len(positional))
    if given is None or callable(given):
        return given
    path, options = given, {}
    if isinstance(given, Mapping) and set(given) <= {"class_path", "init_args"}:
        path, options = given.get("class_path"), dict(given.get("init_args") or {})
    if not isinstance(path, str):
        kind = base.__name__
        rule = f"must be what builds the {kind}: a class, functools.partial, or a name as in YAML"
        raise argument_error(where, argument, given, rule)
    found = _find(path, homes)
    if not (isinstance(found, type) and issubclass(found, base)):
        names = [name for home in homes for name in dir(home) if name[:1].isupper()]
        near = get_close_matches(path.rpartition(".")[2], names, 1)
        way_out = f"Did you mean {near[0]}" if near else "Give the path of the class"
        rule = f"there is no {base.__name__} of that name"
        raise argument_error(where, argument, given, rule, way_out)
    _check_arguments(where, argument, found, options)
    return partial(found, **options) if options else found


def _check_arguments(
    where: str, argument: str, built: type, options: Mapping[str, Any], positional: int = 0
) -> None:
    """Refuse options that a class does not have, or lacks, which it says when training begins."""
    known = inspect.signature(built).parameters
    takes_any = any(each.kind == each.VAR_KEYWORD for each in known.values())
    for name in () if takes_any else options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            way_out = f"Did you mean {near[0]}" if near else ""
            rule = f"{built.__name__} has no such argument"
            raise argument_error(where, f"{argument}.{name}", options[name], rule, way_out)
    for name, each in [*known.items()][1 + positional :]:  # the first is what it is built from
        is_any = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        if each.default is each.empty and name not in options and not is_any:
            way_out = f"Pass functools.partial({built.__name__}, {name}=...)"
            raise argument_error(where, argument, built.__name__, f"it needs {name}", way_out)


def built_optimizer(where: str, builder: Any, groups: Any) -> Optimizer:
    """The optimizer of some parameter groups.

    Args:
        where: Class the user called.
        builder: What builds it.
        groups: Parameter groups.

    Raises:
        ValueError: If something else comes of it.
    """
    optimizer = builder(groups)
    if not isinstance(optimizer, Optimizer):
        rule = f"must return an optimizer, and returned {type(optimizer).__name__}"
        raise argument_error(where, "optimizer", builder, rule)
    return optimizer


def _find(path: str, homes: tuple[Any, ...]) -> Any:
    """The class of a path, or of a name in the first of several modules that has it."""
    module, _, name = path.rpartition(".")
    if not module:
        return next((vars(home)[name] for home in homes if hasattr(home, name)), None)
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
