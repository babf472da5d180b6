"""docs/composition.md: what the laws found out about every member and every pair of members.

Write it anew with ``make composition``. Where the laws run in several processes, each writes its
findings to a folder, and the page is compared by a process that comes after them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/composition.md"
WRITE = "WRITE_COMPOSITION"
SHARED = "FINDINGS"  # names the folder

# (table, row, column) -> cell; filled by the tests as they pass
FINDINGS: dict[tuple[str, str, str], str] = {}

TABLES = (
    "Modules and datamodules",
    "Callbacks and modules",
    "Callbacks",
    "Callbacks and strategies",
    "Optimizers and modules",
    "Optimizers and strategies",
    "Modules and strategies",
    "Modules that know nothing of us",
    "Modules alone",
    "Datamodules alone",
    "Callbacks alone",
    "Optimizers alone",
)

# ruff: noqa: E501 (the lines of a page)
HEAD = """# What works with what

This page is written by the tests in `tests/laws`, which run every law over every member: adding an optimizer, a callback, a
strategy, a datamodule or a module to their lists tests it, alone and in pairs. `make composition` writes the page anew, and the
test suite fails where it differs from what the laws found.

The models are a GPT-2 in our modules and a hand-written LightningModule that knows nothing of this package; and a zoo of
LightningModules with one habit each (`tests/laws/zoo_rows.py`). The zoo is compared with plain Lightning under the same strategy,
without any class of ours, and under the pipeline with plain Lightning in one process: losses, all that is logged, weights.

| word | what a test has shown |
|---|---|
| exact | bit-identical: the same losses and final weights as without it, or as with `strategy="auto"` |
| resumes | a process killed with SIGKILL in mid-epoch or mid-accumulation, and resumed, ends bit-identical to one never stopped |
| equal | two ranks give the losses of one process with the same global batch, up to the order of summation (1e-5) |
| accumulates | micro-batches with unequal numbers of tokens give the losses of the one big batch (1e-5) |
| accumulates not | they do not, for the reason that stands behind it |
| any order | bit-identical whichever of the two callbacks comes first |
| own order | ExactResume draws the order of rows from (seed, epoch), so it is another one than plain Lightning's |
| ranks drift apart | what is thawed after DDP has wrapped the module is not averaged, in plain Lightning neither; a checkpoint has rank 0's |
| warns | trains, otherwise than one process by construction, and says so |
| refuses | raises at `setup`, before training, with the reason and the way out |
"""


def note(table: str, row: str, column: str, finding: str) -> None:
    """Keep a finding; called at the end of a test, so only by one that passed."""
    assert table in TABLES
    _add(FINDINGS, table, row, column, finding)
    if folder := shared_folder():
        folder.mkdir(exist_ok=True)
        # A file of tests runs in one process, so what is appended keeps its order.
        law = Path(os.environ["PYTEST_CURRENT_TEST"].partition("::")[0]).stem
        with (folder / f"{law}.jsonl").open("a") as file:
            file.write(json.dumps([table, row, column, finding]) + "\n")


def shared_folder() -> Path | None:
    """Where processes that run laws side by side leave their findings."""
    return Path(os.environ[SHARED]) if SHARED in os.environ else None


def collected(folder: Path) -> dict[tuple[str, str, str], str]:
    """What all processes have found, as one process that runs file after file would have it."""
    findings: dict[tuple[str, str, str], str] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            _add(findings, *json.loads(line))
    return findings


def _add(
    findings: dict[tuple[str, str, str], str], table: str, row: str, column: str, finding: str
) -> None:
    known = findings.get((table, row, column), "").split(", ")
    findings[table, row, column] = ", ".join(
        dict.fromkeys(filter(None, [*known, *finding.split(", ")]))
    )


def render(findings: Mapping[tuple[str, str, str], str]) -> str:
    """The page."""
    parts = [HEAD]
    for table in TABLES:
        cells = {key[1:]: cell for key, cell in findings.items() if key[0] == table}
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = list(dict.fromkeys(column for _, column in cells))
        if cells:
            lines = "\n".join(_lines(cells, rows, columns))
            parts.append(f"## {table}\n\n{lines}\n")
    return "\n".join(parts)


def read(page: str) -> dict[tuple[str, str, str], str]:
    """The findings that ``render`` made the page of."""
    findings = {}
    for section in page.split("\n## ")[1:]:
        table, *lines = section.splitlines()
        head, *body = [line[2:-2].split(" | ") for line in lines if line.startswith("| ")]
        for row, *cells in body:
            for column, cell in zip(head[1:], cells, strict=True):
                if cell:
                    findings[table, row, column] = cell
    return findings


def _lines(
    cells: Mapping[tuple[str, str], str], rows: Sequence[str], columns: Sequence[str]
) -> list[str]:
    head = ["", *columns]
    body = [[row, *(cells.get((row, column), "") for column in columns)] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in (head, *body)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def is_written_now() -> bool:
    """Whether the page is to be written instead of compared."""
    return bool(os.environ.get(WRITE))
