"""What a step of a real model computes and moves: ``analyze_step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_align._errors import argument_error
from lightning_align.layers.find import find_layers, kept_layers
from lightning_align.layers.sharding import own_part
from lightning_align.planner.as_before import as_before
from lightning_align.planner.module_scopes import BACKWARD
from lightning_align.planner.records import Trace
from lightning_align.planner.report import StepReport
from lightning_align.planner.trace import IS_TRACING, tracing

WHERE = "analyze_step"


def analyze_step(
    model: nn.Module, fn: Callable[[], Tensor | None], *, optimizer: Optimizer | None = None
) -> StepReport:
    """Run a step once and count what it computes and moves.

    Everything that really runs is counted, under its module: recomputed activations, a reference
    model, the optimizer. It works on the meta device and under ``FakeTensorMode``, too, where
    attention is taken to run as on the processor. Compiled parts run as they were written.

    FLOPs are those of products, a multiplication and an addition each; attention counts all pairs
    of tokens, causal or not, and its fused backward has 5 products where the unfused one has 4.

    If ``fn`` returns a loss, gradients, buffers, modes and generators of random numbers are
    afterwards as they were, and so are parameters and optimizer; if it made a step of its own, only
    after an exception.

    Args:
        model: Whose modules the report names.
        fn: Runs forward and returns the loss, whose backward is run, too; or makes a whole step of
            its own and returns None. Under ``torch.no_grad()`` a forward is enough.
        optimizer: Stepped after backward, if ``fn`` returns a loss.

    Raises:
        ValueError: If there is no loss, or none that has gradients; if the model is wrapped; or
            inside of another analysis.
    """
    _check(model, fn, optimizer)
    there = tensors_there(model, optimizer)
    with as_before(model, optimizer) as change:
        with tracing(model, there) as trace:
            loss = _run(fn)
            change.stays = loss is None
            if loss is not None:
                _finish(loss, optimizer)
        if loss is None and torch.is_grad_enabled() and not _has_backward(trace):
            rule = "returned None and ran no backward"
            way_out = "Return the loss, or call analyze_step under torch.no_grad()"
            raise argument_error(WHERE, "fn", fn, rule, way_out)
    return report_of(trace, model)


def report_of(trace: Trace, model: nn.Module) -> StepReport:
    """What a trace comes to.

    Args:
        trace: Of a step.
        model: Whose modules it names.
    """
    named = dict(model.named_modules())
    return StepReport(trace, tuple(named), _block_names(model, named))


def _finish(loss: Tensor, optimizer: Optimizer | None) -> None:
    if optimizer is not None:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if optimizer is not None:
        optimizer.step()


def _run(fn: Callable[[], Any]) -> Tensor | None:
    loss = fn()
    if loss is None:
        return None
    if not isinstance(loss, Tensor) or loss.dim():
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        rule = f"must return a scalar loss, or None after a step of its own; it returned {what}"
        raise argument_error(WHERE, "fn", fn, rule)
    if not loss.requires_grad:
        rule = "returned a loss without a gradient"
        way_out = "Compute it with gradients enabled, from parameters that require them"
        raise argument_error(WHERE, "fn", fn, rule, way_out)
    return loss


def _check(model: nn.Module, fn: object, optimizer: object) -> None:
    if IS_TRACING.get():
        raise argument_error(WHERE, "fn", fn, "an analysis must not run inside of another one")
    if not isinstance(model, nn.Module):
        raise argument_error(WHERE, "model", model, "must be a torch.nn.Module")
    if not callable(fn):
        raise argument_error(WHERE, "fn", fn, "must be a function without arguments")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise argument_error(WHERE, "optimizer", optimizer, "must be a torch.optim.Optimizer")
    name = type(model).__name__
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_fsdp_wrapped_module"):
        rule = "is a wrapper around a model, whose own work cannot be seen"
        raise argument_error(WHERE, "model", name, rule, "Pass model.module, and call that in fn")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        rule = "has parameters that are sharded, and is run here by itself"
        way_out = "Pass it before fully_shard, or on meta; RooflineMonitor analyses sharded steps"
        raise argument_error(WHERE, "model", name, rule, way_out)


def tensors_there(model: nn.Module, optimizer: Optimizer | None) -> list[Tensor]:
    """What lives before a step: parameters, buffers, gradients and the optimizer's state.

    Of what is sharded this rank's part.
    """
    states = [] if optimizer is None else list(optimizer.state.values())
    values = [value for state in states if isinstance(state, dict) for value in state.values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    every = [*model.parameters(), *model.buffers(), *values, *gradients]
    return [own_part(value) for value in every if isinstance(value, Tensor)]


def _has_backward(trace: Trace) -> bool:
    return any(record.phase == BACKWARD for record in trace.records)


def _block_names(model: nn.Module, named: dict[str, nn.Module]) -> tuple[str, ...]:
    """Names of its blocks in the model; none where no blocks are found."""
    try:
        layers = kept_layers(model) or find_layers(model)
    except ValueError:
        return ()
    blocks = set(layers.blocks)
    return tuple(name for name, module in named.items() if module in blocks)
