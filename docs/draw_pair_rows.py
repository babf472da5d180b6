"""Draws docs/images/pair_rows.svg: a row of two pairs, and which place sees which.

python docs/draw_pair_rows.py
"""

from pathlib import Path

# Tokens that both sequences of a pair have, that the chosen and that the rejected one has alone.
PAIRS = [(4, 3, 2), (2, 2, 3)]
COLOURS = ("#5b7fb5", "#4f9d69", "#d08a3e")  # shared, chosen, rejected
CELL, LEFT, TOP = 20, 96, 96


def places() -> list[tuple[int, int, int]]:
    """Pair, part and position of each place of the row, as in ``losses/pair_layout.py``."""
    row = []
    for pair, (shared, chosen, rejected) in enumerate(PAIRS):
        row += [(pair, 0, position) for position in range(shared)]
        row += [(pair, 1, shared + n) for n in range(chosen)]
        row += [(pair, 2, shared + n) for n in range(rejected)]
    return row


def sees(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
    """The mask's rule, without a window."""
    same_pair = query[0] == key[0]
    return same_pair and key[2] <= query[2] and key[1] in (0, query[1])


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    """Words at a point."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def square(x: float, y: float, colour: str) -> str:
    """A cell, with its upper left corner there."""
    side = CELL - 2
    return f'<rect x="{x + 1}" y="{y + 1}" width="{side}" height="{side}" fill="{colour}"/>'


def draw() -> str:
    """The row along both sides, the mask between: who stands on the left sees who stands above."""
    row = places()
    size = CELL * len(row)
    parts = [text(LEFT + size / 2, 18, "seen: pair, position"), text(14, TOP - 10, "sees", "start")]
    for index, (pair, part, position) in enumerate(row):
        x, y = LEFT + index * CELL, TOP + index * CELL
        middle_x, middle_y = x + CELL / 2, y + CELL / 2 + 4
        parts += [square(x, TOP - 28, COLOURS[part]), square(LEFT - 28, y, COLOURS[part])]
        parts += [text(middle_x, TOP - 50, "AB"[pair]), text(middle_x, TOP - 35, str(position))]
        parts += [text(LEFT - 52, middle_y, "AB"[pair]), text(LEFT - 38, middle_y, str(position))]
        for other, key in enumerate(row):
            colour = COLOURS[key[1]] if sees(row[index], key) else "#eeeeee"
            parts.append(square(LEFT + other * CELL, y, colour))
    names = ("shared", "chosen", "rejected")
    for number, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        x = LEFT + number * 90
        parts += [square(x, TOP + size + 12, colour), text(x + 24, TOP + size + 26, name, "start")]
    width, height = LEFT + size + 16, TOP + size + 44
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    style = 'font-family="sans-serif" font-size="11"'
    ground = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([f"{opening} {style}>", ground, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "images" / "pair_rows.svg").write_text(draw())
