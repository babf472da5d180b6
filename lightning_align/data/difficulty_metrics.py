"""How difficult a sample is: numbers that are greater for harder ones.

A sample is whatever a dataset gives: text, tokens, or a mapping with ``input_ids`` and, where there
is padding, an ``attention_mask``. Any function of a sample is a metric.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lightning_align._errors import argument_error
from lightning_align.data.content_hash import UnknownContentError, add_content

Metric = Callable[[Any], Any]


@runtime_checkable
class BatchMetric(Protocol):
    """A metric that is faster for several samples at once."""

    def __call__(self, sample: Any) -> Any:
        """The difficulty of a sample."""
        ...

    def many(self, samples: Sequence[Any]) -> Sequence[Any]:
        """The difficulty of each sample."""
        ...


def tokens_of(sample: Any) -> NDArray[Any]:
    """The tokens of a sample without padding, those of several rows one behind the other.

    Of text, the bytes. Where there are labels and no mask, padding is what has the label -100 at
    the end of a row.

    Raises:
        ValueError: If there are none to be found.
    """
    if isinstance(sample, str):
        return np.frombuffer(sample.encode("utf-8", "surrogatepass"), np.uint8)
    if isinstance(sample, bytes):
        return np.frombuffer(sample, np.uint8)
    if not isinstance(sample, Mapping):
        return _array(sample).reshape(-1)
    if "input_ids" not in sample:
        rule = f"a mapping must have input_ids; it has {', '.join(map(repr, sample)) or 'nothing'}"
        raise argument_error("tokens_of", "sample", type(sample).__name__, rule)
    ids: NDArray[Any] = np.atleast_2d(_array(sample["input_ids"]))
    real: NDArray[Any] = np.ones(ids.shape, bool)
    if "attention_mask" in sample:
        real = np.atleast_2d(_array(sample["attention_mask"])) != 0
    elif "labels" in sample:
        learned = np.atleast_2d(_array(sample["labels"])) != -100
        real = np.flip(np.maximum.accumulate(np.flip(learned, 1), 1), 1)
    tokens: NDArray[Any] = ids[real]
    return tokens


def _array(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(value)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        rule = "tokens must be whole numbers"
        raise argument_error(
            "tokens_of", "sample", f"{type(value).__name__} of {array.dtype}", rule
        )
    return array


def length(sample: Any) -> int:
    """Number of tokens; of text, the number of characters."""
    return len(sample) if isinstance(sample, str) else len(tokens_of(sample))


class VocabularyRarity:
    """Sum of -log p over the tokens, p being a token's share of all (Platanios et al. 2019).

    Args:
        counts: How often each token occurs, (V,); ``count_tokens`` counts them.
        per_token: Whether to take the mean instead, which does not grow with the length.
    """

    def __init__(self, counts: NDArray[np.int64], *, per_token: bool = False) -> None:
        self._rarity = -np.log(np.maximum(counts, 1) / max(1, int(np.sum(counts))))
        self._unseen = math.log(max(1, int(np.sum(counts))))
        self._per_token = per_token
        digest = hashlib.blake2b(np.asarray(counts, np.int64).tobytes(), digest_size=16)
        self.key = f"vocabulary rarity {digest.hexdigest()} per_token={per_token}"

    def __call__(self, sample: Any) -> float:
        """The rarity of a sample, in nats."""
        tokens = tokens_of(sample)
        if len(tokens) == 0:
            return 0.0
        known = tokens[tokens < len(self._rarity)]
        unseen = (len(tokens) - len(known)) * self._unseen
        total = float(self._rarity[known].sum()) + unseen
        return total / len(tokens) if self._per_token else total


def count_tokens(samples: Iterable[Any]) -> NDArray[np.int64]:
    """How often each token occurs in samples, (V,), as far as the greatest that does."""
    counts = np.zeros(0, np.int64)
    for sample in samples:
        found = np.bincount(tokens_of(sample).astype(np.int64))
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
    return counts


class CompressionRatio:
    """Size after compression by size before: what repeats itself is small, and easy.

    Args:
        decode: Makes text of tokens, such as a tokenizer's ``decode``; without it, tokens are
            compressed as numbers.
    """

    def __init__(self, decode: Callable[[list[int]], str] | None = None) -> None:
        self._decode = decode
        self.key = f"compression ratio of {'numbers' if decode is None else 'text'}"

    def __call__(self, sample: Any) -> float:
        """The ratio of a sample; 1 where there is nothing to compress."""
        if isinstance(sample, str):
            data = sample.encode("utf-8", "surrogatepass")
        elif self._decode is None:
            data = tokens_of(sample).astype("<u4").tobytes()
        else:
            data = self._decode(tokens_of(sample).tolist()).encode("utf-8", "surrogatepass")
        return len(zlib.compress(data, 6)) / len(data) if data else 1.0


def metric_key(metric: Metric) -> str:
    """What tells a metric from another: its attribute ``key``, or else its name, code and values.

    Of functions that it calls only the names are seen: where those change, change the ``key``.

    Raises:
        ValueError: If it holds what cannot be compared, such as a model, and has no ``key``.
    """
    key = getattr(metric, "key", None)
    if isinstance(key, str):
        return key
    name = getattr(metric, "__qualname__", type(metric).__qualname__)
    digest = hashlib.blake2b(digest_size=8)
    try:
        add_content(digest.update, metric)
    except (UnknownContentError, RecursionError) as error:
        rule = f"cannot be told from others: it {error}"
        way_out = "Give it an attribute key, a text that changes when its values may"
        raise argument_error("DifficultyAnalyzer", "metrics", name, rule, way_out) from error
    return f"{getattr(metric, '__module__', '')}.{name} {digest.hexdigest()}"
