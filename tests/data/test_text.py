import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.text import (
    LOOKAHEAD,
    check_pattern,
    cut_into_pieces,
    find_sources,
    split_before,
)

CHAPTER = re.compile(r"^Chapter \d+$", re.MULTILINE)
lines = st.sampled_from(["Chapter 1", "Chapter 22", "Chapter x", "", " ", "word " * 40, "é" * 99])


def pieces(paths, document_pattern=None):
    sources = find_sources("TextDataModule", "paths", str(paths), document_pattern, "text")
    return [piece for source in sources for piece in source.pieces()]


def documents(paths, document_pattern=None):
    joined, document = [], ""
    for piece in pieces(paths, document_pattern):
        document += piece.text
        if piece.ends_document:
            joined.append(document)
            document = ""
    assert document == "", "the last piece ends a document"
    return joined


@settings(deadline=None)
@given(st.lists(lines, max_size=400), st.lists(st.integers(1, 9000), min_size=1))
def test_splitting_does_not_depend_on_how_the_text_arrives(text_lines, sizes):
    text = "\n".join(text_lines)
    starts = [0] + [match.start() for match in CHAPTER.finditer(text) if match.start()]
    expected = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True) if b > a]

    chunks, begin = [], 0
    for i in range(len(text)):
        size = sizes[i % len(sizes)]
        chunks.append(text[begin : begin + size])
        begin += size
        if begin >= len(text):
            break
    assert list(split_before(chunks, CHAPTER)) == expected


def test_a_match_across_two_chunks_is_found():
    text = "x" * (LOOKAHEAD + 10) + "\nChapter 12\n" + "y" * 2 * LOOKAHEAD
    begin = text.index("Chapter")
    for cut in range(begin - 2, begin + 12):
        assert list(split_before([text[:cut], text[cut:]], CHAPTER)) == [text[:begin], text[begin:]]


def test_what_only_looks_like_a_match_at_the_end_of_a_chunk_is_none():
    text = "x" * 2 * LOOKAHEAD + "\nChapter 12 was long\n" + "y" * 2 * LOOKAHEAD
    cut = text.index("12") + 2
    assert list(split_before([text[:cut], text[cut:]], CHAPTER)) == [text]


@settings(deadline=None)
@given(st.text(alphabet="ab \n", min_size=1, max_size=300), st.integers(1, 50), st.integers(1, 70))
def test_pieces_are_the_document(text, size, chunk):
    chunks = [text[i : i + chunk] for i in range(0, len(text), chunk)]
    cut = list(cut_into_pieces(chunks, size))
    assert all(0 < len(piece.text) <= size for piece in cut)
    assert [piece.ends_document for piece in cut] == [False] * (len(cut) - 1) + [True] * bool(cut)
    joined = "".join(piece.text for piece in cut)
    assert text.endswith(joined)
    assert joined.lstrip() == text.lstrip(), "only white space before the text may be missing"


def test_long_documents_are_cut_where_byte_level_tokens_do_not_change():
    from lightning_align.data.tokenizer import encode, train_tokenizer

    words = ("Mr. Bennet,  replied\nthat he\n\n   had not; \t 1813.\r\nNaïve—or? " * 400).split("q")
    text = "".join(words)
    tokenizer = train_tokenizer([text], 400)
    cut = [piece.text for piece in cut_into_pieces([text], 5000)]
    assert len(cut) > 3
    [whole] = encode(tokenizer, [text])
    assert [i for ids in encode(tokenizer, cut) for i in ids] == whole


def test_a_text_without_any_safe_place_is_still_cut():
    cut = list(cut_into_pieces(["a" * 30_000], 10_000))
    assert [len(piece.text) for piece in cut] == [10_000] * 3


def test_a_txt_file_is_a_document_unless_a_pattern_splits_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Title\nChapter 1\none\nChapter 2\ntwo\n")
    assert documents(path) == [path.read_text()]
    split = ["Title\n", "Chapter 1\none\n", "Chapter 2\ntwo\n"]
    assert documents(path, r"^Chapter \d+$") == split


def test_a_jsonl_line_is_a_document_and_blank_ones_are_left_out(tmp_path):
    texts = ["one", "", "two\n\ntwo", " \n"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert documents(path) == ["one", "two\n\ntwo"]


def test_the_documents_of_the_embedded_novel_are_its_61_chapters():
    chapters = documents("pride_and_prejudice")
    assert len(chapters) == 61
    assert chapters[0].startswith("PRIDE AND PREJUDICE")
    assert all(re.match(rf"Chapter {i}\n", text) for i, text in enumerate(chapters[1:], start=2))
    assert sum(map(len, chapters)) > 680_000


@pytest.mark.parametrize("content", ["", " \n\n", "\n" * 1_100_000])
def test_an_empty_file(tmp_path, content):
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name}'\): is empty, and must hold text"):
            pieces(tmp_path / name)


def test_another_kind_of_file(tmp_path):
    (tmp_path / "a.pdf.gz").write_text("x")
    with pytest.raises(ValueError, match=r"a\.pdf\.gz'\): .* must end in \.txt, \.jsonl, "):
        pieces(tmp_path / "a.pdf.gz")


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(ValueError, match=r"TextDataModule\(document_pattern='\('\)"):
        check_pattern("TextDataModule", "(")
