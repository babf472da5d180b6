"""``python -m lightning_align`` and ``lightning-align``: one word decides what is loaded."""

import sys
from collections.abc import Sequence

from lightning_align.cli.commands import COMMANDS
from lightning_align.cli.mistakes import PROGRAM, refusal, refusals_told


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ``args`` defaults to ``sys.argv[1:]``, and nothing shows the help."""
    arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
    name, rest = arguments[0], arguments[1:]
    if name in COMMANDS and name != "demo":
        run_command(name, rest)
        return
    from lightning_align.cli.app import AlignCLI  # seconds, for Lightning

    with refusals_told():
        if name == "demo":
            COMMANDS[name].load().main(rest, fit=AlignCLI)
        else:
            AlignCLI(arguments if args is not None or not sys.argv[1:] else None)


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run one of ``COMMANDS``; a mistake of the user's ends in its message, without a traceback.

    Raises:
        ValueError: If it is not about an argument.
    """
    try:
        COMMANDS[name].load().main(arguments)
    except ValueError as error:
        reason = refusal(error)
        if reason is None:
            raise
        sys.exit(f"{PROGRAM}: {reason}")


if __name__ == "__main__":
    main()
