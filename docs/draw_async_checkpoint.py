"""Draw docs/images/async_checkpoint.png: how long training waits for a save, of each side.

By hand: `python docs/draw_async_checkpoint.py`. The figures are those of the first table of
`benchmarks/checkpoint/blocking.py` in benchmarks/RESULTS.md, read from there.
"""

import re
from pathlib import Path

from lightning_align.figure import new_figure

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "RESULTS.md"
PICTURE = HERE / "images" / "async_checkpoint.png"
SIDES = {
    "`SnapshotEngine`": "AsyncCheckpoint",
    "one memcpy, one block": "one memcpy of as much",
    "DCP `async_save`, thread, stager used again": "DCP async_save",
    "Lightning's `AsyncCheckpointIO`": "AsyncCheckpointIO",
    "`TorchCheckpointIO`, synchronous": "synchronous",
}
CELL = re.compile(r"([\d,.]+) \[([\d,.]+), ([\d,.]+)\]")


def waits() -> dict[str, tuple[float, float, float]]:
    """Median, lowest and highest wait in ms for the AdamW state of a Llama, by side."""
    text = RESULTS.read_text()
    table = text[text.index("`python benchmarks/checkpoint/blocking.py --rounds 7`") :]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    cells = {row[0]: CELL.search(row[2]) for row in reversed(rows) if len(row) == 4}
    found = {}
    for side in SIDES:
        match = cells[side]
        assert match is not None, side
        median, low, high = (float(number.replace(",", "")) for number in match.groups())
        found[side] = (median, low, high)
    return found


def main() -> None:
    """Draw a bar for each side, with its lowest and highest figure."""
    measured = waits()
    figure = new_figure(7, 2.6)
    axes = figure.subplots()
    for place, (side, (median, low, high)) in enumerate(measured.items()):
        color = "C0" if place == 0 else "0.7"
        spread = [[median - low], [high - median]]
        axes.barh(place, median, color=color, xerr=spread, ecolor="0.3", capsize=3)
        axes.text(high + 12, place, f"{median:.3g} ms", va="center")
        print(f"{SIDES[side]:24} {median} [{low}, {high}]")  # noqa: T201
    axes.set_yticks(range(len(SIDES)), SIDES.values())
    axes.invert_yaxis()
    axes.set_xlim(0, 1150)
    axes.set_xlabel("training waits, ms, for a state of 245 MB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
