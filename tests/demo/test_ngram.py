import lzma
import math
import re
import time
from collections import Counter
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.demo.ngram import (
    KneserNeyTrigram,
    TrigramComponents,
    discounts,
    interpolated_trigram_perplexity,
    kneser_ney_perplexity,
    tune_weights,
    unigram_perplexity,
    windows,
)

PERPLEXITIES = [unigram_perplexity, interpolated_trigram_perplexity, kneser_ney_perplexity]
SMALL_VOCAB = 5
small_texts = st.lists(st.integers(0, SMALL_VOCAB - 1), min_size=1, max_size=60)


def every_word_after(context, vocab_size):
    contexts = np.tile(np.array(context, dtype=np.int64), (vocab_size, 1))
    return contexts, np.arange(vocab_size)


@pytest.fixture(scope="module")
def novel():
    """Pride and Prejudice as word ids, rare words sharing the last one; a tenth is held out."""
    path = files("lightning_align") / "data" / "corpora" / "pride_and_prejudice.txt.xz"
    words = re.findall(r"\w+|[^\w\s]", lzma.decompress(path.read_bytes()).decode())
    vocab_size = 4096
    ids = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocab_size - 1))}
    tokens = np.array([ids.get(word, vocab_size - 1) for word in words])
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:], vocab_size


def test_unigram_worked_example():
    """Counts (2, 1, 0) plus one over 6: p = 1/2, 1/3, 1/6. Predicted are the tokens 1 and 2, so the
    perplexity is (1/3 * 1/6) ** (-1/2) = sqrt(18); with the first token too, (1/36) ** (-1/3).
    """
    assert unigram_perplexity([0, 0, 1], [0, 1, 2], 3) == pytest.approx(math.sqrt(18))
    assert unigram_perplexity([0, 0, 1], [0, 1, 2], 3, first_target=0) == pytest.approx(
        36 ** (1 / 3)
    )


def test_trigram_components_worked_example():
    """Text 0 1 0 1 1 over V = 3. Bigrams 01 10 01 11, trigrams 010 101 011.

    After (0, 1): p_0 = 1/3; p_1 = (2/5, 3/5, 0); p_2(. | 1) = (1/2, 1/2, 0); p_3 = (1/2, 1/2, 0).
    After (2, 0): "2 0" is unseen, so p_3 repeats p_2(. | 0) = (0, 1, 0).
    After (0, 2): 2 is unseen, so p_3 = p_2 = p_1.
    """
    model = TrigramComponents(np.array([0, 1, 0, 1, 1]), 3)
    uniform, unigram = [1 / 3] * 3, [0.4, 0.6, 0]
    expected = {
        (0, 1): [uniform, unigram, [0.5, 0.5, 0], [0.5, 0.5, 0]],
        (2, 0): [uniform, unigram, [0, 1, 0], [0, 1, 0]],
        (0, 2): [uniform, unigram, unigram, unigram],
    }
    for context, columns in expected.items():
        ours = model.probabilities(*every_word_after(context, 3))
        np.testing.assert_allclose(ours.T, columns)


def test_tune_weights_worked_example():
    """Three tokens only component 0 can explain and one only component 1 can: weights 3/4, 1/4."""
    components = np.array([[0.9, 0.0], [0.2, 0.0], [0.5, 0.0], [0.0, 0.1]])
    np.testing.assert_allclose(tune_weights(components), [0.75, 0.25])


def test_tune_weights_finds_the_maximum_likelihood():
    rng = np.random.default_rng(0)
    components = rng.uniform(0.01, 1.0, (200, 2))
    ours = tune_weights(components, tolerance=1e-14, steps=20_000)[0]
    grid = np.linspace(0, 1, 2001)
    likelihoods = [np.log(components @ [weight, 1 - weight]).mean() for weight in grid]
    assert ours == pytest.approx(grid[int(np.argmax(likelihoods))], abs=5e-4)


def test_interpolated_trigram_worked_example():
    """Text 0 1 0 1 ... of 90 tokens, the last 9 tune. Bigram and trigram are certain, the uniform
    says 1/2 and alone explains the one virtual unseen token; the unigram is dominated. With weight
    L on the uniform the likelihood is 9 log(1 - L/2) + log(L/2), largest at L = 2/10, so every
    token has probability 9/10.
    """
    ours = interpolated_trigram_perplexity([0, 1] * 45, [0, 1, 0, 1], 2, tuning_fraction=0.1)
    assert ours == pytest.approx(10 / 9, abs=1e-4)


def test_interpolated_trigram_counts_the_tuning_slice_too():
    """Token 2 occurs only in the slice that tunes the weights, token 3 nowhere."""
    train = [0, 1] * 49 + [0, 2]
    seen, unseen = (interpolated_trigram_perplexity(train, [0, last], 4) for last in (2, 3))
    assert seen < 0.9 * unseen


def test_discounts_worked_example():
    """n1..n4 = 4, 2, 1, 1: Y = 1/2; D1 = 1 - 2Y 2/4 = 1/2, D2 = 2 - 3Y 1/2 = 5/4, D3+ = 1."""
    counts = np.array([1] * 4 + [2] * 2 + [3] + [4] + [9] * 5)
    np.testing.assert_allclose(discounts(counts), [0, 0.5, 1.25, 1.0])


def test_discounts_of_text_without_singletons_stay_positive():
    assert (discounts(np.array([2, 2, 7]))[1:] > 0).all()
    assert (discounts(np.array([], dtype=np.int64))[1:] > 0).all()


def test_kneser_ney_worked_example():
    """Text 0 1 0 2 0 1 over V = 3.

    All four trigrams occur once: n1 = 4, so D1 = 1 and every trigram hands all its mass down; so
    do the four middles (1,0) (0,2) (2,0) (0,1). Distinct bigrams 01 10 02 20 end in 0 twice and in
    1 and 2 once: n1 = 2, n2 = 1, Y = 1/2, D1 = 1/2, D2 = 2, freed mass 1/2 + 1/2 + 2 = 3 of 4.
    p(0) = (2 - 2 + 3/3) / 4 = 1/4; p(1) = p(2) = (1 - 1/2 + 3/3) / 4 = 3/8.
    """
    model = KneserNeyTrigram(np.array([0, 1, 0, 2, 0, 1]), 3)
    for context in [(0, 1), (1, 0), (2, 2), (3, 3)]:
        ours = model.probabilities(*every_word_after(context, 3))
        np.testing.assert_allclose(ours, [0.25, 0.375, 0.375])


def kneser_ney_by_definition(text, u, v, w):
    """The same model from the formulas, one Python dictionary per order; slow and obvious."""
    trigrams = Counter(zip(text, text[1:], text[2:], strict=False))
    bigrams = Counter(pairwise(text))
    middle = Counter(key[1:] for key in trigrams)
    last = Counter(key[1:] for key in bigrams)
    p = 1 / SMALL_VOCAB
    for counts, context in [(last, ()), (middle, (v,)), (trigrams, (u, v))]:
        followers = {key: c for key, c in counts.items() if key[:-1] == context}
        if not followers:
            continue
        discount = discounts(np.array(list(counts.values())))
        gamma = sum(discount[min(c, 3)] for c in followers.values())
        count = followers.get((*context, w), 0)
        p = (count - discount[min(count, 3)] + gamma * p) / sum(followers.values())
    return p


@given(text=small_texts, u=st.integers(0, SMALL_VOCAB), v=st.integers(0, SMALL_VOCAB))
@settings(max_examples=50, deadline=None)
def test_kneser_ney_matches_its_definition(text, u, v):
    ours = KneserNeyTrigram(np.array(text), SMALL_VOCAB).probabilities(
        *every_word_after((u, v), SMALL_VOCAB)
    )
    theirs = [kneser_ney_by_definition(text, u, v, w) for w in range(SMALL_VOCAB)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@given(text=small_texts, u=st.integers(0, SMALL_VOCAB), v=st.integers(0, SMALL_VOCAB))
@settings(max_examples=50, deadline=None)
def test_probabilities_sum_to_one_after_any_context(text, u, v):
    where = every_word_after((u, v), SMALL_VOCAB)  # SMALL_VOCAB itself: before the beginning
    components = TrigramComponents(np.array(text), SMALL_VOCAB).probabilities(*where)
    kneser_ney = KneserNeyTrigram(np.array(text), SMALL_VOCAB).probabilities(*where)
    np.testing.assert_allclose(components.sum(axis=0), 1)
    np.testing.assert_allclose(kneser_ney.sum(), 1)
    assert (kneser_ney > 0).all()


def test_windows_are_the_two_tokens_before_each_target():
    contexts, targets = windows(np.array([5, 6, 7]), 1, 9)
    assert contexts.tolist() == [[9, 5], [5, 6]]
    assert targets.tolist() == [6, 7]


@pytest.mark.parametrize("perplexity", PERPLEXITIES)
def test_unseen_tokens_have_finite_perplexity(perplexity):
    assert 1 < perplexity([0, 1] * 20, [4, 3, 2, 0, 4], 5) < 1e6


@pytest.mark.parametrize("perplexity", PERPLEXITIES)
def test_first_target_chooses_what_is_predicted(perplexity):
    """Twice the log of a two-token text is the log of each of its tokens."""
    train, text = [0, 1, 1, 2, 0, 1, 2, 2, 0, 1] * 3, [1, 0]
    both = perplexity(train, text, 3, first_target=0)
    second = perplexity(train, text, 3, first_target=1)
    first = perplexity(train, text[:1], 3, first_target=0)
    assert both**2 == pytest.approx(first * second)
    assert second != pytest.approx(first)


def test_the_real_novel_is_easier_the_better_the_model(novel):
    unigram, trigram, kneser_ney = (perplexity(*novel) for perplexity in PERPLEXITIES)
    assert kneser_ney < 0.95 * trigram < 0.95 * 0.5 * unigram


def test_real_novel_discounts_lie_in_their_range(novel):
    train, _, vocab_size = novel
    for discount in KneserNeyTrigram(train, vocab_size).discounts:
        assert (discount[1:] > 0).all()
        assert (discount <= [0, 1, 2, 3]).all()
        assert (np.diff(discount) > 0).all()  # in real text the discount grows with the count


def test_200_000_tokens_take_under_3_seconds():
    rng = np.random.default_rng(0)
    train, held_out = rng.zipf(1.2, 200_000) % 8192, rng.zipf(1.2, 20_000) % 8192
    started = time.process_time()
    assert all(math.isfinite(perplexity(train, held_out, 8192)) for perplexity in PERPLEXITIES)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("perplexity", PERPLEXITIES)
@pytest.mark.parametrize(
    ("train", "held_out", "vocab_size", "options", "rule"),
    [
        ([], [0, 1], 2, {}, r"train_tokens=.*at least"),
        ([[0, 1, 0]], [0, 1], 2, {}, r"train_tokens=.*one row"),
        ([0, 1, 0], [0], 2, {}, r"eval_tokens=.*at least 2"),
        ([0, 1, 0], [0, 2], 2, {}, r"eval_tokens=2.*\[0, 2\)"),
        ([0, -1, 0], [0, 1], 2, {}, r"train_tokens=-1.*\[0, 2\)"),
        ([0.5, 0.5], [0, 1], 2, {}, r"train_tokens='float64'.*integer"),
        ([0, 1, 0], [0, 1], 0, {}, r"vocab_size=0"),
        ([0, 1, 0], [0, 1], 2, {"first_target": -1}, r"first_target=-1"),
    ],
)
def test_bad_input_is_refused(perplexity, train, held_out, vocab_size, options, rule):
    with pytest.raises(ValueError, match=rf"^{perplexity.__name__}\({rule}"):
        perplexity(train, held_out, vocab_size, **options)


def test_tuning_fraction_must_leave_both_sides():
    with pytest.raises(ValueError, match=r"tuning_fraction=1\.0\): must be in \(0, 1\)"):
        interpolated_trigram_perplexity([0, 1, 0], [0, 1], 2, tuning_fraction=1.0)
