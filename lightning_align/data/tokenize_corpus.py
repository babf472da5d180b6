"""A corpus of text files becomes files of tokens: split, tokenizer, tokens, one pass each.

No pass holds more than some megabytes of text, so a corpus may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_align.data.files import CHUNK
from lightning_align.data.held_out import draw_held_out
from lightning_align.data.last_paragraphs import Ending, find_ending, part_ending
from lightning_align.data.text import Piece, TextSource
from lightning_align.data.tokenizer import encode, tokenizer_fingerprint, train_tokenizer
from lightning_align.data.whole_folder import FileWriter

SCHEMA = 2  # raise it when what a cache holds, or how text becomes tokens, changes
BATCH_PIECES = 4096  # pieces tokenised at once, if they are short
BAR_DELAY_S = 2.0  # what takes less needs no progress bar


@dataclass(frozen=True)
class Corpus:
    """What is to be tokenised, with what, and what of it is held out.

    Args:
        where: Class the user called.
        train: Files to learn from.
        val: Files held out; if there are none, a part of the documents of ``train`` is, or the
            last paragraphs of a single one.
        val_fraction: That part, in [0, 1).
        seed: Draws the held-out documents.
        tokenizer: A transformers tokenizer, or None to train one on what is not held out.
        vocab_size: Largest number of tokens of a trained tokenizer.
    """

    where: str
    train: tuple[TextSource, ...]
    val: tuple[TextSource, ...]
    val_fraction: float
    seed: int
    tokenizer: Any
    vocab_size: int

    def key(self) -> str:
        """Hash of all that decides the tokens: the bytes of the files, the tokenizer, the split."""
        contents = [
            [(source.file.content_hash(), *source.settings) for source in sources]
            for sources in (self.train, self.val)
        ]
        trained = f"byte-level BPE {self.vocab_size}"
        rules = trained if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)
        split = None if self.val else (self.val_fraction, self.seed)
        content = json.dumps([SCHEMA, contents, rules, split])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class LabelledPiece(NamedTuple):
    """A piece, the split it belongs to, and the number of its file among those of the split."""

    split: str
    source: int
    piece: Piece


@dataclass(frozen=True)
class Plan:
    """What is held out, and how much text there is in all.

    Attributes:
        held_out: One flag per document of ``train``.
        ending: What is held out of a single document.
        num_characters: Of all documents.
    """

    held_out: NDArray[np.bool_]
    ending: Ending | None
    num_characters: int


class SplitWriter:
    """Writes the tokens of a split and where each of its documents ends."""

    def __init__(self, folder: Path, split: str, num_sources: int, dtype: np.dtype[Any]) -> None:
        self.split = split
        self.source_tokens = [0] * num_sources
        self.num_tokens = 0
        self.num_documents = 0
        self._dtype = dtype
        self._tokens = FileWriter(folder / f"{split}.tokens")
        self._offsets = FileWriter(folder / f"{split}.offsets")
        self._offsets.write(np.int64(0).tobytes())

    def add(self, source: int, ids: list[int], ends_document: bool) -> None:
        """Append the tokens of a piece of that file."""
        self._tokens.write(np.array(ids, self._dtype).tobytes())
        self.source_tokens[source] += len(ids)
        self.num_tokens += len(ids)
        if ends_document:
            self.num_documents += 1
            self._offsets.write(np.int64(self.num_tokens).tobytes())

    def close(self) -> dict[str, dict[str, Any]]:
        """Force the files to the disk; returns what a manifest says about each."""
        return {
            f"{self.split}.tokens": self._tokens.close(),
            f"{self.split}.offsets": self._offsets.close(),
        }


def write_corpus(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Tokenise ``corpus`` into files under ``folder``; returns the manifest, still to be written.

    Raises:
        ValueError: If a file is no text, or nothing can be held out.
    """
    plan = _plan(corpus)
    files = {}
    tokenizer = corpus.tokenizer
    if tokenizer is None:
        tokenizer = _train(corpus, plan)
        rules = FileWriter(folder / "tokenizer.json")
        rules.write(tokenizer.backend_tokenizer.to_str().encode())
        files["tokenizer.json"] = rules.close()
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    splits = ["train", "val"] if corpus.val or plan.ending or plan.held_out.any() else ["train"]
    num_sources = {"train": len(corpus.train), "val": len(corpus.val or corpus.train)}
    writers = {split: SplitWriter(folder, split, num_sources[split], dtype) for split in splits}
    with _progress("Tokenising", plan.num_characters) as bar:
        for batch in _batches(_labelled_pieces(corpus, plan)):
            texts = [piece.text for _, _, piece in batch]
            for (split, source, piece), ids in zip(batch, encode(tokenizer, texts), strict=True):
                end = [tokenizer.eos_token_id] if piece.ends_document else []
                writers[split].add(source, ids + end, piece.ends_document)
            bar.update(sum(map(len, texts)))
    for writer in writers.values():
        files |= writer.close()
    counts = {
        split: {
            "num_tokens": writer.num_tokens,
            "num_documents": writer.num_documents,
            "source_tokens": writer.source_tokens,
        }
        for split, writer in writers.items()
    }
    manifest = {"dtype": dtype.name, "splits": counts, "files": files}
    return manifest | ({"ending": str(plan.ending)} if plan.ending else {})


def _plan(corpus: Corpus) -> Plan:
    """What is to be done.

    Reads everything once: what is wrong with a file is found before anything expensive begins.
    """
    num_documents = num_characters = 0
    for source in corpus.train:
        for piece in source.pieces():
            num_documents += piece.ends_document
            num_characters += len(piece.text)
    for source in corpus.val:
        num_characters += sum(len(piece.text) for piece in source.pieces())
    fraction = 0.0 if corpus.val else corpus.val_fraction
    if num_documents == 1 and fraction > 0:
        pieces = (piece for source in corpus.train for piece in source.pieces())
        ending = find_ending(corpus.where, pieces, fraction)
        return Plan(np.zeros(1, dtype=np.bool_), ending, num_characters)
    held_out = draw_held_out(
        corpus.where, num_documents, fraction, corpus.seed, what="documents", way_out=""
    )
    return Plan(held_out, None, num_characters)


def _train(corpus: Corpus, plan: Plan) -> Any:
    with _progress("Reading text to train a tokenizer", plan.num_characters) as bar:

        def texts() -> Iterator[str]:
            for split, _, piece in _labelled_pieces(corpus, plan):
                if split == "train":
                    yield piece.text
                bar.update(len(piece.text))

        return train_tokenizer(texts(), corpus.vocab_size)


def _labelled_pieces(corpus: Corpus, plan: Plan) -> Iterator[LabelledPiece]:
    document = 0
    for number, source in enumerate(corpus.train):
        if plan.ending is not None:
            for split, piece in part_ending(source.pieces(), plan.ending.begin):
                yield LabelledPiece(split, number, piece)
            continue
        for piece in source.pieces():
            split = "val" if plan.held_out[document] else "train"
            yield LabelledPiece(split, number, piece)
            document += piece.ends_document
    for number, source in enumerate(corpus.val):
        for piece in source.pieces():
            yield LabelledPiece("val", number, piece)


def _batches(pieces: Iterable[LabelledPiece]) -> Iterator[list[LabelledPiece]]:
    batch: list[LabelledPiece] = []
    num_characters = 0
    for labelled in pieces:
        batch.append(labelled)
        piece = labelled.piece
        num_characters += len(piece.text)
        if num_characters >= CHUNK or len(batch) >= BATCH_PIECES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _progress(what: str, num_characters: int) -> Any:
    return tqdm(desc=what, total=num_characters, unit="char", unit_scale=True, delay=BAR_DELAY_S)
