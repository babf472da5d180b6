"""Gradients and weights of all stages, for hooks that are written for a whole model.

A rank has the values of its own stages only, so a norm that a hook computes would be that of one
stage. All ranks run the hook alike, though. So while it runs, every parameter has its gradient,
without values where it is another rank's, and each number that is computed from the parameter of
one stage is sent by that stage to all. Norms, own clipping and what is logged of them are then
those of one process, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_align._compat import torch_modules
from lightning_align._errors import argument_error
from lightning_align.strategies.pipeline.passage import WHERE
from lightning_align.strategies.pipeline.trees import mapped, tensors_in

_TIMEOUT = timedelta(seconds=60)  # for ranks that do not run the hook alike
_OURS = {"lightning", "pytorch_lightning", "lightning_align"}  # know what a strategy has
_HOOKS = (
    *("on_fit_start", "on_fit_end", "on_train_start", "on_train_end"),
    *("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"),
    *("on_validation_start", "on_validation_end"),
    *("on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_end"),
    *("on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "configure_gradient_clipping"),
)
_WITH_GRADIENTS = {
    *("on_before_zero_grad", "on_after_backward", "on_before_optimizer_step"),
    *("configure_gradient_clipping", "on_train_batch_end"),
}
_TENSOR: Any = Tensor
_GRAD, _DEVICE, _IS_META = (
    getattr(_TENSOR, name).__get__ for name in ("grad", "device", "is_meta")
)
_SET_GRAD = _TENSOR.grad.__set__
_READS = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__)
# Of a parameter that is one number these are not its number, but the parameter.
_KEEP = (_GRAD, _TENSOR.data.__get__, Tensor.detach)


def own_group() -> Any:
    """All ranks, for messages of hooks only: one that is alone in a hook gets no other; collective.

    To be made where the ranks have just met, for nobody notices there that a peer has failed.
    """
    return distributed.new_group(timeout=_TIMEOUT)


class WholeValues(TorchFunctionMode):
    """Context in which hooks find gradients of all stages, and numbers made of any weight.

    Args:
        module: The user's module.
        ranks: name -> ranks (in the group) that have the parameter; the first one speaks for it.
        group: What ``own_group`` has made.
        device: Where this rank has its values.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        ranks: dict[str, list[int]],
        group: distributed.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._module, self._ranks, self._device = module, ranks, device
        self._group, self._rank = group, distributed.get_rank(group)
        self._hook, self._depth = "", 0
        self._asked: tuple[Tensor, Any] | None = None  # who has gradients, while on its way
        self._followed: dict[int, tuple[Tensor, int]] = {}  # id -> tensor, rank that has its values
        self._lent: list[Tensor] = []  # parameters that were given a gradient
        self._patches = ExitStack()

    def lend_to(
        self, users: Iterable[Any], outside: Iterable[tuple[Any, str]]
    ) -> Callable[[], None]:
        """Let the hooks that the user has written run in here; returns the way back.

        Args:
            users: The module and the callbacks.
            outside: (object, name of its method) of what hooks may call, and is to run outside.
        """
        wrapped = []
        for user in users:
            for name in _HOOKS:
                own = getattr(type(user), name, None)
                package = getattr(own, "__module__", "lightning").partition(".")[0]
                if own is not None and package not in _OURS and name not in vars(user):
                    wrapped.append((user, name, self._inside(getattr(user, name))))
        wrapped += [(user, name, self._outside(getattr(user, name))) for user, name in outside]
        for user, name, method in wrapped:
            vars(user)[name] = method

        def undo() -> None:
            for user, name, _ in wrapped:
                vars(user).pop(name, None)

        return undo

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what knows that this rank has a part of the model only, such as a checkpoint."""
        lent, self._lent = self._lent, []
        for parameter in lent:
            parameter.grad = None
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._lend(lent)

    def _outside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, run outside of here."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.paused():
                return function(*args, **kwargs)

        return run

    def _inside(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._hook = hook.__qualname__
            if hook.__name__ in _WITH_GRADIENTS and self._depth == 0:
                self._ask_for_gradients()
            try:
                with self:
                    return hook(*args, **kwargs)
            except (NotImplementedError, RuntimeError) as error:
                if "meta" in str(error):
                    raise self._error(f"it needs all values of a weight: {error}") from error
                raise

        return run

    @override
    def __enter__(self) -> Any:
        self._depth += 1
        if self._depth == 1:
            self._patches.enter_context(torch_modules.one_group_of_gradients(self._device))
        return super().__enter__()  # type: ignore[no-untyped-call]

    @override
    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._depth -= 1
        if self._depth == 0:
            self._patches.close()
            self._followed.clear()
            self._asked = None
            for parameter in self._lent:
                parameter.grad = None
            self._lent.clear()

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._followed:  # most hooks compute nothing, and are not kept waiting
            self._follow_all()
        if func in (_GRAD, _SET_GRAD) and self._asked is not None:
            self._lend_gradients()
        name = getattr(func, "__name__", "")
        if name.startswith("_foreach_"):
            return self._each(func, args, kwargs)
        rank = self._rank_of((args, kwargs), name)
        if rank is None:
            return func(*args, **kwargs)
        if func == _DEVICE:
            return self._device
        if func == _IS_META:
            return False  # all ranks are to run the hook alike
        if func in _READS and args[0].numel() == 1:
            return func(self._everywhere(args[0], rank))
        return self._of_one(func, args, kwargs, rank)

    # Whose value it is.

    def _follow(self, tensor: Tensor, rank: int) -> Tensor:
        self._followed[id(tensor)] = tensor, rank  # kept, so that its id is no other's
        return tensor

    def _rank_of(self, values: Any, name: str) -> int | None:
        found = {self._followed[id(t)][1] for t in tensors_in(values) if id(t) in self._followed}
        if len(found) > 1:
            raise self._error(f"{name} is given values of several stages")
        return found.pop() if found else None

    def _follow_all(self) -> None:
        for name, parameter in self._module.named_parameters():
            self._follow(parameter, self._ranks[name][0])
            if parameter.grad is not None:
                self._follow(_plain_grad(parameter), self._ranks[name][0])

    def _ask_for_gradients(self) -> None:
        """Ask which parameters have a gradient on their rank; collective.

        The answer comes while the hook runs, and is waited for by the ranks that look at a gradient
        in it: one may look alone.
        """
        parameters = self._module.parameters()
        has = torch.tensor([not p.is_meta and p.grad is not None for p in parameters])
        has = has.int().to(self._device)
        self._asked = has, distributed.all_reduce(has, group=self._group, async_op=True)

    def _lend_gradients(self) -> None:
        """Give every parameter the gradient that it has on its own rank, without values."""
        assert self._asked is not None
        (has, answer), self._asked = self._asked, None
        self._collective(answer.wait)
        everywhere = zip(self._module.parameters(), has.tolist(), strict=True)
        self._lend([p for p, count in everywhere if p.is_meta and count])

    def _lend(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter.detach().as_subclass(Tensor))
                self._lent.append(parameter)
                if self._depth:
                    self._follow(_plain_grad(parameter), self._followed[id(parameter)][1])

    # What is computed of it.

    def _of_one(self, func: Any, args: Any, kwargs: Any, rank: int) -> Any:
        """A function of the values of one stage."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._is_here((args, kwargs)):
                result = func(*args, **kwargs)
            else:
                result = func(*_on_meta(args), **_on_meta(kwargs))
        given = {id(tensor) for tensor in tensors_in(args)}
        if isinstance(result, Tensor):
            if result.ndim == 0 and id(result) not in given and func not in _KEEP:
                return self._everywhere(result, rank)
            return self._follow(result, rank)
        for tensor in tensors_in(result):
            self._follow(tensor, rank)
        return result

    def _is_here(self, values: Any) -> bool:
        return not any(t.is_meta for t in tensors_in(values) if id(t) in self._followed)

    def _each(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of lists, whose entries belong to any stage."""
        first: Sequence[Tensor] = args[0]
        ranks = [self._followed.get(id(tensor), (tensor, None))[1] for tensor in first]
        if not any(rank is not None for rank in ranks):
            return func(*args, **kwargs)
        results = []
        for number, rank in enumerate(ranks):
            own = [
                [arg[number]] if isinstance(arg, (list, tuple)) and len(arg) == len(first) else arg
                for arg in args
            ]
            with torch._C.DisableTorchFunctionSubclass():
                here = self._is_here(own)
                result = func(*(own if here else _on_meta(own)), **kwargs)
            if result is not None:
                results.append(result[0] if rank is None else self._follow(result[0], rank))
        if results and all(result.ndim == 0 for result in results):
            return self._all_everywhere(results, ranks)
        return results or None

    def _everywhere(self, value: Tensor, rank: int) -> Tensor:
        """A number of one stage, on all ranks; collective."""
        sent = torch.zeros((), dtype=torch.float64, device=self._device)
        if not value.is_meta:
            sent.copy_(value.detach().reshape(()))
        source = distributed.get_global_rank(self._group, rank)
        self._collective(lambda: distributed.broadcast(sent, source, group=self._group))
        return sent.to(value.dtype)

    def _all_everywhere(self, values: list[Tensor], ranks: list[int | None]) -> list[Tensor]:
        """The same for many, in one message."""
        sent = torch.zeros(len(values), dtype=torch.float64, device=self._device)
        for number, (value, rank) in enumerate(zip(values, ranks, strict=True)):
            if rank == self._rank or (rank is None and self._rank == 0):
                sent[number] = value.detach()
        self._collective(lambda: distributed.all_reduce(sent, group=self._group))
        return [n.to(value.dtype) for n, value in zip(sent, values, strict=True)]

    def _collective(self, send: Callable[[], Any]) -> None:
        try:
            send()
        except RuntimeError as error:
            rule = "all ranks must compute with weights or gradients alike, and some have not"
            raise self._error(rule) from error

    def _error(self, rule: str) -> ValueError:
        way_out = "Compute norms of each parameter, on every rank; log them from there"
        return argument_error(WHERE, "hook", self._hook, rule, way_out)


def _plain_grad(parameter: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        gradient = parameter.grad
    assert gradient is not None
    return gradient


def _on_meta(values: Any) -> Any:
    """The same without values."""

    def without(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf if leaf.is_meta else leaf.to("meta")
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    return mapped(values, without)
