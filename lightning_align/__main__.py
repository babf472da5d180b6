"""``python -m lightning_align`` and ``lightning-align``: one word decides what is loaded."""

import sys
from collections.abc import Sequence

from lightning_align.cli.commands import COMMANDS, overview
from lightning_align.cli.failures import debug_if_asked, readers_may_leave, refusals_told
from lightning_align.cli.mistakes import PROGRAM


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ``args`` defaults to ``sys.argv[1:]``, and nothing shows the help."""
    words = sys.argv[1:] if args is None else args
    with readers_may_leave(), debug_if_asked(words) as arguments:
        name, rest = (arguments or ["--help"])[0], arguments[1:]
        if name in ("-h", "--help"):
            print(overview(), end="")  # noqa: T201
            sys.exit(0)
        if name in COMMANDS:
            run_command(name, rest)
            return
        from lightning_align.cli.app import run_program  # seconds, for Lightning

        with refusals_told(PROGRAM):
            # A process that Lightning starts for another rank reads sys.argv, too.
            run_program(arguments if args is not None else None)


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run one of ``COMMANDS``; a mistake of the user's ends in its message, without a traceback."""
    with refusals_told(PROGRAM):
        COMMANDS[name].load().main(arguments)


if __name__ == "__main__":
    main()
