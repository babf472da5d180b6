"""Tokens on disk: made once, memory-mapped ever after, never half.

A cache is a folder named after a hash of everything that decides its content, and written as a
whole (``whole_folder``). What a killed process leaves behind is swept by the next build. A cache
whose files do not fit its manifest (cut short, edited) is built anew.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error
from lightning_align.data.tokenize_corpus import Corpus, write_corpus
from lightning_align.data.whole_folder import DISK_FULL, MANIFEST, problem_of, write_whole

PATIENCE_S = 5.0  # waiting longer for another process is worth a word


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split, one document after the other, opened where they are first used.

    It travels to other processes as a path, not as tokens.
    """

    folder: Path
    split: str
    dtype: str
    num_tokens: int
    num_documents: int
    content: str  # hash of the tokens
    source_tokens: tuple[int, ...] = ()  # how many of them are from each file, in order

    @cached_property
    def tokens(self) -> NDArray[np.unsignedinteger[Any]]:
        """All tokens, memory-mapped."""
        return np.memmap(self.folder / f"{self.split}.tokens", dtype=self.dtype, mode="r")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Document i is ``tokens[offsets[i]:offsets[i + 1]]``, its end-of-text token included."""
        return np.memmap(self.folder / f"{self.split}.offsets", dtype=np.int64, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        opened = ("tokens", "offsets")
        return {name: value for name, value in self.__dict__.items() if name not in opened}


@dataclass(frozen=True)
class TokenCache:
    """The splits of a corpus, and the tokenizer if it was trained on it.

    Attributes:
        ending: What of a single document is held out, in words; None of several.
    """

    train: TokenSplit
    val: TokenSplit | None
    tokenizer_rules: str | None
    ending: str | None = None


def default_cache_dir() -> Path:
    """``$LIGHTNING_ALIGN_CACHE``, or else ``~/.cache/lightning_align``."""
    folder = os.environ.get("LIGHTNING_ALIGN_CACHE") or "~/.cache/lightning_align"
    return Path(folder).expanduser()


def prepare_token_cache(corpus: Corpus, cache_dir: Path) -> str:
    """Build the cache of ``corpus`` unless it is there; returns its key.

    Args:
        corpus: What to tokenise.
        cache_dir: Folder of all caches.

    Raises:
        ValueError: If a file is no text, nothing can be held out, or ``cache_dir`` is no folder.
        OSError: If the disk is full. Nothing of the new cache is left, the others are as they were.
    """
    key = corpus.key()
    folder = cache_dir / key
    if problem_of(folder, key) is None:
        return key
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"must be a folder that can be made ({error.strerror})"
        raise argument_error(corpus.where, "cache_dir", str(cache_dir), rule) from None
    # One process builds; another that wants the same waits and finds it done. The system gives the
    # lock back when its holder dies.
    with _lock(cache_dir / f"{key}.lock"):
        problem = problem_of(folder, key)
        if problem is None:
            return key
        if folder.exists():
            warnings.warn(f"token cache {folder}: {problem}; building it anew", stacklevel=2)
            shutil.rmtree(folder)
        _sweep(cache_dir, key)
        _build(corpus, key, folder)
    return key


def open_token_cache(where: str, cache_dir: Path, key: str) -> TokenCache:
    """Open what ``prepare_token_cache`` made.

    Args:
        where: Class the user called.
        cache_dir: Folder of all caches.
        key: What ``prepare_token_cache`` returned.

    Raises:
        ValueError: If this machine has no such cache.
    """
    folder = cache_dir / key
    problem = problem_of(folder, key, read_all=False)
    if problem is not None:
        rule = f"has no usable token cache {key} ({problem})"
        way_out = "Every node needs it: use a shared folder, or leave prepare_data_per_node=True"
        raise argument_error(where, "cache_dir", str(cache_dir), rule, way_out)
    manifest = json.loads((folder / MANIFEST).read_text())
    splits = {
        split: TokenSplit(
            folder=folder,
            split=split,
            dtype=manifest["dtype"],
            content=manifest["files"][f"{split}.tokens"]["hash"],
            **{**counts, "source_tokens": tuple(counts["source_tokens"])},
        )
        for split, counts in manifest["splits"].items()
    }
    trained = folder / "tokenizer.json"
    rules = trained.read_text(encoding="utf-8") if "tokenizer.json" in manifest["files"] else None
    return TokenCache(splits["train"], splits.get("val"), rules, manifest.get("ending"))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_S)
    except filelock.Timeout:
        warnings.warn(f"another process builds this token cache; waiting for {path}", stacklevel=3)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(corpus: Corpus, key: str, folder: Path) -> None:
    try:
        write_whole(folder, key, partial(write_corpus, corpus))
    except OSError as error:
        if error.errno in DISK_FULL:
            message = (
                f"{corpus.where}: the disk is full ({error.strerror}). No part of this token cache"
                " was kept; the others are intact. Free some space, or set cache_dir elsewhere"
            )
            raise OSError(error.errno, message, str(folder.parent)) from error
        raise


def _sweep(cache_dir: Path, key: str) -> None:
    """Remove what builds that died have left. The caller holds the lock of ``key``."""
    for temporary in cache_dir.glob("*.tmp"):
        if temporary.stem == key:
            shutil.rmtree(temporary)
            continue
        lock = filelock.FileLock(temporary.with_suffix(".lock"), blocking=False)
        try:
            with lock:
                shutil.rmtree(temporary, ignore_errors=True)
        except filelock.Timeout:
            pass  # its build is alive
