import dataclasses
import json
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
import tracemalloc
import warnings
from contextlib import contextmanager

import filelock
import numpy as np
import pytest

from lightning_align.data.text import find_sources
from lightning_align.data.token_cache import (
    default_cache_dir,
    open_token_cache,
    prepare_token_cache,
)
from lightning_align.data.tokenize_corpus import Corpus
from lightning_align.data.tokenizer import encode, train_tokenizer, trained_tokenizer
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.small_disk import small_disk  # noqa: F401

fork = multiprocessing.get_context("fork")
TEXTS = [f"Document {i}: " + "word " * i for i in range(20)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def corpus(paths, tokenizer=None, val_paths=None, pattern=None, **changes):
    val = find_sources("X", "val_paths", val_paths, pattern, "text") if val_paths else []
    return Corpus(
        **{
            "where": "X",
            "train": tuple(find_sources("X", "paths", paths, pattern, "text")),
            "val": tuple(val),
            "val_fraction": 0.25,
            "seed": 0,
            "tokenizer": tokenizer,
            "vocab_size": 280,
            **changes,
        }
    )


@pytest.fixture
def texts(tmp_path):
    return corpus(write_jsonl(tmp_path / "texts.jsonl", TEXTS), ByteTokenizer())


@pytest.fixture
def cache_dir(tmp_path):
    return tmp_path / "cache"


def build(wanted, cache_dir):
    return open_token_cache("X", cache_dir, prepare_token_cache(wanted, cache_dir))


def documents(split, tokenizer):
    """The documents as text, each checked to be closed by exactly one end-of-text token."""
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    found = [split.tokens[begin:end] for begin, end in bounds]
    assert len(found) == split.num_documents
    assert sum(map(len, found)) == split.num_tokens == len(split.tokens)
    for ids in found:
        assert list(np.flatnonzero(ids == tokenizer.eos_token_id)) == [len(ids) - 1]
    return [tokenizer.decode(ids[:-1]) for ids in found]


def test_every_document_once_and_whole(texts, cache_dir):
    cache = build(texts, cache_dir)
    train, val = (documents(split, texts.tokenizer) for split in (cache.train, cache.val))
    assert len(val) == 5
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train], "documents keep their order"


def test_val_paths_are_the_validation_split(tmp_path, cache_dir):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [TEXTS[i]]) for i in (3, 4)]
    cache = build(corpus(paths[0], ByteTokenizer(), paths[1]), cache_dir)
    assert documents(cache.train, ByteTokenizer()) == [TEXTS[3]]
    assert documents(cache.val, ByteTokenizer()) == [TEXTS[4]]


def test_no_validation(texts, cache_dir):
    cache = build(dataclasses.replace(texts, val_fraction=0), cache_dir)
    assert documents(cache.train, texts.tokenizer) == TEXTS
    assert cache.val is None


def test_the_manifest_says_how_many_tokens_are_from_which_file(tmp_path, cache_dir):
    counts = (3, 1, 5)
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", ["x" * n, "y" * n]) for n in counts]
    val = [write_jsonl(tmp_path / "val.jsonl", ["z"]), paths[0]]
    cache = build(corpus(paths, ByteTokenizer(), val), cache_dir)
    assert cache.train.source_tokens == tuple(2 * (n + 1) for n in counts)
    assert cache.val.source_tokens == (2, 8)


def test_what_is_held_out_of_a_file_is_not_counted_as_its_training_tokens(tmp_path, cache_dir):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", ["x" * n] * 10) for n in (1, 100)]
    cache = build(corpus(paths, ByteTokenizer()), cache_dir)
    for split in (cache.train, cache.val):
        sizes = np.diff(split.offsets)
        assert split.source_tokens == (2 * (sizes == 2).sum(), 101 * (sizes == 101).sum())
        assert sum(split.source_tokens) == split.num_tokens


def test_a_long_document_is_tokenised_in_pieces_and_closed_once(tmp_path, cache_dir):
    text = "All work and no play\n" * 60_000  # 1.3 million characters
    (tmp_path / "long.txt").write_text(text)
    wanted = corpus(str(tmp_path / "long.txt"), ByteTokenizer(), val_fraction=0)
    assert documents(build(wanted, cache_dir).train, ByteTokenizer()) == [text]


@pytest.mark.parametrize(("size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_tokens_take_two_bytes_where_they_fit(tmp_path, cache_dir, size, dtype):
    path = write_jsonl(tmp_path / "a.jsonl", ["\xff\xff", "b"])
    cache = build(corpus(path, ByteTokenizer(size), val_fraction=0), cache_dir)
    assert cache.train.tokens.dtype == dtype
    assert documents(cache.train, ByteTokenizer(size)) == ["\xff\xff", "b"]


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tmp_path, cache_dir):
    """The held-out word would be the most frequent one; no merge of the tokenizer knows it."""
    path = write_jsonl(tmp_path / "a.jsonl", ["plain text here", "another plain text"])
    held_out = write_jsonl(tmp_path / "b.jsonl", ["xyzzy " * 1000])
    cache = build(corpus(path, None, held_out), cache_dir)
    tokenizer = trained_tokenizer(cache.tokenizer_rules)
    assert "plain" in "".join(tokenizer.get_vocab())
    assert not any("xy" in token for token in tokenizer.get_vocab())
    assert documents(cache.train, tokenizer) == ["plain text here", "another plain text"]
    assert documents(cache.val, tokenizer) == ["xyzzy " * 1000]


def test_it_is_tokenised_once(texts, cache_dir, monkeypatch):
    key = prepare_token_cache(texts, cache_dir)
    monkeypatch.setattr("lightning_align.data.token_cache.write_corpus", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_token_cache(texts, cache_dir) == key


def test_the_key_follows_what_decides_the_tokens(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    renamed = write_jsonl(tmp_path / "b.jsonl", TEXTS)
    other = write_jsonl(tmp_path / "c.jsonl", [*TEXTS, "one more"])
    (tmp_path / "a.txt").write_text("x\ny")
    trained, split = train_tokenizer(TEXTS, 270), train_tokenizer(TEXTS, 270)
    split.split_special_tokens = True
    base = corpus(path, ByteTokenizer())
    assert base.key() == corpus(renamed, ByteTokenizer()).key()
    different = [
        base,
        corpus(other, ByteTokenizer()),
        corpus([path, other], ByteTokenizer()),
        corpus(path, ByteTokenizer(300)),
        corpus(path, trained),
        corpus(path, split),
        corpus(path, None),
        corpus(path, None, vocab_size=281),
        corpus(path, ByteTokenizer(), other),
        dataclasses.replace(base, val_fraction=0.5),
        dataclasses.replace(base, seed=1),
        corpus(str(tmp_path / "a.txt"), ByteTokenizer()),
        corpus(str(tmp_path / "a.txt"), ByteTokenizer(), pattern="^y"),
    ]
    assert len({one.key() for one in different}) == len(different)


def damage_tokens(folder):
    content = bytearray((folder / "train.tokens").read_bytes())
    content[10] ^= 1
    (folder / "train.tokens").write_bytes(content)


DAMAGES = {
    "a file cut short": lambda folder: os.truncate(folder / "train.tokens", 100),
    "a bit flipped": damage_tokens,
    "a file gone": lambda folder: (folder / "val.offsets").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 50),
    "a deep manifest": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "not a manifest": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "another manifest": lambda folder: (folder / "manifest.json").write_text('{"key": "abc"}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_built_anew(texts, cache_dir, damage):
    key = prepare_token_cache(texts, cache_dir)
    damage(cache_dir / key)
    with pytest.warns(UserWarning, match=r"token cache .*; building it anew"):
        cache = build(texts, cache_dir)
    both = documents(cache.train, texts.tokenizer) + documents(cache.val, texts.tokenizer)
    assert sorted(both) == sorted(TEXTS)


def test_opening_refuses_a_cache_that_is_not_there_or_was_cut_short(texts, cache_dir):
    with pytest.raises(ValueError, match=r"X\(cache_dir='.*'\): has no usable token cache abc"):
        open_token_cache("X", cache_dir, "abc")
    key = prepare_token_cache(texts, cache_dir)
    os.truncate(cache_dir / key / "val.tokens", 4)
    with pytest.raises(ValueError, match=r"val\.tokens has 4 bytes"):
        open_token_cache("X", cache_dir, key)


def test_a_split_travels_as_a_path(texts, cache_dir):
    split = build(texts, cache_dir).train
    assert split.tokens[0] != 0
    assert split.offsets[0] == 0
    message = pickle.dumps(split)
    assert len(message) < 1000
    assert (pickle.loads(message).tokens == split.tokens).all()


def test_cache_dir_that_cannot_be_a_folder(texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"X\(cache_dir='.*'\): must be a folder"):
        prepare_token_cache(texts, tmp_path / "file" / "cache")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_ALIGN_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LIGHTNING_ALIGN_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(default_cache_dir()) == "/home/someone/.cache/lightning_align"


@contextmanager
def before_each_batch(before):
    """Have `before(texts)` called ahead of every batch that a build tokenises."""

    def tokenise(tokenizer, texts):
        before(texts)
        return encode(tokenizer, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_align.data.tokenize_corpus.encode", tokenise)
        yield


def stuck_build(wanted, cache_dir):
    """Tokenises one batch, then waits for ever."""
    calls = []

    def before(texts):
        if calls:
            time.sleep(600)
        calls.append(1)

    with before_each_batch(before):
        prepare_token_cache(wanted, cache_dir)


def big_corpus(tmp_path, tokenizer):
    path = tmp_path / "big.jsonl"
    if not path.exists():
        write_jsonl(path, [f"{i} " + "x" * 200_000 for i in range(12)])
    return corpus(str(path), tokenizer)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_stuck(tmp_path, cache_dir):
    process = fork.Process(
        target=stuck_build, args=(big_corpus(tmp_path, ByteTokenizer()), cache_dir)
    )
    process.start()
    wait_until(lambda: any(file.stat().st_size for file in cache_dir.glob("*.tmp/train.tokens")))
    return process


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_kill_while_tokenising_leaves_nothing_that_is_trusted(tmp_path, cache_dir):
    process = start_stuck(tmp_path, cache_dir)
    [temporary] = cache_dir.glob("*.tmp")
    kill(process)
    assert temporary.exists()
    assert not (cache_dir / temporary.stem).exists()

    wanted = big_corpus(tmp_path, ByteTokenizer())
    assert wanted.key() == temporary.stem, "it was this very cache"
    cache = build(wanted, cache_dir)
    assert cache.train.num_documents + cache.val.num_documents == 12
    assert not temporary.exists()


def test_what_dead_builds_left_is_swept_and_what_living_ones_write_is_not(
    texts, tmp_path, cache_dir
):
    process = start_stuck(tmp_path, cache_dir)
    try:
        [living] = cache_dir.glob("*.tmp")
        dead = cache_dir / "0123.tmp"
        dead.mkdir()
        (dead / "train.tokens").write_bytes(b"half")
        prepare_token_cache(texts, cache_dir)
        assert living.exists()
        assert not dead.exists()
    finally:
        kill(process)


def test_waiting_for_another_build_is_announced(tmp_path, cache_dir, monkeypatch):
    monkeypatch.setattr("lightning_align.data.token_cache.PATIENCE_S", 0.05)
    process = start_stuck(tmp_path, cache_dir)
    threading.Timer(0.5, kill, [process]).start()
    with pytest.warns(UserWarning, match="another process builds this token cache"):
        cache = build(big_corpus(tmp_path, ByteTokenizer()), cache_dir)
    assert cache.train.num_documents + cache.val.num_documents == 12


def test_a_build_that_fails_leaves_nothing(tmp_path, cache_dir):
    def before(texts):
        raise RuntimeError("out of luck")

    with before_each_batch(before), pytest.raises(RuntimeError, match="out of luck"):
        prepare_token_cache(big_corpus(tmp_path, ByteTokenizer()), cache_dir)
    assert [path.suffix for path in cache_dir.iterdir()] == [".lock"]


def test_two_processes_that_build_at_once_both_succeed(tmp_path, cache_dir):
    def before(texts):
        time.sleep(0.05)
        with (tmp_path / "log").open("a") as stream:
            stream.write("t" * len(texts))

    wanted = big_corpus(tmp_path, ByteTokenizer())
    barrier = fork.Barrier(2)

    def work():
        barrier.wait()
        with before_each_batch(before):
            cache = build(wanted, cache_dir)
        assert cache.train.num_documents + cache.val.num_documents == 12

    processes = [fork.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "t" * 12, "only one of them tokenised"


def test_a_full_disk_leaves_nothing_that_is_trusted(small_disk, texts, tmp_path):  # noqa: F811
    folder, limit = small_disk
    intact = prepare_token_cache(texts, folder)
    too_big = big_corpus(tmp_path, ByteTokenizer())
    report = fork.Queue()

    def work():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            prepare_token_cache(too_big, folder)
        except OSError as error:
            report.put(str(error))

    process = fork.Process(target=work)
    process.start()
    message = report.get(timeout=60)
    process.join(60)
    assert "X: the disk is full" in message
    assert "set cache_dir" in message
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [intact]
    cache = build(texts, folder)
    assert cache.train.num_documents == 15

    elsewhere = build(too_big, tmp_path / "elsewhere")
    assert elsewhere.train.num_documents + elsewhere.val.num_documents == 12


def test_a_corpus_may_be_larger_than_the_memory(tmp_path, cache_dir):
    """16 MB of text go through with a peak of a few."""

    class SparseTokenizer(ByteTokenizer):
        """A list of integers of one per byte would itself be the peak."""

        def __call__(self, texts, **options):
            return {"input_ids": [[2] * (len(text) // 100) for text in texts]}

    path = tmp_path / "large.txt"
    with path.open("w") as stream:
        for _ in range(160):
            stream.write(("some words in a line of text\n" * 3500)[:100_000])
    wanted = corpus(str(path), SparseTokenizer(), val_fraction=0)
    tracemalloc.start()
    try:
        prepare_token_cache(wanted, cache_dir)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size == 16_000_000
    assert peak < 9_000_000


def test_locks_are_given_back(texts, cache_dir):
    key = prepare_token_cache(texts, cache_dir)
    with filelock.FileLock(cache_dir / f"{key}.lock", blocking=False) as lock:
        assert lock.is_locked
