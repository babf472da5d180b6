"""Updates that wait for the next forward, which reads their blocks anyway.

Where something looks at all gradients before any block is updated, nothing is left to compute when
the updates come: all that they move would be waited for, parameters once more among it. So each of
them waits until its block is fetched again, and is done there, with the learning rates of its own
step, while the blocks before it compute. Whoever looks at values or states before that finishes
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_align.offload.block import Block


class LateUpdates:
    """The updates of one step that are still to be done.

    Args:
        optimizer: The user's.
        update: Does one: of a block, in a phase, and what to begin meanwhile.
        foresee: Begins to read what the updates of blocks will need.
        done: Called when the last one is done.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: Callable[[Block, str, Callable[[], None]], None],
        foresee: Callable[[list[Block]], None],
        done: Callable[[], None],
    ) -> None:
        self._optimizer = optimizer
        self._update, self._foresee, self._done = update, foresee, done
        self._blocks: dict[str, Block] = {}
        self._settings: list[dict[str, Any]] = []  # of the optimizer's groups, in that step
        self._then: list[Callable[[], None]] = []

    @property
    def are_waiting(self) -> bool:
        """Whether there are any."""
        return bool(self._blocks)

    def wait(self, blocks: Iterable[Block]) -> None:
        """Let the updates of blocks wait.

        Args:
            blocks: In the order in which they are likely to be fetched.
        """
        self._blocks = {block.name: block for block in blocks}
        self._settings = [_settings(group) for group in self._optimizer.param_groups]

    def do(self, block: Block, phase: str) -> None:
        """Update a block that was fetched, if its update has waited.

        Args:
            block: Which one.
            phase: In which it was fetched.

        Raises:
            BaseException: What the update raises; those that still wait are then dropped.
        """
        if block.name not in self._blocks:
            return
        del self._blocks[block.name]
        following = list(self._blocks.values())[:1]
        try:
            with self._as_in_its_step():
                self._update(block, phase, lambda: self._foresee(following))
        except BaseException:  # the step is not whole, and will not be
            self._blocks.clear()
            self._then.clear()
            raise
        if not self._blocks:
            self._finished()

    def finish(self) -> None:
        """Do all that still wait."""
        while self._blocks:
            self.do(next(iter(self._blocks.values())), "update")

    def then(self, call: Callable[[], None]) -> None:
        """Call something when all are done; at once, if none waits."""
        if self._blocks:
            self._then.append(call)
        else:
            call()

    def _finished(self) -> None:
        self._done()
        then, self._then = self._then, []
        for call in then:
            call()

    @contextmanager
    def _as_in_its_step(self) -> Iterator[None]:
        """Groups have the settings of the step that is being made up for."""
        groups = self._optimizer.param_groups
        now = [_settings(group) for group in groups]
        _put(groups, self._settings)
        try:
            yield
        finally:
            _put(groups, now)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """All of a group but its parameters; tensors are copied, as schedulers fill them anew."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def _put(groups: list[dict[str, Any]], settings: list[dict[str, Any]]) -> None:
    """Put settings into groups; a tensor stays the same object."""
    for group, wanted in zip(groups, settings, strict=True):
        for key, value in wanted.items():
            if isinstance(value, Tensor):
                group[key].copy_(value)
            else:
                group[key] = value
