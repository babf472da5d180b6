import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.last_paragraphs import find_ending, part_ending
from lightning_align.data.text import Piece


def pieces(*texts):
    return [Piece(text, number == len(texts)) for number, text in enumerate(texts, start=1)]


def ending(text, fraction=0.1):
    found = find_ending("Here", pieces(text), fraction)
    return text[found.begin :], str(found)


def test_whole_paragraphs_of_about_the_share():
    text = "\n\n".join(f"Paragraph {number:2}." for number in range(20))
    assert ending(text) == (
        "Paragraph 18.\n\nParagraph 19.",
        "its last 2 paragraphs (9.4% of its characters)",
    )


def test_blank_lines_may_hold_spaces_and_close_the_text():
    assert ending("a b\n \t\n\n  c d\r\n\r\ne\n\n", 0.3)[0] == "e\n\n"


def test_lines_where_paragraphs_are_too_large():
    text = "A title\n\n" + "\n".join(f"line {number}" for number in range(10, 30))
    assert ending(text) == (
        "line 28\nline 29",
        "its last 2 lines (8.9% of its characters)",
    )


def test_something_is_held_out_and_not_all():
    assert ending("a\nb", 0.001)[0] == ending("a\nb", 0.999)[0] == "b"


@pytest.mark.parametrize("text", ["one line", "one line\n\n \n", "\n\n one line"])
def test_a_single_line(text):
    message = r"Here\(val_fraction=0\.1\): .*, and it is but one line\. Set val_paths, or val_fr"
    with pytest.raises(ValueError, match=message):
        ending(text)


@settings(deadline=None)
@given(st.lists(st.text("ab \n", min_size=1, max_size=9), min_size=1, max_size=9), st.data())
def test_parts_are_the_document(texts, data):
    document = "".join(texts)
    begin = data.draw(st.integers(1, len(document)))
    parts = list(part_ending(pieces(*texts), begin))
    for split, text in (("train", document[:begin]), ("val", document[begin:])):
        found = [piece for name, piece in parts if name == split]
        assert "".join(piece.text for piece in found) == text
        ends = [piece.ends_document for piece in found]
        assert ends == [False] * (len(found) - 1) + [True] * bool(found)
