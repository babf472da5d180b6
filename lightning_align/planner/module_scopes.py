"""Which modules an operation belongs to: forward, backward, or what a checkpoint repeats.

Hooks on modules cannot tell where the backward of one begins and ends: its input may need no
gradient, it may be called twice, or again by a checkpoint. But every node of the graph has a
number, which grows as forward goes on. So the numbers at which modules are entered and left are
written down, and the number of the node whose backward runs says in which modules it was made.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import is_grad_enabled, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_align._compat.torch_autograd import (
    next_sequence_number,
    running_backward,
    running_node,
)

FORWARD, RECOMPUTE, BACKWARD, OPTIMIZER = "forward", "recompute", "backward", "optimizer"
Scope = tuple[str, ...]  # names of the modules, the innermost last


class ModuleScopes:
    """Follows the calls of a model's modules; ``following`` has the hooks that do.

    Args:
        model: Modules are named as in its ``named_modules()``.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_modules())
        self._names = {module: name for name, module in named.items()}
        self._owners: dict[Any, str] = {
            parameter: name
            for name, module in named.items()
            for parameter in module.parameters(recurse=False)
        }
        self._calls: list[tuple[str | None, bool]] = []  # name, and whether it is in a backward
        self._marks: list[int] = []  # numbers from which on nodes belong to ...
        self._scopes: list[Scope] = []  # ... these modules
        self._now: Scope = ()
        self._here: tuple[str, Scope] = FORWARD, ()  # made once for all that runs there
        self._update: tuple[str, Scope] = OPTIMIZER, ()
        self._recomputed: Scope = ()
        self._node: tuple[int | None, Scope] = (None, ())
        self._thread = threading.get_ident()
        self._optimizer_steps = 0
        self._is_before_backward = False  # in a closure, which an optimizer's step calls

    @contextmanager
    def following(self) -> Iterator[None]:
        """Context in which calls are followed."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def current(self) -> tuple[str, Scope]:
        """Phase and modules of the operation that is about to run."""
        if running_backward() < 0:
            if not self._optimizer_steps or self._is_before_backward or self._calls:
                return self._here
            return self._here if is_grad_enabled() else self._update
        self._is_before_backward = False
        if self._calls and self._calls[-1][1]:
            return RECOMPUTE, self._now
        number, leaf, recomputes = running_node()
        if recomputes:
            return RECOMPUTE, self._recomputed or self._of_node(number)
        if leaf is not None:
            owner = self._owners.get(leaf)
            return BACKWARD, () if owner is None else (owner,)
        return BACKWARD, self._of_node(number)

    def _of_node(self, number: int | None) -> Scope:
        if number is None:
            return ()
        if number != self._node[0]:
            place = bisect_right(self._marks, number) - 1
            self._node = number, self._scopes[place] if place >= 0 else ()
        return self._node[1]

    def _enter(self, module: nn.Module, *_: Any) -> None:
        self._calls.append((self._names.get(module), running_backward() >= 0))
        self._mark()

    def _leave(self, *_: Any) -> None:
        name, is_recomputed = self._calls.pop()
        if is_recomputed and name is not None and not (self._calls and self._calls[-1][1]):
            # What a checkpoint runs between modules belongs to the one that contains them.
            self._recomputed = (name.rpartition(".")[0],)
        self._mark()

    def _mark(self) -> None:
        recomputes = bool(self._calls) and self._calls[-1][1]
        named = [name for name, flag in self._calls if flag == recomputes and name is not None]
        self._now = tuple(dict.fromkeys(named))
        self._here, self._update = (FORWARD, self._now), (OPTIMIZER, self._now)
        if threading.get_ident() != self._thread:  # which numbers its nodes by itself
            return
        self._marks.append(next_sequence_number())
        inside = running_backward() >= 0 and not recomputes
        self._scopes.append(self._recomputed if inside else self._now)

    def _begin_step(self, _: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A closure, by which Lightning runs forward and backward, is no update."""
        self._optimizer_steps += 1
        if callable(named.get("closure")):
            return args, {**named, "closure": self._as_forward(named["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._as_forward(args[1]), *args[2:]), named
        return None

    def _as_forward(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def followed() -> Any:
            self._is_before_backward = True
            try:
                return closure()
            finally:
                self._is_before_backward = False

        return followed

    def _end_step(self, *_: Any) -> None:
        self._optimizer_steps -= 1
