"""Unpaired records: forms, labels, rows of a batch beside TRL's, what is dropped, bad input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.paths import find_files
from lightning_align.data.sampler import padding
from lightning_align.data.unpaired import (
    Labelled,
    UnpairedDataset,
    check_labels,
    collate_unpaired,
    hold_out_prompts,
    holds_unpaired,
    read_unpaired,
)
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.chat import CHATML, assistant, chat_tokenizer, user

GOOD = {"prompt": "p", "completion": "yes", "label": True}
BAD = {"prompt": "q", "completion": "no", "label": False}
tokens = st.lists(st.integers(2, 50), min_size=1, max_size=12)


def ids(values):
    return np.array(values, dtype=np.int32)


def write(tmp_path, rows, name="a.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_files("PreferenceDataModule", "paths", str(tmp_path / name))


def read(tmp_path, rows, tokenizer=None, **options):
    options = {"max_length": 100, "append_eos": True, **options}
    return read_unpaired(write(tmp_path, rows), tokenizer or ByteTokenizer(), **options)


def text(part):
    return ByteTokenizer().decode([i for i in part if i > 1]) + "$" * int(part[-1] == 0)


RECORDS = [
    Labelled(ids([5, 6, 7]), ids([8, 9]), True),
    Labelled(ids([11]), ids([12]), False),
    Labelled(ids([13, 14]), ids([15, 16, 17]), True),
]


def test_worked_batch():
    """The second half has each prompt with the completion before it, the last one's first."""
    batch = collate_unpaired(RECORDS, 1, max_length=5)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9],
        [11, 12, 1, 1, 1],
        [13, 14, 15, 16, 17],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 5]
    assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert batch["KL_input_ids"].tolist() == [
        [5, 6, 7, 15, 16],  # cut to five
        [11, 8, 9, 1, 1],
        [13, 14, 12, 1, 1],
    ]
    assert batch["KL_completion_mask"].sum(1).tolist() == [2, 2, 1]
    assert batch["label"].tolist() == [True, False, True]


@pytest.mark.peer
@settings(deadline=None)
@given(st.lists(st.tuples(tokens, tokens, st.booleans()), min_size=2, max_size=6))
def test_collate_unpaired_matches_trl(examples):
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    completions = [completion for _, completion, _ in examples]
    rows = [
        {"prompt_ids": prompt, "completion_ids": completion, "KL_completion_ids": other, "label": y}
        for (prompt, completion, y), other in zip(
            examples, completions[-1:] + completions[:-1], strict=True
        )
    ]
    theirs = DataCollatorForUnpairedPreference(pad_token_id=1, max_length=14)(rows)
    records = [Labelled(ids(p), ids(c), y) for p, c, y in examples]
    ours = collate_unpaired(records, 1, max_length=14)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


def test_keep_end_cuts_prompts_also_before_the_completions_of_others():
    batch = collate_unpaired(RECORDS, 1, 3, "keep_end")
    assert batch["input_ids"].tolist() == [[7, 8, 9], [11, 12, 1], [15, 16, 17]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1], [0, 1, 0], [1, 1, 1]]
    assert batch["KL_input_ids"].tolist() == [[15, 16, 17], [11, 8, 9], [13, 14, 12]]
    assert batch["KL_completion_mask"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    dataset = UnpairedDataset(RECORDS, 1, 3, truncation_mode="keep_end")
    assert torch.equal(dataset[[0, 1, 2]]["KL_input_ids"], batch["KL_input_ids"])


def test_keep_end_drops_no_long_prompt(tmp_path):
    rows = [{**GOOD, "prompt": 9 * "p"}, {**BAD, "completion": 9 * "n"}, BAD]
    message = "2 row.s. cut to max_length: 1 lost the beginning of the prompt; 1 lost the whole"
    with pytest.warns(UserWarning, match=message):
        records = read(tmp_path, rows, max_length=9, truncation_mode="keep_end")
    batch = UnpairedDataset(records, 1, 9, truncation_mode="keep_end")[[0, 1]]
    assert [text(row) for row in batch["input_ids"]] == ["pppppyes$", "nnnnnnnn$"]


def test_a_record_alone_has_no_other_completion():
    assert collate_unpaired(RECORDS[:1], 1, 9)["KL_completion_mask"].sum() == 0


def test_padding_is_read_and_counts_nowhere():
    """Nor does its completion stand behind another's prompt."""
    dataset = UnpairedDataset(RECORDS, 1, 9)
    batch, alone = dataset[[0, padding(2), 1]], dataset[[0, 1]]
    for name, values in alone.items():
        assert torch.equal(batch[name][:2], values), name
    for name in ("completion_mask", "KL_completion_mask"):
        assert batch[name][2].sum() == 0
    for name in ("attention_mask", "KL_attention_mask"):
        assert batch[name][2].sum() == 1
    nothing = dataset[[padding(0), padding(1)]]
    assert nothing["completion_mask"].sum() == nothing["KL_completion_mask"].sum() == 0
    assert nothing["input_ids"].shape == nothing["attention_mask"].shape == (2, 1)
    assert nothing["label"].shape == (2,)


def test_content_knows_labels_and_where_prompts_end():
    contents = {UnpairedDataset(records, 1, 9).content for records in (RECORDS, RECORDS[::-1])}
    changed = [RECORDS[0]._replace(label=False), *RECORDS[1:]]
    contents.add(UnpairedDataset(changed, 1, 9).content)
    moved = [Labelled(ids([5, 6]), ids([7, 8, 9]), True), *RECORDS[1:]]
    contents.add(UnpairedDataset(moved, 1, 9).content)
    assert len(contents) == 4


def test_content_knows_a_cut_that_only_completions_behind_other_prompts_have():
    """No record has more than five tokens, but the longest prompt and completion have six."""
    cuts = [(5, "keep_start"), (5, "keep_end"), (4, "keep_end"), (6, "keep_start"), (7, "keep_end")]
    contents = [UnpairedDataset(RECORDS, 1, n, truncation_mode=m).content for n, m in cuts]
    assert len(set(contents[:4])) == 4
    assert contents[3] == contents[4]


def test_texts_are_closed_and_cut(tmp_path):
    good, bad = read(tmp_path, [GOOD, BAD])
    assert (text(good.prompt), text(good.completion), good.label) == ("p", "yes$", True)
    assert (text(bad.prompt), text(bad.completion), bad.label) == ("q", "no$", False)
    with pytest.warns(UserWarning, match="1 row.s. cut to max_length: 1 lost the end of the co"):
        records = read(tmp_path, [GOOD], max_length=3)
    batch = UnpairedDataset(records, 1, 3)[[0]]
    assert text(batch["input_ids"][0]) == "pye"
    assert text(read(tmp_path, [GOOD], append_eos=False)[0].completion) == "yes"


def test_conversations_part_where_the_prompt_ends(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    row = {"prompt": [user("1+1?")], "completion": [assistant("2")], "label": False}
    (record,) = read(tmp_path, [row], tokenizer, max_length=1000)
    whole = tokenizer.apply_chat_template([user("1+1?"), assistant("2")], tokenize=False)
    opening = tokenizer.apply_chat_template(
        [user("1+1?")], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(record.prompt) == opening
    assert tokenizer.decode(record.completion) == whole.removeprefix(opening)
    assert record.label is False


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False)],
)
def test_labels_as_json_and_csv_write_them(tmp_path, label, expected):
    assert read(tmp_path, [{**GOOD, "label": label}])[0].label is expected


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,label\np,yes,True\nq,no,0\n")
    files = find_files("PreferenceDataModule", "paths", str(tmp_path / "a.csv"))
    assert holds_unpaired(files)
    records = read_unpaired(files, ByteTokenizer(), max_length=9, append_eos=True)
    assert [record.label for record in records] == [True, False]


def test_pairs_are_no_unpaired_records(tmp_path):
    assert holds_unpaired(write(tmp_path, [GOOD]))
    assert not holds_unpaired(write(tmp_path, [{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    assert not holds_unpaired(write(tmp_path, []))


def test_what_cannot_teach_is_dropped_and_counted(tmp_path):
    rows = [
        GOOD,
        {**GOOD, "completion": ""},
        {**BAD, "prompt": ""},
        {**BAD, "prompt": 9 * "q"},
        BAD,
    ]
    with pytest.warns(UserWarning, match=r"3 of 5 records dropped: 1 because the completion is e"):
        assert len(read(tmp_path, rows, max_length=9)) == 2
    with pytest.raises(ValueError, match=r"nothing is left \(1 of 1 records dropped"):
        read(tmp_path, [{**GOOD, "completion": ""}])
    with pytest.raises(ValueError, match="2 of 2 records dropped: 2 because the prompt has max_le"):
        read(tmp_path, 2 * [{**GOOD, "prompt": 9 * "q"}], max_length=9)


def test_prompts_are_held_out_whole():
    records = [Labelled(ids([n // 2 + 2]), ids([n + 2]), n % 2 == 0) for n in range(20)]
    train, val = hold_out_prompts("here", records, 0.3, seed=0)
    assert (len(train), len(val)) == (14, 6)
    assert not {int(r.prompt[0]) for r in train} & {int(r.prompt[0]) for r in val}


def test_both_labels_are_needed_to_learn(tmp_path):
    files = write(tmp_path, [GOOD, GOOD])
    with pytest.raises(ValueError, match=r"label of all 2 records to train on is True\. Both are"):
        check_labels(files[0], RECORDS[::2])
    check_labels(files[0], RECORDS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**GOOD, "label": "good"},
            r"line 1: column 'label' must be true or false, or 1 or 0",
        ),
        ({**GOOD, "label": 0.5}, "must be true or false"),
        ({**GOOD, "label": 2}, "must be true or false"),
        ({"prompt": "p", "completion": "c"}, r"line 1 has no column 'label'; columns found: 'p"),
        ({**GOOD, "prompt": [user("?")]}, "prompt and completion must both be text or both be mes"),
        ({**GOOD, "completion": 3}, "column 'completion' must be text, not int"),
    ],
)
def test_bad_records_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [row])


def test_a_batch_names_its_records_and_the_dataset_their_rows() -> None:
    dataset = UnpairedDataset(RECORDS, 1, 9, first_number=4)
    batch = dataset[[2, padding(0), 1]]
    assert batch["number"].tolist() == [6, 5, 4], "what fills up a batch is behind all records"
    for row, number in enumerate((2, 1)):
        ((_, completion),) = dataset.completions()[number]
        taught = batch["input_ids"][row][batch["completion_mask"][row].bool()]
        assert taught.tolist() == list(completion)
