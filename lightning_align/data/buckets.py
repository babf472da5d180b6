"""Dataset decomposition: documents cut into powers of two, and batches of one length each.

Blocks of one size hold parts of several documents, or are mostly padding. Here every document is
cut by the binary digits of its length into pieces of 2**i predictions (Pouransari et al., "Dataset
Decomposition", arXiv:2405.13226), a bucket holds the pieces of one length, and a batch comes from
one bucket: as many pieces as make the same number of tokens whatever their length, so that a step
costs what the lengths of real documents cost.

A pass has every piece once. Which bucket batch n is from, and which of its pieces, is looked up:
the buckets take turns in proportion to their tokens, or by *odds* that let short ones come first,
once or in several cycles (``get_dd_params.py`` of apple/ml-dataset-decomposition: the chance of a
bucket is its tokens times its odds, until it is empty). There the bucket of a batch is drawn; here
the same shares are kept at every moment, to less than a batch for each halving of the buckets.

Three things differ from the authors' code. Neighbouring pieces share a token, as our blocks do, so
that each token but a document's first is predicted once; there one prediction is lost between
pieces. What is left of a document below the least length is filled up, not thrown away. And a
document longer than the greatest length is cut into pieces of that length, not of random ones.

Shapes: D documents, G buckets, N pieces, B pieces in a batch, T predictions in a piece.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_align._declared import declared
from lightning_align._errors import argument_error, check_least, finite_number
from lightning_align.data.apportionment import Apportionment
from lightning_align.data.keyed_permutation import keys, permuted
from lightning_align.data.packing import IGNORE_INDEX
from lightning_align.data.token_cache import TokenSplit
from lightning_align.seeds import derive_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]

WHERE = "Curriculum"


@dataclass(frozen=True)
class Pieces:
    """The documents of a corpus, in pieces, bucket after bucket, the shortest first.

    Args:
        lengths: Predictions of a piece of each bucket, (G,): powers of two.
        sizes: Pieces of each bucket, (G,), all above 0.
        first_token: Token at which each piece begins, (N,).
        last_token: Token at which its document ends, exclusive, for those that are filled up; they
            are the last ones of the first bucket, (F,).
    """

    lengths: Counts
    sizes: Counts
    first_token: Counts
    last_token: Counts

    @property
    def filled_up(self) -> int:
        """Predictions that are padding, in a pass."""
        first = int(self.sizes[0]) - len(self.last_token)
        begins_F = self.first_token[first : int(self.sizes[0])]
        return int((self.lengths[0] - (self.last_token - begins_F - 1)).sum())


def decompose(offsets: NDArray[np.int64], least: int, greatest: int) -> Pieces:
    """Cut documents into pieces of ``greatest`` predictions, and the rest by its binary digits.

    A document of m tokens has m - 1 predictions: nothing says what it begins with.

    Args:
        offsets: Where each document begins, and where the last one ends, (D + 1,).
        least: Fewest predictions of a piece, a power of two; a rest below it is filled up.
        greatest: Most predictions of a piece, a power of two.

    Raises:
        ValueError: If a length is no power of two, they are in the wrong order, or no document has
            two tokens.
    """
    for argument, value in (("least", least), ("greatest", greatest)):
        if value < 1 or value & (value - 1):
            raise argument_error(WHERE, argument, value, "must be a power of two in mode='bucket'")
    if least > greatest:
        rule = f"must not be above the greatest length, {greatest}"
        raise argument_error(WHERE, "least", least, rule)
    begins_D = np.asarray(offsets[:-1])
    predictions_D = np.maximum(np.diff(offsets) - 1, 0)
    rest_D = predictions_D % greatest
    found: dict[int, list[Counts]] = {}
    length = least
    while length < greatest:
        # The binary digits above this one come before it in the document.
        has_D = (rest_D & length) > 0
        above_D = predictions_D - rest_D % (2 * length)
        found[length] = [(begins_D + above_D)[has_D]]
        length *= 2
    whole_D = predictions_D // greatest
    number_P = np.arange(whole_D.sum()) - np.repeat(np.cumsum(whole_D) - whole_D, whole_D)
    found[greatest] = [np.repeat(begins_D, whole_D) + number_P * greatest]
    left_D = rest_D % least
    filled_D = left_D > 0
    found[least].append((begins_D + predictions_D - left_D)[filled_D])
    ends_F = np.asarray(offsets[1:])[filled_D]
    groups = {length: np.concatenate(parts) for length, parts in sorted(found.items())}
    groups = {length: group for length, group in groups.items() if len(group)}
    if not groups:
        raise argument_error(WHERE, "mode", "bucket", "no document has two tokens")
    sizes = np.array([len(group) for group in groups.values()], dtype=np.int64)
    first = np.concatenate([*groups.values()])
    return Pieces(np.array([*groups], dtype=np.int64), sizes, first, ends_F)


@declared
class BucketedDataset(Dataset[dict[str, Tensor]]):
    """Pieces of documents; indexed with a *list* of pieces of one bucket, it returns a batch.

    A padding index of the sampler gives the piece that it names, with nothing to predict.

    Args:
        split: Tokens, one document after the other.
        greatest: Most predictions of a piece.
        pad_token_id: Token that fills up what is left of a document, under the label -100.
        least: Fewest predictions of a piece.

    Attributes:
        pieces: Where the pieces are.

    Raises:
        ValueError: If a length is no power of two, or no document has two tokens.
    """

    def __init__(
        self, split: TokenSplit, greatest: int, pad_token_id: int, *, least: int = 8
    ) -> None:
        self.split = split
        self.pad_token_id = pad_token_id
        self.pieces = decompose(split.offsets, min(least, greatest), greatest)
        self._last_piece_G = np.cumsum(self.pieces.sizes)

    def __len__(self) -> int:
        """Number of pieces."""
        return int(self._last_piece_G[-1])

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of the pieces ``indices``: ids, labels and positions, each (B, T + 1)."""
        index_B = np.asarray(indices, dtype=np.int64)
        empty_B = index_B < 0
        piece_B = np.where(empty_B, -(index_B + 1), index_B)
        (bucket,) = {*np.searchsorted(self._last_piece_G, piece_B, side="right").tolist()}
        length = int(self.pieces.lengths[bucket])
        begin_B = self.pieces.first_token[piece_B]
        token_BT = begin_B[:, None] + np.arange(length + 1)
        beyond_BT = token_BT >= self._ends(piece_B, begin_B + length + 1)[:, None]
        token_BT[beyond_BT] = 0
        ids_BT = self.split.tokens[token_BT].astype(np.int64)
        ids_BT[beyond_BT] = self.pad_token_id
        labels_BT = np.where(beyond_BT | empty_B[:, None], IGNORE_INDEX, ids_BT)
        labels_BT[:, 0] = IGNORE_INDEX  # what comes before is in another piece, or nowhere
        positions_BT = np.tile(np.arange(length + 1), (len(index_B), 1))
        batch = {"input_ids": ids_BT, "labels": labels_BT, "position_ids": positions_BT}
        return {name: torch.from_numpy(value_BT) for name, value_BT in batch.items()}

    def _ends(self, piece_B: Counts, whole_B: Counts) -> Counts:
        """Token behind the last one of each piece: some of the first bucket are filled up."""
        last_token = self.pieces.last_token
        first = int(self.pieces.sizes[0]) - len(last_token)
        if not len(last_token):
            return whole_B
        place_B = np.clip(piece_B - first, 0, len(last_token) - 1)
        filled_B = (piece_B >= first) & (piece_B < self.pieces.sizes[0])
        return np.where(filled_B, last_token[place_B], whole_B)


class BucketBatches:
    """Which pieces are in global batch n: a pure function of the seed and n.

    The last batch of a bucket in a pass may be smaller: no piece is left out or comes twice.

    Args:
        sizes: Pieces of each bucket, (G,).
        lengths: Predictions of a piece of each bucket, (G,), the shortest first.
        tokens: Predictions of a batch over all ranks, a multiple of the greatest length.
        seed: Seed of the order of the pieces.
        odds: By how much buckets are preferred, one number each or ``"grow_p2"``: twice as much as
            the next longer one. None takes them as they are.
        cycles: In how many cycles a pass goes from what is preferred to what is left.

    Raises:
        ValueError: If ``tokens`` is no multiple of the greatest length, there are other odds than
            buckets, one is not positive, or there are more cycles than batches.
    """

    def __init__(
        self,
        sizes: Sequence[int] | Counts,
        lengths: Sequence[int] | Counts,
        tokens: int,
        seed: int = 0,
        *,
        odds: Sequence[float] | str | None = None,
        cycles: int = 1,
    ) -> None:
        self.sizes, self.lengths = np.asarray(sizes), np.asarray(lengths)
        if tokens < 1 or tokens % int(self.lengths[-1]):
            rule = f"must be a multiple of the greatest length, {self.lengths[-1]}"
            raise argument_error(WHERE, "tokens", tokens, rule)
        self.rows = tokens // self.lengths  # of a batch from each bucket, (G,)
        self.batches = -(-self.sizes // self.rows)  # of each bucket in a pass, (G,)
        check_least(WHERE, 1, cycles=cycles)
        if cycles > len(self):
            rule = f"a pass has {len(self)} batches, and each cycle needs one"
            raise argument_error(WHERE, "cycles", cycles, rule)
        self._seed = derive_seed("buckets", seed)
        self._first_G = np.cumsum(self.sizes) - self.sizes
        # Batches of each bucket up to the end of each stretch of a pass in which shares are even.
        ends = np.array(stretches(self.batches, self._odds(odds), cycles))
        self._before = np.concatenate([np.zeros_like(ends[:1]), ends])
        self._starts: list[int] = self._before.sum(axis=1).tolist()
        self._shares = [Apportionment(end - begin) for begin, end in pairwise(self._before)]

    def __len__(self) -> int:
        """Batches of a pass."""
        return int(self.batches.sum())

    def bucket(self, n: int) -> tuple[int, int]:
        """Number of the bucket that batch n is from, and how many batches of it came before."""
        number, place = divmod(n, len(self))
        stretch = bisect_right(self._starts, place) - 1
        within = place - self._starts[stretch]
        before, behind = self._shares[stretch].counts(np.array([within, within + 1]))
        bucket = int(np.argmax(behind - before))
        slot = int(self._before[stretch][bucket] + before[bucket])
        return bucket, number * int(self.batches[bucket]) + slot

    def before(self, n: int) -> int:
        """How many pieces come before batch n, over all ranks."""
        number, place = divmod(n, len(self))
        stretch = bisect_right(self._starts, place) - 1
        within = np.array([place - self._starts[stretch]])
        batches_G = self._before[stretch] + self._shares[stretch].counts(within)[0]
        pieces_G = np.minimum(batches_G * self.rows, self.sizes)
        return number * int(self.sizes.sum()) + int(pieces_G.sum())

    def length(self, n: int) -> int:
        """Predictions of each piece of batch n."""
        return int(self.lengths[self.bucket(n)[0]])

    def batch(self, n: int) -> list[int]:
        """The pieces of batch n, over all ranks."""
        bucket, earlier = self.bucket(n)
        number, slot = divmod(earlier, int(self.batches[bucket]))
        first, size = slot * int(self.rows[bucket]), int(self.sizes[bucket])
        places_B = np.arange(first, min(first + int(self.rows[bucket]), size))
        keys_B = np.broadcast_to(keys(self._seed, bucket, number), places_B.shape)
        pieces_B = permuted(places_B, np.full_like(places_B, size), keys_B)
        found: list[int] = (self._first_G[bucket] + pieces_B).tolist()
        return found

    def _odds(self, odds: Sequence[float] | str | None) -> list[float]:
        number = len(self.sizes)
        if odds == "grow_p2":
            return [2.0 ** (number - 1 - bucket) for bucket in range(number)]
        given = [1.0] * number if odds is None else odds
        lengths = ", ".join(map(str, self.lengths))
        if isinstance(given, str) or len(given) != number:
            rule = f"must be 'grow_p2', or one number for each length that there is: {lengths}"
            raise argument_error(WHERE, "odds", odds, rule)
        for each in given:
            if (value := finite_number(each)) is None or value <= 0:
                raise argument_error(WHERE, "odds", each, "must be a positive, finite number")
        return list(given)


def stretches(batches: Counts, odds: Sequence[float], cycles: int) -> list[list[int]]:
    """How many batches of each bucket come up to the end of each stretch of even shares.

    In a cycle a bucket's batches come at a rate of their number times its odds, until none is left:
    the bucket with the greatest odds ends first, and then the shares are others.

    Args:
        batches: Batches of each bucket in a pass, (G,).
        odds: Odds of each bucket, (G,).
        cycles: Number of cycles in a pass.
    """
    found: list[list[int]] = []
    done = [0] * len(batches)
    for cycle in range(1, cycles + 1):
        upto = [int(number) * cycle // cycles for number in batches]
        for end in sorted({*odds}, reverse=True):
            # When the bucket of these odds is empty, others have had their odds' part of theirs.
            part = [
                before + round((last - before) * min(1.0, own / end))
                for before, last, own in zip(done, upto, odds, strict=True)
            ]
            if sum(part) > sum(found[-1] if found else [0]):
                found.append(part)
        done = upto
    return found
