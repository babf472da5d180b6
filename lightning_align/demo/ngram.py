"""Honest n-gram language models over token ids: yardsticks for a small model's perplexity.

A perplexity alone says little. These three say how far plain counting gets on the same held-out
tokens: unigram, an interpolated trigram with tuned weights, and modified Kneser-Ney, the strongest
of the classical smoothing methods. All are proper distributions over the vocabulary, so their
perplexities compare directly with the neural model's. Counts live in sorted int64 arrays, one
key per n-gram, looked up by binary search: 200,000 tokens take well under a second.

Equation numbers: Chen & Goodman, An empirical study of smoothing techniques for language modeling,
Harvard TR-10-98 (1998); Computer Speech and Language 13 (1999), 359-394.

Shapes: N predicted tokens, S training tokens, V vocabulary, K mixture components.
Words: a context (u, v) is the two tokens before the target w.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_align._errors import argument_error

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Three ids, each below V + 1, share one int64 key: (V + 1)^3 < 2^63.
MAX_VOCAB_SIZE = 2_000_000


def unigram_perplexity(
    train_tokens: ArrayLike, eval_tokens: ArrayLike, vocab_size: int, *, first_target: int = 1
) -> float:
    """Perplexity of token frequencies with one added to each count (Laplace).

    Args:
        train_tokens: Token ids to count, (S,).
        eval_tokens: Held-out token ids, (N + first_target,).
        vocab_size: Number of ids, so that unseen ones get their share.
        first_target: Index of the first token to predict; 1 is what a language model does.
    """
    where = "unigram_perplexity"
    train = _check_tokens(where, "train_tokens", train_tokens, vocab_size, 1)
    held_out = _check_eval(where, eval_tokens, vocab_size, first_target)
    counts_V = np.bincount(train, minlength=vocab_size)
    p_V = (counts_V + 1) / (len(train) + vocab_size)
    return _perplexity(p_V[held_out[first_target:]])


def interpolated_trigram_perplexity(
    train_tokens: ArrayLike,
    eval_tokens: ArrayLike,
    vocab_size: int,
    *,
    first_target: int = 1,
    tuning_fraction: float = 0.1,
) -> float:
    """Perplexity of a Jelinek-Mercer trigram, its weights tuned on a slice of the training text.

    Args:
        train_tokens: Token ids to count, (S,).
        eval_tokens: Held-out token ids, (N + first_target,); they never touch the weights.
        vocab_size: Number of ids, so that unseen ones get their share.
        first_target: Index of the first token to predict; 1 is what a language model does.
        tuning_fraction: Share of the training tokens, at their end, that tunes the weights.

    Raises:
        ValueError: If ``tuning_fraction`` is not between 0 and 1.
    """
    where = "interpolated_trigram_perplexity"
    train = _check_tokens(where, "train_tokens", train_tokens, vocab_size, 2)
    held_out = _check_eval(where, eval_tokens, vocab_size, first_target)
    if not 0 < tuning_fraction < 1:
        raise argument_error(where, "tuning_fraction", tuning_fraction, "must be in (0, 1)")
    # Deleted interpolation: counts and weights come from different text, or the trigram, which
    # remembers its own text perfectly, would get all the weight. Then all of it is counted.
    cut = min(max(round(len(train) * (1 - tuning_fraction)), 1), len(train) - 1)
    tuning_NK = TrigramComponents(train[:cut], vocab_size).probabilities(
        *windows(train, cut, vocab_size)
    )
    # One more token that only the uniform can explain: a slice without unseen tokens would drive
    # the uniform's weight to zero, and the first unseen token of the evaluation to infinity.
    unseen_1K = np.array([[1 / vocab_size, 0.0, 0.0, 0.0]])
    weights = tune_weights(np.concatenate([tuning_NK, unseen_1K]))
    model = TrigramComponents(train, vocab_size)
    return _perplexity(model.probabilities(*windows(held_out, first_target, vocab_size)) @ weights)


def kneser_ney_perplexity(
    train_tokens: ArrayLike, eval_tokens: ArrayLike, vocab_size: int, *, first_target: int = 1
) -> float:
    """Perplexity of an interpolated modified Kneser-Ney trigram (discounts from counts of counts).

    Args:
        train_tokens: Token ids to count, (S,).
        eval_tokens: Held-out token ids, (N + first_target,).
        vocab_size: Number of ids, so that unseen ones get their share.
        first_target: Index of the first token to predict; 1 is what a language model does.
    """
    where = "kneser_ney_perplexity"
    train = _check_tokens(where, "train_tokens", train_tokens, vocab_size, 1)
    held_out = _check_eval(where, eval_tokens, vocab_size, first_target)
    model = KneserNeyTrigram(train, vocab_size)
    return _perplexity(model.probabilities(*windows(held_out, first_target, vocab_size)))


class ContextCounts:
    """How often each token followed each context, as sorted arrays."""

    def __init__(self, contexts_S: Ints, targets_S: Ints, base: int) -> None:
        self.base = base
        self.pairs, self.counts = np.unique(contexts_S * base + targets_S, return_counts=True)
        self.contexts, self.starts = np.unique(self.pairs // base, return_index=True)
        self.totals = self.per_context(self.counts)

    def per_context(self, values: NDArray[np.generic]) -> Ints:
        """Sum one value per distinct pair over the pairs of each context."""
        if not len(self.starts):  # a one-token text has no bigrams, and reduceat wants one
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(values.astype(np.int64), self.starts)

    def of_pairs(self, contexts_N: Ints, targets_N: Ints) -> Ints:
        """c(context, target); 0 where never seen."""
        return _look_up(self.pairs, self.counts, contexts_N * self.base + targets_N)

    def of_contexts(self, contexts_N: Ints, values: Ints) -> Ints:
        """The context's entry of ``values`` (one per distinct context); 0 where never seen."""
        return _look_up(self.contexts, values, contexts_N)


class TrigramComponents:
    """The K = 4 distributions that Jelinek-Mercer mixes: uniform, unigram, bigram, trigram.

    A component whose context was never seen repeats the next shorter one, so that every column is
    a distribution and any convex weights make another.
    """

    def __init__(self, train_S: Ints, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.levels = [
            ContextCounts(*pair, vocab_size + 1) for pair in _orders(train_S, vocab_size)
        ]

    def probabilities(self, contexts_N2: Ints, targets_N: Ints) -> Floats:
        """p_0(w), p_1(w), p_2(w | v), p_3(w | u, v) as columns (N, K)."""
        keys = _context_keys(contexts_N2, self.vocab_size)
        columns = [np.full(len(targets_N), 1 / self.vocab_size)]
        for level, context_N in zip(self.levels, keys, strict=True):
            total_N = level.of_contexts(context_N, level.totals)
            count_N = level.of_pairs(context_N, targets_N)
            columns.append(np.where(total_N > 0, count_N / np.maximum(total_N, 1), columns[-1]))
        return np.stack(columns, axis=1)


def tune_weights(components_NK: Floats, *, tolerance: float = 1e-8, steps: int = 1000) -> Floats:
    """Mixture weights (K,) that maximise held-out likelihood, by expectation maximisation.

    Args:
        components_NK: Each component's probability of each held-out token.
        tolerance: Stop when the mean log-likelihood gains less than this, in nats.
        steps: Iterations at most.
    """
    weights_K = np.full(components_NK.shape[1], 1 / components_NK.shape[1])
    before = -np.inf
    for _ in range(steps):
        joint_NK = components_NK * weights_K
        mixture_N = joint_NK.sum(axis=1)
        weights_K = (joint_NK / mixture_N[:, None]).mean(axis=0)  # share of tokens each explains
        after = float(np.log(mixture_N).mean())
        if after - before < tolerance:
            break
        before = after
    return weights_K


class KneserNeyTrigram:
    """Interpolated modified Kneser-Ney of order three, down to the uniform distribution.

    The lower orders count in how many *different* contexts a token appeared, not how often: after
    an unseen context, "Francisco" (nearly always after "San") is not a likely word.
    """

    def __init__(self, train_S: Ints, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        base = vocab_size + 1
        trigrams = ContextCounts(*_orders(train_S, vocab_size)[2], base)
        bigrams = ContextCounts(*_orders(train_S, vocab_size)[1], base)
        # N1+(. v w): distinct trigrams, each counted once, seen as (v, w)
        middle = ContextCounts(trigrams.pairs // base % base, trigrams.pairs % base, base)
        # N1+(. w): distinct bigrams, each counted once, seen as w                          (Eq. 23)
        last = ContextCounts(np.zeros_like(bigrams.pairs), bigrams.pairs % base, base)
        self.levels = (last, middle, trigrams)
        self.discounts = tuple(discounts(level.counts) for level in self.levels)
        # N1(context .), N2(context .), N3+(context .): followers seen once, twice, more often
        self.kinds = tuple(
            [level.per_context(np.minimum(level.counts, 3) == kind) for kind in (1, 2, 3)]
            for level in self.levels
        )

    def probabilities(self, contexts_N2: Ints, targets_N: Ints) -> Floats:
        """p(w | u, v) of each target (N,)."""
        p_N = np.full(len(targets_N), 1 / self.vocab_size)
        keys = _context_keys(contexts_N2, self.vocab_size)
        orders = zip(self.levels, self.discounts, self.kinds, keys, strict=True)
        for level, discount, kinds, context_N in orders:
            total_N = level.of_contexts(context_N, level.totals)
            count_N = level.of_pairs(context_N, targets_N)
            # Chen & Goodman, Sec. 3, "modified Kneser-Ney": p = (c - D(c)) / total + gamma p_lower,
            # gamma = (D1 N1 + D2 N2 + D3+ N3+) / total
            kept_N = count_N - discount[np.minimum(count_N, 3)]
            n1_N, n2_N, n3_N = (level.of_contexts(context_N, kind) for kind in kinds)
            freed_N = discount[1] * n1_N + discount[2] * n2_N + discount[3] * n3_N
            p_N = np.where(total_N > 0, (kept_N + freed_N * p_N) / np.maximum(total_N, 1), p_N)
        return p_N


def discounts(counts: Ints) -> Floats:
    """D(0), D(1), D(2), D(3+) of one order, from how many n-grams occurred 1, 2, 3 and 4 times.

    Where the counts of counts leave a discount undefined or not positive (tiny or repetitive
    text), D1 falls back to 1/2 and the others to D1, so that unseen tokens keep a probability.
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.0  # Y                                             (Eq. 26)
    d1 = y or 0.5  # 1 - 2Y n2/n1 simplifies to Y                                          (Eq. 26)
    d2 = 2 - 3 * y * n3 / n2 if n2 else 0.0  #                                             (Eq. 26)
    d3 = 3 - 4 * y * n4 / n3 if n3 else 0.0  #                                             (Eq. 26)
    return np.array([0.0, d1, d2 if d2 > 0 else d1, d3 if d3 > 0 else d1])


def windows(tokens: Ints, first_target: int, vocab_size: int) -> tuple[Ints, Ints]:
    """The targets (N,) from index ``first_target`` on and their contexts (N, 2) of earlier tokens.

    The id ``vocab_size``, which no text contains, stands for "before the beginning".
    """
    padded = np.concatenate([np.full(2, vocab_size, dtype=np.int64), tokens])
    contexts = np.stack([padded[:-2], padded[1:-1]], axis=1)
    return contexts[first_target:], tokens[first_target:]


def _context_keys(contexts_N2: Ints, vocab_size: int) -> tuple[Ints, Ints, Ints]:
    """The empty context, v, and (u, v), one integer each."""
    u_N, v_N = contexts_N2[:, 0], contexts_N2[:, 1]
    return np.zeros_like(v_N), v_N, u_N * (vocab_size + 1) + v_N


def _orders(train_S: Ints, vocab_size: int) -> list[tuple[Ints, Ints]]:
    """(context, target) keys of every complete unigram, bigram and trigram of the text."""
    contexts, targets = windows(train_S, 0, vocab_size)
    keys = _context_keys(contexts, vocab_size)
    return [(key[skip:], targets[skip:]) for skip, key in enumerate(keys)]


def _look_up(sorted_keys: Ints, values: Ints, queries_N: Ints) -> Ints:
    if not len(sorted_keys):
        return np.zeros_like(queries_N)
    at_N = np.minimum(np.searchsorted(sorted_keys, queries_N), len(sorted_keys) - 1)
    return np.where(sorted_keys[at_N] == queries_N, values[at_N], 0)


def _perplexity(p_N: Floats) -> float:
    return float(np.exp(-np.log(p_N).mean()))


def _check_eval(where: str, tokens: ArrayLike, vocab_size: int, first_target: int) -> Ints:
    if first_target < 0:
        raise argument_error(where, "first_target", first_target, "must be 0 or more")
    return _check_tokens(where, "eval_tokens", tokens, vocab_size, first_target + 1)


def _check_tokens(
    where: str, argument: str, tokens: ArrayLike, vocab_size: int, at_least: int
) -> Ints:
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        rule = f"must be between 1 and {MAX_VOCAB_SIZE}"
        raise argument_error(where, "vocab_size", vocab_size, rule)
    array = np.asarray(tokens)
    if array.ndim != 1 or len(array) < at_least:
        rule = f"must be one row of at least {at_least} token ids"
        raise argument_error(where, argument, array.shape, rule)
    if not np.issubdtype(array.dtype, np.integer):
        raise argument_error(where, argument, str(array.dtype), "must hold integer token ids")
    if array.min() < 0 or array.max() >= vocab_size:
        bad = int(array.min()) if array.min() < 0 else int(array.max())
        raise argument_error(where, argument, bad, f"ids must be in [0, {vocab_size})")
    return array.astype(np.int64)
