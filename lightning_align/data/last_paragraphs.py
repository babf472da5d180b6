"""What is held out of a single document: its last paragraphs, since there is no other document."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lightning_align._errors import argument_error
from lightning_align.data.text import Piece

# Where one begins, between what is not blank.
BEGINS = {
    "paragraph": re.compile(r"(?<=\S)[^\S\n]*\n[^\S\n]*\n\s*(?=\S)"),
    "line": re.compile(r"(?<=\S)[^\S\n]*\n\s*(?=\S)"),
}
NEAR = 2  # paragraphs may be this many times more or less than asked for, or else lines are taken


class Ending(NamedTuple):
    """The end of a document that is held out."""

    begin: int  # characters before it
    share: float  # of all characters
    number: int  # of paragraphs or lines
    unit: str

    def __str__(self) -> str:
        plural = "s" if self.number > 1 else ""
        return f"its last {self.number} {self.unit}{plural} ({self.share:.1%} of its characters)"


def find_ending(where: str, pieces: Iterable[Piece], val_fraction: float) -> Ending:
    """The whole paragraphs that are about ``val_fraction`` of a document, or whole lines.

    Args:
        where: Class the user called.
        pieces: The document; its paragraphs begin inside of pieces, not between them.
        val_fraction: Part to hold out, above 0 and below 1.

    Raises:
        ValueError: If the document is a single line.
    """
    size, begins = 0, {unit: array("q") for unit in BEGINS}
    for piece in pieces:
        for unit, pattern in BEGINS.items():
            begins[unit].extend(size + match.end() for match in pattern.finditer(piece.text))
        size += len(piece.text)
    found = [
        _nearest(unit, places, size, val_fraction) for unit, places in begins.items() if places
    ]
    if not found:
        rule = "holds out whole documents, or of a single one its end, and it is but one line"
        way_out = "Set val_paths, or val_fraction=0"
        raise argument_error(where, "val_fraction", val_fraction, rule, way_out)
    near = (end for end in found if 1 / NEAR <= end.share / val_fraction <= NEAR)
    return next(near, found[-1])


def part_ending(pieces: Iterable[Piece], begin: int) -> Iterator[tuple[str, Piece]]:
    """The pieces of a document, each with its split: "train" before a character, then "val".

    Args:
        pieces: The document.
        begin: Characters before what is held out.
    """
    read = 0
    for piece in pieces:
        cut = begin - read
        read += len(piece.text)
        if 0 < cut <= len(piece.text):
            yield "train", Piece(piece.text[:cut], ends_document=True)
            if cut < len(piece.text):
                yield "val", Piece(piece.text[cut:], piece.ends_document)
        else:
            yield "train" if cut > 0 else "val", piece


def _nearest(unit: str, places: array[int], size: int, val_fraction: float) -> Ending:
    target = (1 - val_fraction) * size
    right = bisect_left(places, target)
    nearest = min(places[max(right - 1, 0) : right + 1], key=lambda place: abs(place - target))
    number = len(places) - bisect_left(places, nearest)
    return Ending(nearest, 1 - nearest / size, number, unit)
