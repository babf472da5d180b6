"""Private parts of torch's optimizers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer


def unhooked_step(optimizer: Optimizer) -> Callable[[], Any]:
    """The step of the optimizer's class, without the hooks and the profiler's record around it.

    torch wraps ``step`` of every class of optimizers when the first one is made.
    """
    step: Any = type(optimizer).step
    return partial(step.__wrapped__ if getattr(step, "hooked", False) else step, optimizer)


def step_with_hooks(optimizer: Optimizer, step: Callable[..., Any]) -> Callable[..., Any]:
    """``step(optimizer, closure)`` as the optimizer's own step is called: hooks once around it.

    Schedulers look for marks of theirs: that they know of this step, and that it was called.
    """

    def marked(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True
        return step(optimizer, *args, **kwargs)

    hooked: Any = partial(Optimizer.profile_hook_step(marked), optimizer)
    hooked._wrapped_by_lr_sched = True
    return hooked  # type: ignore[no-any-return]
