import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.paths import find_files
from lightning_align.data.preference import (
    Pair,
    PreferenceDataset,
    _fit,
    collate_pairs,
    hold_out_prompts,
    read_pairs,
)
from lightning_align.data.sampler import padding
from tests.helpers.byte_tokenizer import ByteTokenizer

tokens = st.lists(st.integers(2, 50), min_size=1, max_size=12)
NAMES = ("input_ids", "completion_mask", "attention_mask")
PROMPT = {"prompt": "p", "chosen": "yes", "rejected": "no"}


def ids(values):
    return np.array(values, dtype=np.int32)


def read(tmp_path, rows, tokenizer=None, *, name="a.jsonl", **options):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = find_files("PreferenceDataModule", "paths", str(tmp_path / name))
    tokenizer = tokenizer or ByteTokenizer()
    return read_pairs(files, tokenizer, **{"max_length": 100, "append_eos": True, **options})


def texts(pair, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    return tuple(
        tokenizer.decode([i for i in part if i > 1]) + "$" * int(part[-1] == 0) for part in pair
    )


def test_worked_batch():
    pairs = [Pair(ids([5, 6, 7]), ids([8, 9]), ids([10])), Pair(ids([11]), ids([12]), ids([13, 0]))]
    batch = collate_pairs(pairs, pad_token_id=1)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9],
        [11, 12, 1, 1, 1],
        [5, 6, 7, 10, 1],
        [11, 13, 0, 1, 1],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
    ]
    assert batch["completion_mask"].tolist() == [
        [0, 0, 0, 1, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 1, 1, 0, 0],
    ]


@pytest.mark.peer
@settings(deadline=None)
@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=6))
def test_collate_pairs_matches_trl(examples):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    theirs = DataCollatorForPreference(pad_token_id=1)(
        [dict(zip(names, example, strict=True)) for example in examples]
    )
    ours = collate_pairs([Pair(*map(ids, example)) for example in examples], pad_token_id=1)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@pytest.mark.peer
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@settings(deadline=None)
@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=6), st.integers(2, 24))
def test_what_is_cut_matches_trl(truncation_mode, examples, max_length):
    """TRL drops prompts that fill a row with keep_start, and nothing else; ours what is useless."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    pairs = [Pair(*map(ids, example)) for example in examples]
    fitted = [_fit(pair, max_length, truncation_mode, Counter()) for pair in pairs]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    kept = [
        dict(zip(names, example, strict=True))
        for example, pair in zip(examples, fitted, strict=True)
        if not isinstance(pair, str)
    ]
    for pair, why in zip(pairs, fitted, strict=True):
        if isinstance(why, str):
            is_full = truncation_mode == "keep_start" and len(pair.prompt) >= max_length
            assert is_full or "are the same" in why
    if kept:
        fitted = [pair for pair in fitted if not isinstance(pair, str)]
        cut = {"max_length": max_length, "truncation_mode": truncation_mode}
        theirs = DataCollatorForPreference(pad_token_id=1, **cut)(kept)
        ours = PreferenceDataset(fitted, 1, max_length=max_length)[[*range(len(fitted))]]
        assert ours.keys() - theirs.keys() == {"number"}
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@settings(deadline=None)
@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=6))
def test_every_token_of_every_pair_is_in_the_batch(examples):
    batch = collate_pairs([Pair(*map(ids, example)) for example in examples], pad_token_id=1)
    rows = [p + c for p, c, _ in examples] + [p + r for p, _, r in examples]
    completions = [c for _, c, _ in examples] + [r for _, _, r in examples]
    for i, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        assert batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() == row
        assert batch["input_ids"][i][batch["completion_mask"][i].bool()].tolist() == completion
        assert batch["attention_mask"][i].tolist() == sorted(
            batch["attention_mask"][i].tolist(), reverse=True
        )


def test_a_padding_index_has_no_completion_tokens():
    dataset = PreferenceDataset([Pair(ids([5]), ids([6, 7]), ids([8]))] * 2, pad_token_id=1)
    real, empty = dataset[[1]], dataset[[padding(1)]]
    assert torch.equal(real["input_ids"], empty["input_ids"])
    assert torch.equal(real["attention_mask"], empty["attention_mask"])
    assert not empty["completion_mask"].any()
    assert real["completion_mask"].any(1).all()


def test_completions_are_closed_once(tmp_path):
    [pair] = read(tmp_path, [PROMPT])
    assert texts(pair) == ("p", "yes$", "no$")
    [pair] = read(tmp_path, [PROMPT], append_eos=False)
    assert texts(pair) == ("p", "yes", "no")


def test_an_end_of_text_token_that_is_there_is_not_doubled(tmp_path):
    from lightning_align.data.tokenizer import END_OF_TEXT, train_tokenizer

    tokenizer = train_tokenizer(["abc"], 257)
    [pair] = read(tmp_path, [{**PROMPT, "chosen": f"yes{END_OF_TEXT}"}], tokenizer)
    assert tokenizer.decode(pair.chosen) == f"yes{END_OF_TEXT}"
    assert tokenizer.decode(pair.rejected) == f"no{END_OF_TEXT}"


def test_a_prompt_begins_with_the_token_that_the_tokenizer_begins_texts_with(tmp_path):
    class WithBegin(ByteTokenizer):
        bos_token_id = 1

        def __call__(self, texts, *, add_special_tokens, **options):
            begin = [1] * add_special_tokens
            plain = super().__call__(texts)["input_ids"]
            return {"input_ids": [begin + text for text in plain]}

    [pair] = read(tmp_path, [PROMPT], WithBegin())
    assert pair.prompt[0] == 1
    assert 1 not in [*pair.prompt[1:], *pair.chosen, *pair.rejected]


def test_long_completions_are_cut_and_long_prompts_dropped(tmp_path):
    rows = [
        {"prompt": "1234", "chosen": "abcdef", "rejected": "uv"},
        {"prompt": "12345678", "chosen": "a", "rejected": "b"},
    ]
    message = re.escape("1 of 2 pairs dropped: 1 because the prompt has max_length=8 tokens")
    with pytest.warns(UserWarning, match=message) as warned:
        [pair] = read(tmp_path, rows, max_length=8)
    assert texts(pair) == ("1234", "abcd", "uv$")
    assert len(warned) == 1


def test_what_is_cut_is_counted_beside_what_is_dropped(tmp_path):
    rows = [PROMPT, {**PROMPT, "prompt": "1234567"}, {**PROMPT, "chosen": ""}]
    message = "1 of 3 pairs dropped: .* is empty. 2 row.s. cut to max_length: 2 lost the end of the"
    with pytest.warns(UserWarning, match=message) as warned:
        assert texts(read(tmp_path, rows, max_length=8)[1]) == ("1234567", "y", "n")
    assert len(warned) == 1


def test_keep_end_cuts_each_row_by_itself(tmp_path):
    """The row of the longer completion has less of the prompt, if anything; nothing is dropped."""
    rows = [
        {"prompt": "1234", "chosen": "abcdef", "rejected": "uv"},
        {"prompt": "123456789", "chosen": "abcdefghi", "rejected": "v"},
    ]
    message = "3 row.s. cut to max_length: 2 lost the beginning of the prompt; 1 lost the whole p"
    with pytest.warns(UserWarning, match=rf"paths='.*a\.jsonl'\): {message}") as warned:
        pairs = read(tmp_path, rows, max_length=8, truncation_mode="keep_end")
    assert len(warned) == 1
    batch = PreferenceDataset(pairs, 1, max_length=8)[[0, 1]]
    kept = [
        "".join(
            f"[{text}]" if is_completion else text
            for token, is_completion, is_token in zip(*row, strict=True)
            if is_token
            for text in ["$" if token == 0 else ByteTokenizer().decode([token])]
        )
        for row in zip(*(batch[name].tolist() for name in NAMES), strict=True)
    ]
    assert kept == [
        "4[a][b][c][d][e][f][$]",
        "[c][d][e][f][g][h][i][$]",
        "1234[u][v][$]",
        "456789[v][$]",
    ]


def test_keep_end_drops_completions_that_end_alike(tmp_path):
    rows = [{**PROMPT, "chosen": "no, yes", "rejected": "oh yes"}, PROMPT]
    with pytest.warns(UserWarning, match=r"1 of 2 pairs dropped: .*are the same \(up to max_leng"):
        assert len(read(tmp_path, rows, max_length=5, truncation_mode="keep_end")) == 1
    with pytest.raises(ValueError, match="nothing is left"):
        read(tmp_path, rows[:1], max_length=5, truncation_mode="keep_end")


def test_useless_pairs_are_dropped_with_one_warning_that_counts_them(tmp_path):
    rows = [
        PROMPT,
        {**PROMPT, "chosen": ""},
        {**PROMPT, "rejected": ""},
        {**PROMPT, "chosen": "same", "rejected": "same"},
        {**PROMPT, "chosen": "x" * 100 + "a", "rejected": "x" * 100 + "b"},
        {**PROMPT, "prompt": ""},
        {**PROMPT, "prompt": "x" * 100},
    ]
    with pytest.warns(UserWarning, match="6 of 7 pairs dropped") as warned:
        assert len(read(tmp_path, rows)) == 1
    assert len(warned) == 1
    message = str(warned[0].message)
    assert re.search(r"PreferenceDataModule\(paths='.*a\.jsonl'\)", message)
    for reason in (
        "2 because chosen or rejected is empty",
        "2 because chosen and rejected are the same",
        "1 because the prompt is empty",
        "1 because the prompt has max_length=100",
    ):
        assert reason in message


def test_no_pair_left(tmp_path):
    with pytest.raises(ValueError, match=r"nothing is left \(1 of 1 pairs dropped: 1 because"):
        read(tmp_path, [{**PROMPT, "chosen": "no"}])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": ""}, "chosen or rejected is empty"),
        ({"prompt": 8 * "p"}, "the prompt has max_length=8 tokens or more"),
        ({"prompt": 7 * "p", "chosen": "a", "rejected": "abc"}, "are the same .up to max_length."),
    ],
)
def test_no_pair_left_says_why(tmp_path, changes, reason):
    """The last: what is left of both completions, one token, is the same."""
    with pytest.raises(ValueError, match=rf"2 of 2 pairs dropped: 2 because .*{reason}\)"):
        read(tmp_path, 2 * [{**PROMPT, **changes}], max_length=8)


def test_an_empty_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl'\): is empty, and must hold pairs"):
        read(tmp_path, [])


def test_another_kind_of_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.pdf'\): .*name.* must end in \.jsonl"):
        read(tmp_path, [PROMPT], name="a.pdf")


def test_a_missing_column_is_named(tmp_path):
    rows = [PROMPT, {"prompt": "p", "response": "yes"}]
    message = "line 2 has no column 'chosen'; columns found: 'prompt', 'response'"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, rows)


def numbered(number, prompts):
    return [Pair(ids([10 + i % prompts]), ids([i + 100]), ids([i + 200])) for i in range(number)]


def test_pairs_of_one_prompt_are_held_out_together():
    train, val = hold_out_prompts("X", numbered(60, 10), 0.3, seed=0)
    prompts = [{int(pair.prompt[0]) for pair in part} for part in (train, val)]
    assert len(prompts[1]) == 3
    assert not prompts[0] & prompts[1]
    assert len(train) + len(val) == 60


def test_no_prompt_is_held_out_without_a_fraction():
    train, val = hold_out_prompts("X", numbered(6, 1), 0.0, seed=0)
    assert (len(train), len(val)) == (6, 0)


def test_a_single_prompt_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"X\(val_fraction=0\.5\): holds out whole prompts"):
        hold_out_prompts("X", numbered(6, 1), 0.5, seed=0)


def test_the_content_follows_every_token():
    pairs = [Pair(ids([5, 6]), ids([7]), ids([8])), Pair(ids([5]), ids([7]), ids([8]))]
    moved = [Pair(ids([5]), ids([6, 7]), ids([8])), pairs[1]]
    contents = {
        PreferenceDataset(variant, 1).content for variant in (pairs, pairs[::-1], moved, pairs[:1])
    }
    assert len(contents) == 4
    assert PreferenceDataset(pairs, 1).content == PreferenceDataset(list(pairs), 0).content


@pytest.mark.parametrize("max_length", [None, 2])
def test_a_batch_names_its_pairs_and_the_dataset_their_rows(max_length) -> None:
    pairs = [Pair(ids([5]), ids([6, 7]), ids([8])), Pair(ids([9]), ids([1]), ids([2, 3]))]
    dataset = PreferenceDataset(pairs, pad_token_id=0, first_number=10, max_length=max_length)
    batch = dataset[[1, padding(0), 0]]
    assert batch["number"].tolist() == [11, 10, 10]
    completions = dataset.completions()
    for row in (0, 2, 3, 5):
        prompt, completion = completions[int(batch["number"][row % 3]) - 10][row // 3]
        tokens = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert tokens.tolist() == [*prompt, *completion]
        assert batch["input_ids"][row][batch["completion_mask"][row].bool()].tolist() == list(
            completion
        )


def test_the_content_follows_every_cut():
    """And not the maximum itself, where it cuts nothing."""
    pairs = [Pair(ids([5, 6, 7]), ids([7, 8]), ids([8]))]
    contents = [PreferenceDataset(pairs, 1, max_length=most).content for most in (2, 3, 4, 5, None)]
    assert len(set(contents)) == 4
    assert contents[3] == contents[4] == "c80d2f8f5b7e93066c36d44d30332dc1"  # as ever
