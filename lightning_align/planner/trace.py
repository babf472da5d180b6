"""The operations of a step as they run: FLOPs, bytes, modules, phase and live memory of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lightning_align._compat.torch_autograd import hooks_give_way, is_result
from lightning_align.planner.live_bytes import Saved
from lightning_align.planner.meta_attention import attention_of_processor
from lightning_align.planner.module_scopes import ModuleScopes
from lightning_align.planner.records import Trace
from lightning_align.planner.tracer import IS_PAUSED, Tracer

IS_TRACING = ContextVar("is_tracing", default=False)


@contextmanager
def tracing(model: nn.Module, there: list[Tensor], into: Trace | None = None) -> Iterator[Trace]:
    """Context whose operations are written down.

    Compiled parts run as they were written, because what compilers make of them cannot be seen.

    Args:
        model: Whose modules are named.
        there: Tensors that live from the beginning, used or not; the list is emptied.
        into: A trace that goes on with what runs here, as of a step in several parts; whoever made
            it closes its storages.
    """
    trace, scopes = Trace() if into is None else into, ModuleScopes(model)
    while there:  # not held any longer: gradients of the last step may be let go of meanwhile
        trace.storages.number(there.pop(), was_there=True)
    tracer = Tracer(trace, scopes)
    token = IS_TRACING.set(True)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(scopes.following())
            stack.enter_context(attention_of_processor())
            stack.enter_context(hooks_give_way())
            saving = _Saving(trace, scopes)
            hooks = torch.autograd.graph.saved_tensors_hooks(saving.pack, saving.unpack)
            stack.enter_context(hooks)
            stack.enter_context(tracer)
            yield trace
    finally:
        IS_TRACING.reset(token)
        tracer.write_down()
        if into is None:
            trace.storages.close()


@contextmanager
def not_traced() -> Iterator[None]:
    """Context whose operations are no part of the step that is being analysed, if one is."""
    token = IS_PAUSED.set(True)
    try:
        yield
    finally:
        IS_PAUSED.reset(token)


class _Saving:
    """Counts what autograd saves, less what was there before the step."""

    def __init__(self, trace: Trace, scopes: ModuleScopes) -> None:
        self._trace, self._scopes = trace, scopes

    def pack(self, tensor: Tensor) -> Tensor | Saved:
        if IS_PAUSED.get():
            return tensor
        # Inputs are saved before the operation is seen here, results after it: so what is new now
        # is an input that nothing has made.
        number = self._trace.storages.number(tensor, was_there=True)
        if number < 0 or number in self._trace.storages.there:  # a sparse one has none
            return tensor
        self._trace.saved_by.setdefault(self._scopes.current()[1], set()).add(number)
        if is_result(tensor):  # it would hold itself, and live on where no backward lets go of it
            with not_traced():
                tensor = tensor.detach()
        return Saved(self._trace.saved, tensor)

    @staticmethod
    def unpack(held: Tensor | Saved) -> Tensor:
        return held.tensor if isinstance(held, Saved) else held
