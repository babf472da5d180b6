"""Run pydoclint, less what our conventions make moot, and fail on what is left.

- Errors are made by functions (``raise argument_error(...)``), which build a ValueError: pydoclint
  sees the name of the function, and here it counts as ValueError.
- ``Raises:`` also names what a called function raises (DOC502): users catch it all the same.
- A docstring may be a sentence and a ``Raises:`` (DOC101, DOC201, DOC402). Where there is an
  ``Args:`` section, ruff's D417 asks for all arguments, and DOC103 here for none that are gone.
"""

import re
import subprocess
import sys

MOOT = {"DOC101", "DOC201", "DOC402", "DOC502"}
FACTORY = re.compile(r"(?:.*[._])?error$")  # argument_error, file.error, self._error


def is_moot(code: str, message: str) -> bool:
    """Whether a violation is none by our conventions."""
    if code == "DOC103":
        return "Arguments in the docstring but not in the function signature" not in message
    if code == "DOC503":
        documented, raised = (
            set(re.findall(r"'([^']*)'", part)) for part in message.split("in the body:", 1)
        )
        return {"ValueError" if FACTORY.match(name) else name for name in raised} <= documented
    return code in MOOT


def main() -> int:
    """Print what is left under the name of its file; the exit status."""
    command = [sys.executable, "-m", "pydoclint.main", "--quiet", *sys.argv[1:]]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    output = (run.stdout + run.stderr).splitlines()
    left, file, understood = 0, "", 0
    for line in output:
        violation = re.match(r"\s+(\d+): (DOC\d+): (.*)", line)
        if violation is None:
            file = line.strip() or file
            continue
        understood += 1
        number, code, message = violation.groups()
        if not is_moot(code, message):
            left += 1
            print(f"{file}:{number}: {code}: {message}")
    if run.returncode and not understood:  # not violations, but a crash or a wrong option
        print("\n".join(output))
        return run.returncode
    return min(left, 1)


if __name__ == "__main__":
    sys.exit(main())
