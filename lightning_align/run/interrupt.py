"""Ctrl-C that waits for the end of a batch, so that there is a state worth saving."""

import signal
import threading
from typing import Any

from lightning.pytorch.utilities import rank_zero_info


class DeferredInterrupt:
    """Once installed, the first Ctrl-C is remembered until :meth:`release`; a second is raised.

    Does nothing outside the main thread, where Python delivers no signals.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._deferring = self._came = False

    def install(self) -> None:
        """Take over SIGINT."""
        if threading.current_thread() is threading.main_thread() and self._before is None:
            self._before = signal.signal(signal.SIGINT, self._handle)
            self._deferring = True

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

    def _handle(self, number: int, frame: Any) -> None:
        if self._deferring and not self._came:
            self._came = True
            rank_zero_info("Ctrl-C: stopping after this batch. Once more stops at once.")
        elif callable(self._before):
            self._before(number, frame)
