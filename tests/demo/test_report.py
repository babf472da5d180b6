import math

import pytest

from lightning_align.demo.report import before_after_table, format_value, sample_block


def test_table_is_aligned():
    ours = before_after_table(
        [
            ("validation perplexity", 43.2149, 44.02),
            ("preference accuracy", 0.5, 0.9375),
            ("KL to the reference", None, 1234.5),
        ]
    )
    assert ours == (
        "                       before   after\n"
        "-------------------------------------\n"
        "validation perplexity   43.21   44.02\n"
        "preference accuracy       0.5  0.9375\n"
        "KL to the reference         -   1,234\n"
    )


def test_table_takes_other_columns():
    ours = before_after_table([("unigram", 459.6)], headers=("model", "perplexity"))
    assert ours == "model    perplexity\n-------------------\nunigram       459.6\n"


def test_table_without_rows_is_its_header():
    assert before_after_table([]) == "  before  after\n---------------\n"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"rows=\('kl', 1\.0\)\): every row must have 3 columns"):
        before_after_table([("kl", 1.0)])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.123456, "0.1235"),
        (-0.00012345, "-0.0001234"),
        (999.96, "1000"),
        (12345.6, "12,346"),
        (1_000_000, "1,000,000"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("94 %", "94 %"),
        (None, "-"),
    ],
)
def test_values_have_four_digits(value, text):
    assert format_value(value) == text


def test_samples_are_titled_wrapped_and_indented():
    ours = sample_block(
        "It is a truth", [("before", "one two three four\n\nfive"), ("after", "")], width=16
    )
    assert ours == (
        "prompt\n    It is a\n    truth\n"
        "before\n    one two\n    three four\n    five\n"
        "after\n    (empty)\n"
    )


def test_control_characters_do_not_reach_the_terminal():
    ours = sample_block("a\x1b[2Jb", [("after", "c\rd\te\x00f\x85g")])
    assert set(ours) - {"\n"} == set("    prompt after a�[2Jb c�d�e�f�g")
