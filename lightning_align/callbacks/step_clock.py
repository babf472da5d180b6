"""What the time of training steps goes to."""

from __future__ import annotations

import time

import torch
from lightning.pytorch.strategies import Strategy

from lightning_align._compat.torch_messages import MessageClock
from lightning_align.planner.advice import COMMIT, COMMUNICATION, DATA, OTHER, WAITING
from lightning_align.planner.module_scopes import BACKWARD, FORWARD, OPTIMIZER
from lightning_align.run.protocols import TellsBackward, TellsCommits, TellsWaits

PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER, WAITING, COMMIT, OTHER)


class StepClock:
    """Adds up seconds of steps by what runs.

    A device that computes while the next operation is prepared is waited for at the borders of
    parts, but only while ``splits`` is set: to wait costs time.

    Args:
        strategy: Where steps run; if it tells how long it has waited, or what
            its commits took, these are parts of their own.
        messages: Of a sharded model; what they take is likewise.

    Attributes:
        seconds: Of all steps that counted.
        split: Seconds of them by part, while ``splits`` was set.
        splits: Whether parts are told apart.
        part: What runs; None if it does not count.
    """

    def __init__(self, strategy: Strategy, messages: MessageClock | None = None) -> None:
        self._messages = messages
        self._parts = PARTS if messages is None else (*PARTS, COMMUNICATION)
        self._device = strategy.root_device
        self._waiting = strategy if isinstance(strategy, TellsWaits) else None
        self._commits = strategy if isinstance(strategy, TellsCommits) else None
        self._backward = strategy if isinstance(strategy, TellsBackward) else None
        self.splits = self.always_splits = self._device.type == "cpu"
        self.part: str | None = None
        self._since = self._waited_before = self._backward_before = 0.0
        self._committed_before = self._sent_before = 0.0
        self.leave_out()
        self.forget()

    def forget(self) -> None:
        """Begin to add up anew."""
        self.seconds = 0.0
        self.split = dict.fromkeys(self._parts, 0.0)

    def count(self) -> None:
        """What has run since the last step is one that counts."""
        self.seconds += self._open_s
        for part, spent in self._open.items():
            self.split[part] += spent
        self.leave_out()

    def leave_out(self) -> None:
        """It is one that does not."""
        self._open_s, self._open = 0.0, dict.fromkeys(self._parts, 0.0)

    def enter(self, part: str | None) -> None:
        """What runs from now on; None does not count.

        Args:
            part: One of ``PARTS``.
        """
        if self.splits and not self.always_splits:
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        waited = 0.0 if self._waiting is None else self._waiting.waited_s
        backward = 0.0 if self._backward is None else self._backward.backward_s
        sent = 0.0 if self._messages is None else self._messages.seconds
        committed = 0.0 if self._commits is None else self._commits.committing_s
        if self.part is not None:
            spent = now - self._since
            self._open_s += spent
            if self.splits:
                idle = min(waited - self._waited_before, spent)
                within = min(backward - self._backward_before, spent - idle)
                kept = min(committed - self._committed_before, spent - idle - within)
                self._open[WAITING] += idle
                self._open[BACKWARD] += within
                self._open[COMMIT] += kept
                self._open[self.part] += spent - idle - within - kept
                if self._messages is not None:
                    messages = min(sent - self._sent_before, spent - idle - within - kept)
                    self._open[COMMUNICATION] += messages
                    self._open[self.part] -= messages
        self.part, self._since = part, now
        self._waited_before, self._backward_before = waited, backward
        self._committed_before, self._sent_before = committed, sent

    def shares(self) -> dict[str, float]:
        """Shares of the time by part; empty if nothing was told apart."""
        total = sum(self.split.values())
        return {part: spent / total for part, spent in self.split.items()} if total else {}
