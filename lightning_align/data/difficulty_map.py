"""The difficulties of a data set, computed shard by shard, on as many workers as there are.

A shard is a file with the difficulties of some samples under one metric. It says which samples, by
a hash of what they are, and under which metric, so that whatever is right is never computed again:
after a kill, when data were appended, when a metric was added. Shards come to be in one move, and a
hash of their own tells a damaged one.

Shapes: N samples, C samples of a shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least
from lightning_align.data.content_hash import UnknownContentError, add_content, data_fingerprint
from lightning_align.data.difficulty import DifficultyIndex, whole_dtype
from lightning_align.data.difficulty_metrics import BatchMetric, Metric, metric_key
from lightning_align.data.difficulty_reduce import build_index
from lightning_align.data.whole_folder import DISK_FULL, write_whole_file

WHERE = "DifficultyAnalyzer"
SHARD_SAMPLES = 1 << 12  # what a kill costs, at most
BAR_DELAY_S = 2.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
TOGETHER = 64  # samples that are read, and looked at by a metric that takes several at once


class Shard(NamedTuple):
    """Difficulties of the samples ``first`` to ``last`` (exclusive), and what they are of."""

    first: int
    last: int
    metric: str  # key of the metric
    fingerprint: str  # of the data set that they were seen in last
    content: str  # hash of the samples
    values: NDArray[Any]  # (C,)

    def write(self, path: Path, writer: str) -> None:
        """Write it to a file, in one move."""
        about = {"dtype": self.values.dtype.str, **self._asdict(), "values": None}
        body = json.dumps(about).encode() + b"\n" + self.values.tobytes()
        write_whole_file(path, body + _digest(body), writer)

    @classmethod
    def read(cls, path: Path) -> Shard | None:
        """The shard of a file; None if there is none, or it is damaged."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        body, digest = data[:-16], data[-16:]
        if _digest(body) != digest:
            return None
        head, _, raw = body.partition(b"\n")
        about = json.loads(head)
        values = np.frombuffer(raw, about.pop("dtype"))
        return cls(**{**about, "values": values})


class Mapped(NamedTuple):
    """What ``DifficultyAnalyzer.map`` did.

    Attributes:
        computed: Difficulties that were computed.
        reused: Difficulties that were there.
    """

    computed: int
    reused: int


@declared
class DifficultyAnalyzer:
    """Computes the difficulty of every sample under several metrics, and builds their indices.

    Every worker calls :meth:`map`, on any machine that sees the folder; when all have finished, one
    of them calls :meth:`reduce`. Whoever is killed is started again, and goes on.

    Args:
        dataset: Has a length and gives sample i as ``dataset[i]``.
        metrics: Function of a sample, by the name of the metric; greater is harder. One that has a
            method ``many`` is given several samples at once.
        folder: Where shards and indices go; the index of a metric is the folder of its name.
        fingerprint: What tells the data from others and is cheap to know, such as a datamodule's;
            shards of the same fingerprint are taken without a look at the data. Without it a
            few samples are hashed, and every worker looks at all of its own.
        num_workers: How many share the work.
        worker_id: Which of them this is, counted from 0.
        shard_samples: Samples of a shard.

    Raises:
        ValueError: If there is no sample or no metric, a name cannot be a folder's, a metric cannot
            be told from others (``metric_key``), or numbers are out of range.
    """

    def __init__(
        self,
        dataset: Any,
        metrics: Mapping[str, Metric],
        folder: str | Path,
        *,
        fingerprint: str | None = None,
        num_workers: int = 1,
        worker_id: int = 0,
        shard_samples: int = SHARD_SAMPLES,
    ) -> None:
        check_least(WHERE, 1, num_workers=num_workers, shard_samples=shard_samples)
        if not 0 <= worker_id < num_workers:
            rule = f"must be from 0 to num_workers - 1, {num_workers - 1}"
            raise argument_error(WHERE, "worker_id", worker_id, rule)
        if not metrics or len(dataset) == 0:
            rule = "must have a metric and a sample at least"
            raise argument_error(WHERE, "metrics", f"{len(metrics)} on {len(dataset)}", rule)
        for name in metrics:
            if not NAME.fullmatch(name) or name == "shards":
                rule = "the name of a metric must be letters, digits, _, . and -, and not 'shards'"
                raise argument_error(WHERE, "metrics", name, rule)
        if "://" in str(folder):
            rule = "must be a local folder: an index is memory-mapped"
            raise argument_error(WHERE, "folder", str(folder), rule, "Copy it when it is built")
        self.dataset = dataset
        self.metrics = dict(metrics)
        self.keys = {name: metric_key(metric) for name, metric in metrics.items()}
        self.folder = Path(folder).expanduser()
        self.given_fingerprint = fingerprint
        self.num_workers = num_workers
        self.worker_id = worker_id
        self.shard_samples = shard_samples

    @cached_property
    def fingerprint(self) -> str:
        """What tells the data from others."""
        if self.given_fingerprint is not None:
            return self.given_fingerprint
        with _known_content():
            return data_fingerprint(self.dataset)

    def map(self) -> Mapped:
        """Compute what is not there yet of this worker's shards.

        Raises:
            ValueError: If a metric fails on a sample, or is no finite number there.
            RuntimeError: If another process works on the same shards.
            OSError: If the disk is full. Whole shards are kept, others left no trace.
        """
        num_shards = -(-len(self.dataset) // self.shard_samples)
        bounds = np.linspace(0, num_shards, self.num_workers + 1).astype(int).tolist()
        mine = range(*bounds[self.worker_id : self.worker_id + 2])
        for name in self.metrics:
            self._shard_path(name, 0).parent.mkdir(parents=True, exist_ok=True)
        computed = reused = 0
        what = f"worker {self.worker_id} of {self.num_workers}"
        with self._alone(what), tqdm(desc=what, total=len(mine), delay=BAR_DELAY_S) as bar:
            for leftover in self.folder.glob(f"shards/*/*.{self._writer}.tmp"):
                leftover.unlink()
            for number in mine:
                done = self._map_shard(number * self.shard_samples)
                computed, reused = computed + done.computed, reused + done.reused
                bar.update()
        return Mapped(computed, reused)

    def reduce(self) -> dict[str, DifficultyIndex]:
        """Build the index of each metric from the shards of all workers; returns them, opened.

        Raises:
            ValueError: If a shard is missing, damaged or of other data, or all samples are equally
                difficult under a metric.
            RuntimeError: If another process does the same.
            OSError: If the disk is full. An index that was there is as it was.
        """
        with self._alone("reduce"):
            for name in self.metrics:
                path, pieces = self.folder / name, partial(self._pieces, name)
                build_index(path, name, pieces, fingerprint=self.fingerprint, where=WHERE)
        return {name: DifficultyIndex.open(self.folder / name) for name in self.metrics}

    @property
    def _writer(self) -> str:
        return f"{self.worker_id}_of_{self.num_workers}"

    def _shard_path(self, name: str, first: int) -> Path:
        return self.folder / "shards" / name / f"{first:012d}.shard"

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Refuse to do a part of the work twice at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The system gives it back when its holder dies.
        lock = filelock.FileLock(self.folder / f"{what.replace(' ', '_')}.lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            message = (
                f"{WHERE}(folder={str(self.folder)!r}): another process is at the part of"
                f" {what}. Give each worker a worker_id of its own, or wait until it has ended"
            )
            raise RuntimeError(message) from None
        try:
            yield
        finally:
            lock.release()

    def _map_shard(self, first: int) -> Mapped:
        last = min(first + self.shard_samples, len(self.dataset))
        keys = self.keys
        there = {name: Shard.read(self._shard_path(name, first)) for name in keys}
        fits = {
            name: shard
            for name, shard in there.items()
            if shard is not None
            and (shard.first, shard.last, shard.metric) == (first, last, keys[name])
        }
        by_name = self.given_fingerprint is not None
        same = {n for n, shard in fits.items() if by_name and shard.fingerprint == self.fingerprint}
        if same == keys.keys():
            return Mapped(0, len(keys) * (last - first))
        missing = [name for name in keys if name not in fits]
        content, values = self._compute(first, last, missing)
        stale = [name for name, shard in fits.items() if shard.content != content]
        if stale:
            values |= self._compute(first, last, stale)[1]
        for name, shard in fits.items():
            values.setdefault(name, shard.values)
        for name, values_C in values.items():
            shard = Shard(first, last, keys[name], self.fingerprint, content, values_C)
            self._write(shard, self._shard_path(name, first))
        done = (len(missing) + len(stale)) * (last - first)
        return Mapped(done, len(keys) * (last - first) - done)

    def _write(self, shard: Shard, path: Path) -> None:
        try:
            shard.write(path, self._writer)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            message = (
                f"{WHERE}: the disk is full ({error.strerror}). All shards before sample"
                f" {shard.first} are intact. Free some space, and go on"
            )
            raise OSError(error.errno, message, str(self.folder)) from error

    def _compute(
        self, first: int, last: int, names: list[str]
    ) -> tuple[str, dict[str, NDArray[Any]]]:
        """Hash of the samples, and their difficulties under the metrics ``names``."""
        digest = hashlib.blake2b(digest_size=16)
        found: dict[str, list[Any]] = {name: [] for name in names}
        for begin in range(first, last, TOGETHER):
            numbers = range(begin, min(begin + TOGETHER, last))
            samples = [self.dataset[number] for number in numbers]
            with _known_content():
                add_content(digest.update, samples)
            for name in names:
                found[name] += _difficulties(name, self.metrics[name], samples, numbers)
        return digest.hexdigest(), {name: _narrow(values) for name, values in found.items()}

    def _pieces(self, name: str) -> Iterator[NDArray[Any]]:
        for first in range(0, len(self.dataset), self.shard_samples):
            last = min(first + self.shard_samples, len(self.dataset))
            shard = Shard.read(self._shard_path(name, first))
            expected = (first, last, self.keys[name], self.fingerprint)
            if shard is None or shard[:4] != expected:
                problem = "is missing or damaged" if shard is None else "is of other data"
                rule = f"the shard of {name} for the samples {first} to {last} {problem}"
                way_out = "Run map() of every worker to its end, with the same metrics and data"
                raise argument_error(WHERE, "folder", str(self.folder), rule, way_out)
            yield shard.values


@contextmanager
def _known_content() -> Iterator[None]:
    try:
        yield
    except UnknownContentError as error:
        way_out = "Give a dataset of text, numbers, arrays or tensors"
        raise argument_error(WHERE, "dataset", "...", str(error), way_out) from error


def _difficulties(
    name: str, metric: Metric, samples: list[Any], numbers: range
) -> list[int | float]:
    """Difficulties of samples that lie one behind the other."""
    if not isinstance(metric, BatchMetric):
        return [_difficulty(name, metric, *each) for each in zip(samples, numbers, strict=True)]
    try:
        values = [_checked(name, *each) for each in zip(metric.many(samples), numbers, strict=True)]
    except Exception as error:
        for sample, number in zip(samples, numbers, strict=True):
            _difficulty(name, metric, sample, number)  # names the one that it fails on
        span = f"{numbers.start} to {numbers.stop}"
        rule = f"failed on the samples {span} together ({type(error).__name__}: {error})"
        raise argument_error(WHERE, "metrics", name, rule) from error
    return values


def _difficulty(name: str, metric: Metric, sample: Any, number: int) -> int | float:
    try:
        value = metric(sample)
    except Exception as error:
        rule = f"failed on sample {number} ({type(error).__name__}: {error})"
        raise argument_error(WHERE, "metrics", name, rule) from error
    return _checked(name, value, number)


def _checked(name: str, value: Any, number: int) -> int | float:
    """A difficulty as a plain number.

    Raises:
        ValueError: If it is none, or too large for its file.
    """
    plain: int | float = value.item() if getattr(value, "ndim", None) == 0 else value
    finite = (
        -(2**63) <= plain < 2**63
        if isinstance(plain, int)
        else isinstance(plain, float) and abs(plain) < 1e38
    )
    if isinstance(plain, bool) or not finite:
        rule = f"is {plain!r} for sample {number}, and must be a finite number"
        raise argument_error(WHERE, "metrics", name, rule)
    return plain


def _narrow(values: list[int | float]) -> NDArray[Any]:
    if any(isinstance(value, float) for value in values):
        return np.array(values, np.float32)
    return np.array(values, whole_dtype(int(min(values)), int(max(values))))


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()
