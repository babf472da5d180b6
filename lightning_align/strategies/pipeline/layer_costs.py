"""What each layer of a chain costs: its parameters, or the time that it takes on the first batch.

Times are taken on one rank and sent to all, so that all cut alike. A layer is called by itself, on
what the chain calls it with, forward and backward. A model without values is never whole for that:
each layer has its parameters while it is timed, and layers of one kind are timed once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed, nn

from lightning_align._compat.lightning_resume import forget_train_loaders
from lightning_align._errors import argument_error
from lightning_align.models.weights import weights_reader
from lightning_align.run.protocols import arranged
from lightning_align.strategies.failure import failing_together
from lightning_align.strategies.pipeline.chain import WHERE, Chain, Step, quiet
from lightning_align.strategies.pipeline.microbatches import shape_key, split_batch, tensors_of
from lightning_align.strategies.pipeline.passage import Shapes
from lightning_align.strategies.pipeline.rehearsal import first_batch, step_arguments
from lightning_align.strategies.pipeline.trees import metas_of

_REPEATS = 5  # of which the median counts; one more comes before
# What blocks call their place in the model, which makes them no other kind.
_NUMBERS = ("layer_idx", "layer_id", "layer_index", "layer_number")
_OF_ANY_MODULE = {*vars(nn.Module()), "forward", "_compiled_call_impl"}

_Calls = dict[nn.Module, tuple[Any, Any]]


@dataclass(frozen=True)
class LayerCosts:
    """Costs of the layers, of what rides on the first one and of what rides on the last one."""

    layers: list[float]
    first: float
    last: float
    unit: str


def count_parameters(chain: Chain) -> LayerCosts:
    """The parameters of each layer."""
    layers = [_count(chain.owned(i, i + 1)) for i in range(len(chain.layers))]
    first, last = _count(chain.before), _count(chain.after)
    layers[0], layers[-1] = layers[0] - first, layers[-1] - last
    return LayerCosts(layers, first, last, "parameters")


def _count(parts: Sequence[nn.Module]) -> float:
    seen = {parameter for part in parts for parameter in part.parameters()}
    return float(sum(parameter.numel() for parameter in seen))


def time_layers(
    trainer: pl.Trainer,
    chain: Chain,
    count_for: Callable[[Any], int],
    group: distributed.ProcessGroup,
) -> LayerCosts:
    """Milliseconds of each layer for a micro-batch, forward and backward; collective.

    Args:
        trainer: The trainer, at set-up.
        chain: The module as a chain.
        count_for: How many micro-batches a batch is cut into.
        group: The ranks of the pipeline.

    Raises:
        ValueError: If there is no first batch to be had, or a layer fails on it, on all ranks.
    """
    trainer.fit_loop.setup_data()  # as trainer.estimated_stepping_batches does
    found: list[Any] = [None]
    with failing_together(group):
        if distributed.get_rank(group) == 0:
            found = [_Timing(trainer, chain).run(count_for)]
    if trainer.ckpt_path:  # whose states of loaders come after set-up
        forget_train_loaders(trainer)
    distributed.broadcast_object_list(found, distributed.get_global_rank(group, 0), group=group)
    costs: LayerCosts = found[0]
    return costs


class _Timing:
    """One pass through the chain, with the parameters of a layer at a time."""

    def __init__(self, trainer: pl.Trainer, chain: Chain) -> None:
        self.trainer, self.chain = trainer, chain
        self.device: torch.device = trainer.strategy.root_device
        self.context = trainer.precision_plugin.train_step_context
        self.read = None if trainer.ckpt_path else weights_reader(chain.module)
        self.names: dict[Tensor, list[str]] = {}
        for name, parameter in chain.module.named_parameters(remove_duplicate=False):
            self.names.setdefault(parameter, []).append(name)

    def run(self, count_for: Callable[[Any], int]) -> LayerCosts:
        """Costs of all layers, on the first micro-batch of the first batch."""
        module: Any = self.chain.module
        self._move_buffers()
        with isolate_rng(include_cuda=self.device.type == "cuda"):
            batch = first_batch(self.trainer, self.trainer.train_dataloader)
            if batch is None:
                rule = "its first batch cannot be made, or not without a trace in the loader"
                way_out = "a DataLoader over a dataset with __getitem__ and a sampler of torch"
                raise _refusal(rule, f"Use {way_out}, or 'parameters'")
            batch = arranged(module, batch)
            microbatch = split_batch(batch, count_for(batch))[0]
            step = Step(module.training_step, microbatch, step_arguments(module), seed=0)
            return self._through(step)

    def _through(self, step: Step) -> LayerCosts:
        chain, layers = self.chain, self.chain.layers
        costs, first, last = [], 0.0, 0.0
        times: dict[Hashable, float] = {}
        passed: dict[Hashable, tuple[float, Any]] = {}
        received: Any = None
        shapes = Shapes()
        for index, layer in enumerate(layers):
            kind = (_kind(layer), shape_key(received))
            if 0 < index < len(layers) - 1 and kind in passed:
                milliseconds, received = passed[kind]
                costs.append(milliseconds)
                shapes.layers.append(metas_of(received))
                continue
            with _named(index, layer), self._filled(chain.owned(index, index + 1)):
                output, calls = self._calls(index, received, step, shapes)
                called = (_kind(layer), shape_key(calls[layer][0]))
                if called not in times:
                    times[called] = self._time_of(layer, *calls[layer])
                costs.append(times[called])
                first += sum(self._time_of(p, *calls[p]) for p in chain.before if p in calls)
                last += sum(self._time_of(p, *calls[p]) for p in chain.after if p in calls)
                if index == len(layers) - 1:
                    last += self._time_of_loss(step, output, shapes)
                received = _leaves(output)
                passed[kind] = (times[called], received)
        if not chain.before:  # nothing that the table would name
            costs[0], first = costs[0] + first, 0.0
        if not chain.after:
            costs[-1], last = costs[-1] + last, 0.0
        return LayerCosts(costs, first, last, "ms")

    def _calls(self, index: int, received: Any, step: Step, shapes: Shapes) -> tuple[Any, _Calls]:
        """Output of a layer in its place, and what each module of the place was called with."""
        calls: _Calls = {}
        outputs: dict[nn.Module, Any] = {}

        def note(part: nn.Module, args: Any, kwargs: Any) -> None:
            calls[part] = (args, kwargs)

        def note_output(part: nn.Module, _: Any, output: Any) -> None:
            outputs[part] = output

        chain, parts = self.chain, self.chain.owned(index, index + 1)
        hooks: list[Any] = [
            part.register_forward_pre_hook(note, with_kwargs=True) for part in parts
        ]
        hooks.append(chain.layers[index].register_forward_hook(note_output))
        try:
            with quiet(chain.module), self.context():
                chain.run(index, index + 1, received, step, shapes)
            return outputs[chain.layers[index]], calls
        finally:
            for hook in hooks:
                hook.remove()

    def _time_of(self, part: nn.Module, args: Any, kwargs: Any) -> float:
        args, kwargs = _leaves((args, kwargs))
        return self._median(lambda: part(*args, **kwargs), [*tensors_of((args, kwargs))], [part])

    def _time_of_loss(self, step: Step, output: Any, shapes: Shapes) -> float:
        """Of the user's step without the layers of the chain."""
        output, end = _leaves(output), len(self.chain.layers)

        def loss() -> Any:
            with quiet(self.chain.module):
                return self.chain.run(end, end, output, step, shapes)

        return self._median(loss, tensors_of(output), self.chain.after)

    def _median(
        self, call: Callable[[], Any], inputs: Sequence[Tensor], parts: Sequence[nn.Module]
    ) -> float:
        """Milliseconds of a forward, and of the backward to inputs and parameters."""
        parameters = [parameter for part in parts for parameter in part.parameters()]
        wanted = [tensor for tensor in [*inputs, *parameters] if tensor.requires_grad]
        seconds = []
        for _ in range(1 + _REPEATS):
            start = self._now()
            with self.context():
                outputs = [tensor for tensor in tensors_of(call()) if tensor.requires_grad]
            if outputs and wanted:
                ones = [torch.ones_like(tensor) for tensor in outputs]
                torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
            seconds.append(self._now() - start)
        return statistics.median(seconds[1:]) * 1e3

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def _move_buffers(self) -> None:
        """To the device: a model's own forward uses some that belong to no layer."""
        for part in self.chain.module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if not buffer.is_meta:
                    part._buffers[name] = buffer.to(self.device)

    @contextmanager
    def _filled(self, parts: list[nn.Module]) -> Iterator[None]:
        """Parameters with values on the device; before and after, they are what they were."""
        modules = dict.fromkeys(module for part in parts for module in part.modules())
        before = [(m, *item) for m in modules for item in m.named_parameters(recurse=False)]
        filled = {parameter: self._value(parameter) for *_, parameter in before}
        for module, name, parameter in before:
            setattr(module, name, filled[parameter])
        for part in parts:
            self.trainer.precision_plugin.convert_module(part)
        buffers = [(b, b.clone()) for module in modules for b in module.buffers(recurse=False)]
        try:
            yield
        finally:
            for module, name, parameter in before:
                setattr(module, name, parameter)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def _value(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.device == self.device:
            return parameter
        value = parameter.detach()
        if parameter.is_meta:
            value = torch.empty_like(parameter, device="cpu")
            if self.read is not None:
                value.copy_(self.read(self.names[parameter]))
            else:  # a checkpoint has them, or they are to be drawn; their size takes no time
                value.normal_(0, 0.02)
        return nn.Parameter(value.to(self.device), parameter.requires_grad)


def _kind(layer: nn.Module) -> Hashable:
    """Equal for layers that do the same with other values of their parameters."""
    kinds: list[Hashable] = []
    for name, part in layer.named_modules():
        tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        kinds.append((name, type(part), shape_key(tensors), _attributes(part)))
    return tuple(kinds)


def _attributes(part: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Numbers, words and lists of them by value, anything else by what it is."""
    return tuple(
        (name, _identity(value))
        for name, value in sorted(vars(part).items())
        if name not in _OF_ANY_MODULE and name not in _NUMBERS
    )


def _identity(value: Any) -> Hashable:
    if isinstance(value, partial):  # such as activations of Hugging Face, one for each layer
        return id(value.func), repr(value.args), repr(value.keywords)
    return repr(value) if type(value).__module__ == "builtins" else id(value)


def _leaves(values: Any) -> Any:
    """The same tensors, cut off from what they come from."""
    return apply_to_collection(
        values, Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad)
    )


@contextmanager
def _named(index: int, layer: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        rule = f"layer {index} ({type(layer).__name__}) cannot be timed by itself"
        way_out = "Use 'parameters', or give the number of layers of each stage"
        raise _refusal(f"{rule}: {type(error).__name__}: {error}", way_out) from error


def _refusal(rule: str, way_out: str) -> ValueError:
    return argument_error(WHERE, "partition_method", "profile", rule, way_out)
