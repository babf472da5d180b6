"""Forked processes for tests that need one to die, or to be limited, without harm to pytest."""

import os
import sys
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


def forget_package(package: str = "lightning_align") -> None:
    """Let a forked process import a package as if for the first time, with what it needs there."""
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
        del sys.modules[name]
    finders = [each for each in sys.meta_path if not type(each).__module__.startswith(package)]
    sys.meta_path[:] = finders
