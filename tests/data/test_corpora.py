import lzma
import re

from lightning_align.data.corpora import EMBEDDED_CORPORA, embedded_path


def test_novel_ships_whole_and_falls_into_its_sixty_one_chapters() -> None:
    text = lzma.decompress(embedded_path("pride_and_prejudice").read_bytes()).decode("utf-8")
    assert text.startswith("PRIDE AND PREJUDICE")
    assert len(re.findall(r"(?m)^Chapter \d+$", text)) == 61
    # The title page stays with chapter 1: the pattern begins a document before each other chapter.
    pattern = re.compile(EMBEDDED_CORPORA["pride_and_prejudice"], re.MULTILINE)
    assert len(pattern.findall(text)) == 60
    assert 600_000 < len(text) < 800_000
