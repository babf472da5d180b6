"""The texts that ship inside the package, so that examples and tests need no network.

*Pride and Prejudice* (Jane Austen, 1813) is in the public domain; the text is Project Gutenberg's,
as redistributed in the R package janeaustenr (MIT).
"""

from __future__ import annotations

from pathlib import Path

# Name of the corpus -> the pattern before which its documents begin. The title page stays with the
# first chapter: as a document of its own it would be one of the few to hold out.
EMBEDDED_CORPORA = {"pride_and_prejudice": r"^Chapter (?!1$)\d+$"}


def embedded_path(name: str) -> Path:
    """Where the compressed text of an embedded corpus lies."""
    return Path(__file__).parent / "corpora" / f"{name}.txt.xz"
