"""Optimizers of a sharded model take up what was saved of them, and nothing else is asked for.

torch puts parts of tensors into a state that is there: it takes a step of zeros, which makes one
for every parameter that requires a gradient, and asks the checkpoint for each. Some have none
there: a block that LISA had frozen, a parameter that no gradient has reached. Others have one, and
are frozen until the run's own attributes are put back. And of groups it asks for no key that came
in training, such as a count of skipped steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_align._compat import torch_dcp
from lightning_align._errors import argument_error


@contextmanager
def taking_up_what_was_saved(
    model: nn.Module, optimizers: list[Optimizer], path: Path, weights_only: bool | None
) -> Iterator[None]:
    """Around Lightning's loading of a checkpoint that ``ModelParallelStrategy`` has saved.

    Args:
        model: Whose parameters the optimizers have.
        optimizers: Those of the run, new.
        path: Folder with a part of each rank, or file with all of it.
        weights_only: Whether a file is read as plain data.

    Raises:
        ValueError: If a state is of another shape.
    """
    if not path.is_file() and not (path / torch_dcp.INDEX_FILE).is_file():
        yield  # and Lightning says what it is not
        return
    named: dict[Tensor, str] = {
        parameter: name for name, parameter in torch_dcp.named_parameters(model)
    }
    with ExitStack() as stack:
        for number, optimizer in enumerate(optimizers):
            saved, groups = _saved(model, optimizer, number, path, weights_only)
            asks = {p: named.get(p) in saved for p in _parameters(optimizer)}
            stack.enter_context(_requiring_gradients(asks))
            torch_dcp.make_state(optimizer)
            _refuse_other_shapes(optimizer, named, saved)
            for group, keys in zip(optimizer.param_groups, groups, strict=False):
                group.update({key: None for key in keys if key not in group})
        yield


@contextmanager
def making_no_state(optimizer: Optimizer) -> Iterator[None]:
    """Around a question for the state of an optimizer, which torch would otherwise make.

    Where there is none its step of zeros would be the first one of the run.
    """
    asks = {} if optimizer.state else dict.fromkeys(_parameters(optimizer), False)
    with _requiring_gradients(asks):
        yield


@contextmanager
def _requiring_gradients(asks: Mapping[Tensor, bool]) -> Iterator[None]:
    """Let torch take these parameters for what trains, or for what does not."""
    before = {parameter: parameter.requires_grad for parameter in asks}
    try:
        for parameter, trains in asks.items():
            parameter.requires_grad_(trains)
        yield
    finally:
        for parameter, trained in before.items():
            parameter.requires_grad_(trained)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


Shapes = Mapping[str, Mapping[str, torch.Size]]  # of a parameter's state, by its name


def _saved(
    model: nn.Module, optimizer: Optimizer, number: int, path: Path, weights_only: bool | None
) -> tuple[Shapes, list[set[str]]]:
    """Shapes of all tensors of an optimizer's state, and keys of its groups."""
    if path.is_dir():
        return _saved_in_folder(number, path)
    # Parts of a mapped file are read when they are looked at, and nobody does here.
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    every = checkpoint.get("optimizer_states", [])
    if number >= len(every):
        return {}, []
    states = torch_dcp.by_name(model, optimizer, every[number])["state"]
    shapes = {
        name: {each: value.shape for each, value in state.items() if isinstance(value, Tensor)}
        for name, state in states.items()
    }
    return shapes, []  # torch takes all keys of groups that a file has


def _saved_in_folder(number: int, folder: Path) -> tuple[Shapes, list[set[str]]]:
    index = torch_dcp.read_index(folder)
    shapes: dict[str, dict[str, torch.Size]] = {}
    keys: dict[int, set[str]] = {}
    for key, levels in torch_dcp.names(index).items():
        if levels[:2] == (f"optimizer_{number}", "state"):
            state = shapes.setdefault(levels[2], {})
            if (tensor := torch_dcp.on_meta(index, key)) is not None:
                state[levels[3]] = tensor.shape
        elif levels[:2] == (f"optimizer_{number}", "param_groups"):
            keys.setdefault(levels[2], set()).add(levels[3])
    return shapes, [keys[group] for group in sorted(keys)]


def _refuse_other_shapes(optimizer: Optimizer, named: Mapping[Tensor, str], saved: Shapes) -> None:
    for parameter, state in optimizer.state.items():
        ours = {name: v.shape for name, v in state.items() if isinstance(v, Tensor)}
        theirs = saved[named[parameter]]
        if any(theirs.get(name) != shape for name, shape in ours.items()):
            where = f"{type(optimizer).__name__}.load_state_dict"
            told = [
                {name: tuple(shapes[name]) for name in sorted(shapes)} for shapes in (ours, theirs)
            ]
            rule = f"the state of parameter {named[parameter]!r} must hold {told[0]}, and it holds"
            way_out = "Build the optimizer as it was built for the run that saved this state"
            raise argument_error(where, "state_dict", "...", f"{rule} {told[1]}", way_out)
