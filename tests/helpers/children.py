"""Forked processes for tests that need one to die, or to be limited, without harm to pytest."""

import os
import traceback
from collections.abc import Callable


def fork(run: Callable[[], object]) -> int:
    """Run a function in a forked process, and return its id.

    Args:
        run: What to run; an exception makes the exit code 1.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(run: Callable[[], object]) -> int:
    """Run a function in a forked process, and return its exit code.

    Args:
        run: What to run.
    """
    return os.waitstatus_to_exitcode(os.waitpid(fork(run), 0)[1])
