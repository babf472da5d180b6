"""Draw docs/imports.svg: the rooms of the package and which room really imports which.

Rows are the layers of the import-linter contract in pyproject.toml, arrows come from the code.
Those that other arrows imply are left out, and so are those that nearly every room has. `mkdocs
build` runs this as a hook, so the picture cannot go stale; by hand: `python docs/draw_imports.py`.
"""

import io
import re
from pathlib import Path

import grimp
import matplotlib as mpl
import tomllib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "imports.svg"
PACKAGE = "lightning_align"
EVERYWHERE = {
    "_errors",
    "_lazy",
    "_moved",
}  # their arrows would hide the others
ENTRY = "__main__"  # only calls cli

Position = tuple[float, float]


def rooms_by_layer(present: set[str]) -> list[list[str]]:
    """Rooms of each layer that exist, the highest layer first, as the contract lists them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    rows = next(c["layers"] for c in settings["contracts"] if c["type"] == "layers")
    named = [[room for room in re.findall(r"\w+", row) if room in present] for row in rows]
    return [row for row in named if row]


def room_imports() -> tuple[set[str], set[tuple[str, str]]]:
    """All rooms, and the pairs (importer, imported) of rooms, from the code."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    room_of = {module: module.split(".")[1] for module in graph.modules if "." in module}
    room_of.pop(f"{PACKAGE}.{ENTRY}", None)
    pairs = {
        (room_of[importer], room_of[imported])
        for importer in room_of
        for imported in graph.find_modules_directly_imported_by(importer)
        if imported in room_of
    }
    return set(room_of.values()), {(a, b) for a, b in pairs if a != b and b not in EVERYWHERE}


def without_implied(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that no longer path through other pairs connects."""

    def reaches(start: str, end: str) -> bool:
        return any(b == end or reaches(b, end) for a, b in pairs if a == start)

    return {
        (a, c) for a, c in pairs if not any(reaches(b, c) for a2, b in pairs if a2 == a and b != c)
    }


def place(rows: list[list[str]]) -> dict[str, Position]:
    """Centre of each room. Neighbouring rows are shifted, so that few arrows run through a box."""
    positions = {}
    for height, row in enumerate(reversed(rows)):
        shift = 0.0 if len(row) > 1 else (0.45 if height % 2 else -0.45)
        for column, room in enumerate(row):
            positions[room] = (2.4 * (column - (len(row) - 1) / 2) + shift, float(height))
    return positions


def draw_arrow(axes: Axes, start: Position, end: Position) -> None:
    """A thin curve between two boxes; the farther apart the layers, the more it bows outwards."""
    bow = 0.12 * (start[1] - end[1] - 1) * (1 if start[0] + end[0] >= 0 else -1)
    axes.annotate(
        "",
        xy=(end[0], end[1] + 0.24),
        xytext=(start[0], start[1] - 0.24),
        arrowprops={
            "arrowstyle": "-|>",
            "color": "#7986cb",
            "linewidth": 1.0,
            "connectionstyle": f"arc3,rad={-bow:.2f}",
        },
    )


def draw() -> str:
    """The picture as SVG text, the same bytes for the same imports."""
    present, pairs = room_imports()
    positions = place(rooms_by_layer(present))
    figure = Figure(figsize=(8, 1 + 0.85 * (1 + max(y for _, y in positions.values()))))
    axes = figure.add_axes((0, 0, 1, 1))
    for importer, imported in sorted(without_implied(pairs)):
        draw_arrow(axes, positions[importer], positions[imported])
    for room, (x, y) in positions.items():
        box = {"boxstyle": "round,pad=0.45", "facecolor": "#e8eaf6", "edgecolor": "#3f51b5"}
        axes.text(x, y, room, ha="center", va="center", fontsize=12, family="monospace", bbox=box)
    axes.set_xlim(-4.2, 4.2)
    axes.set_ylim(-0.6, max(y for _, y in positions.values()) + 0.6)
    axes.set_axis_off()
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "imports", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def on_pre_build(config: object) -> None:  # noqa: ARG001
    """Mkdocs hook: bring the picture up to date."""
    text = draw()
    if not PICTURE.exists() or PICTURE.read_text() != text:
        PICTURE.write_text(text)


if __name__ == "__main__":
    on_pre_build(None)
