"""What decides the tokens of a corpus, and what is written about them."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from lightning_align.data.paths import find_files
from lightning_align.data.text import TextSource
from lightning_align.data.tokenize_corpus import Corpus, SplitWriter, write_corpus
from tests.helpers.byte_tokenizer import ByteTokenizer


def sources(tmp_path, **texts):
    for name, lines in texts.items():
        rows = "".join(f'{{"text": "{line}"}}\n' for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    paths = [str(tmp_path / f"{name}.jsonl") for name in texts]
    return tuple(TextSource(file, None, "text") for file in find_files("Here", "paths", paths))


@pytest.fixture
def corpus(tmp_path):
    train = sources(tmp_path, a=["one", "two"], b=["three"])
    val = sources(tmp_path, c=["four"])
    return Corpus("Here", train, val, 0.0, 0, ByteTokenizer(), 300)


def test_worked_corpus(tmp_path, corpus):
    manifest = write_corpus(corpus, tmp_path)
    assert manifest["dtype"] == "uint16"
    train = manifest["splits"]["train"]
    assert train == {"num_tokens": 14, "num_documents": 3, "source_tokens": [8, 6]}
    tokens = np.fromfile(tmp_path / "train.tokens", np.uint16)
    ends = np.flatnonzero(tokens == 0) + 1
    assert [0, *ends] == np.fromfile(tmp_path / "train.offsets", np.int64).tolist()
    assert bytes((tokens[tokens > 0] - 2).tolist()) == b"onetwothree"


def test_the_manifest_has_size_and_hash_of_each_file(tmp_path, corpus):
    for name, about in write_corpus(corpus, tmp_path)["files"].items():
        content = (tmp_path / name).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        assert about == {"size": len(content), "hash": digest}


def test_the_key_follows_split_and_tokenizer(corpus):
    others = [
        replace(corpus, val=()),
        replace(corpus, val=(), val_fraction=0.5),
        replace(corpus, val=(), val_fraction=0.5, seed=1),
        replace(corpus, tokenizer=ByteTokenizer(300)),
        replace(corpus, tokenizer=None),
        replace(corpus, tokenizer=None, vocab_size=400),
        replace(corpus, train=corpus.train[:1]),
    ]
    assert len({one.key() for one in [corpus, *others]}) == len(others) + 1
    assert replace(corpus, val_fraction=0.5, seed=1).key() == corpus.key(), "val needs no draw"


def test_nothing_can_be_held_out_of_one_line(tmp_path, corpus):
    alone = replace(corpus, train=corpus.train[1:], val=(), val_fraction=0.5)
    with pytest.raises(ValueError, match=r"val_fraction=0\.5\): .* it is but one line\. Set val_p"):
        write_corpus(alone, tmp_path)


def test_of_one_document_the_last_paragraphs_are_held_out(tmp_path, corpus):
    text = r"one\n\ntwo\n\nthree\n\nfour"
    alone = replace(corpus, train=sources(tmp_path, d=[text]), val=(), val_fraction=0.25)
    manifest = write_corpus(alone, tmp_path)
    assert manifest["ending"] == "its last 1 paragraph (19.0% of its characters)"
    parts = []
    for split in ("train", "val"):
        tokens = np.fromfile(tmp_path / f"{split}.tokens", np.uint16)
        assert tokens[-1] == 0
        assert manifest["splits"][split]["num_documents"] == 1
        parts.append(bytes((tokens[:-1] - 2).tolist()))
    assert parts == [b"one\n\ntwo\n\nthree\n\n", b"four"]


def test_a_writer_says_what_it_wrote(tmp_path):
    split = SplitWriter(tmp_path, "train", 2, np.dtype(np.uint32))
    split.add(0, [1, 2], ends_document=False)
    split.add(1, [3], ends_document=True)
    assert (split.num_tokens, split.num_documents, split.source_tokens) == (3, 1, [2, 1])
    assert split.close()["train.offsets"]["size"] == 16
