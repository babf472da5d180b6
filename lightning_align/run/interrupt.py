"""Ctrl-C and SIGTERM that wait for the end of a batch, so that there is a state worth saving."""

import signal
import threading
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_align._compat import lightning_resume


class DeferredInterrupt:
    """Once installed, the first Ctrl-C is remembered until :meth:`release`; a second is raised.

    Does nothing outside the main thread, where Python delivers no signals.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._deferring = self._came = self._told_to_end = False
        self.is_shared = False  # whether it has stopped all ranks at the same batch

    def start(self, trainer: pl.Trainer, *, defer: bool) -> None:
        """Watch from here on, where training begins.

        Args:
            trainer: Who trains; of several ranks all are to stop together.
            defer: Whether Ctrl-C waits for the end of a batch.
        """
        self.is_shared = False
        if defer:
            self.install()
        if trainer.world_size > 1:
            self.watch_sigterm(trainer)

    def stop_if_it_came(self, trainer: pl.Trainer, *, defer: bool = True) -> None:
        """Stop here, on all ranks, if it came to one of them. Collective.

        Args:
            trainer: Whose ranks they are.
            defer: As in :meth:`release`.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed.
        """
        if trainer.world_size > 1:
            self.is_shared = self.share(trainer)
        self.release(defer=defer)

    def install(self) -> None:
        """Take over SIGINT."""
        if threading.current_thread() is threading.main_thread() and self._before is None:
            self._before = signal.signal(signal.SIGINT, self._handle)
            self._deferring = True

    def watch_sigterm(self, trainer: pl.Trainer) -> None:
        """Take note of SIGTERM for :meth:`share`, in place of Lightning, whose handler broadcasts.

        A broadcast in the middle of whatever the ranks are at deadlocks if one of them got the
        signal, and if all did but not at the same place.

        Args:
            trainer: Whose launcher hands the signal on to the other processes of the node.
        """

        def note(number: int, _: Any) -> None:
            launcher = trainer.strategy.launcher
            if launcher is not None and not self._told_to_end:
                launcher.kill(number)
            self._told_to_end = True

        self._told_to_end = False
        lightning_resume.replace_sigterm_notice(trainer, note)

    def uninstall(self) -> None:
        """Give SIGINT back."""
        self._deferring = self._came = False
        if self._before is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, self._before)
        self._before = None

    def release(self, *, defer: bool = True) -> None:
        """Raise the interrupt that came meanwhile.

        Args:
            defer: Whether the next one waits again, for the next call.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed.
        """
        came, self._deferring, self._came = self._came, defer, False
        if came:
            raise KeyboardInterrupt

    def share(self, trainer: pl.Trainer) -> bool:
        """Let what came to one rank stop all of them here; whether something came. Collective.

        Args:
            trainer: Whose ranks they are.
        """
        any_rank = trainer.strategy.reduce_boolean_decision
        if not any_rank(self._came or self._told_to_end, all=False):
            return False
        if any_rank(self._told_to_end, all=False):
            lightning_resume.receive_sigterm(trainer)  # raised after the batch
            self._came = False
        else:
            self._came = True
        return True

    def _handle(self, number: int, frame: Any) -> None:
        if self._deferring and not self._came:
            self._came = True
            rank_zero_info("Ctrl-C: stopping after this batch. Once more stops at once.")
        elif callable(self._before):
            self._before(number, frame)
