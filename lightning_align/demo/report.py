"""The demo's report as plain text: what changed, number by number, and a sample of each model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lightning_align._errors import argument_error

Value = float | int | str | None


def before_after_table(
    rows: Sequence[Sequence[Value]],
    headers: Sequence[str] = ("", "before", "after"),
) -> str:
    """Aligned columns, names on the left, numbers on the right; ends with a newline.

    Args:
        rows: For instance ``("validation perplexity", 43.21, 44.02)``; None is a dash.
        headers: One title per column.

    Raises:
        ValueError: If a row has another number of columns than ``headers``.

    Example:
        >>> print(before_after_table([("validation perplexity", 43.214, 44.02)]))
                               before  after
        ------------------------------------
        validation perplexity   43.21  44.02
        <BLANKLINE>
    """
    for row in rows:
        if len(row) != len(headers):
            rule = f"every row must have {len(headers)} columns"
            raise argument_error("before_after_table", "rows", row, rule)
    cells = [list(headers), *(list(map(format_value, row)) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "".join(f"{line.rstrip()}\n" for line in lines)


def format_value(value: Value) -> str:
    """Four significant digits, thousands separated, text as it is, None a dash."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def sample_block(prompt: str, samples: Sequence[tuple[str, str]], *, width: int = 88) -> str:
    """A prompt and what each model made of it, titled, wrapped and indented; ends with a newline.

    Args:
        prompt: The text that every sample continues.
        samples: Pairs of title and continuation, for instance ``("before", " it was a truth")``.
        width: Characters per line at most.
    """
    blocks = [("prompt", prompt), *samples]
    return "".join(f"{title}\n{_indented(text, width)}\n" for title, text in blocks)


def _indented(text: str, width: int) -> str:
    # A small model's bytes may hold anything, and a terminal obeys control characters.
    printable = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    paragraphs = [line for line in printable.splitlines() if line.strip()] or ["(empty)"]
    wrapper = textwrap.TextWrapper(width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(map(wrapper.fill, paragraphs))
