"""``python -m lightning_align`` and ``lightning-align``: one word decides what is loaded."""

import sys
from collections.abc import Sequence

from lightning_align.commands import COMMANDS


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ``args`` defaults to ``sys.argv[1:]``, and nothing shows the help."""
    arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
    name, rest = arguments[0], arguments[1:]
    if name in COMMANDS and name != "demo":
        COMMANDS[name].load().main(rest)
        return
    from lightning_align.cli import AlignCLI  # seconds, for Lightning

    if name == "demo":
        COMMANDS[name].load().main(rest, fit=AlignCLI)
    else:
        AlignCLI(arguments if args is not None or not sys.argv[1:] else None)


if __name__ == "__main__":
    main()
