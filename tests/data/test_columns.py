"""Files with other columns than ours, and in the forms of Alpaca and ShareGPT."""

import json
import re
import warnings

import pytest

from lightning_align.data.columns import named_columns
from lightning_align.modules.conversation_data import ConversationDataModule
from lightning_align.modules.preference_data import PreferenceDataModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.chat import CHATML, assistant, chat_tokenizer, system, user

PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "11"}
TALK = [system("Add."), user("1+1?"), assistant("2"), user("2+2?"), assistant("4")]
SHAREGPT = [
    {"from": "human", "value": "1+1?"},
    {"from": "gpt", "value": "2"},
    {"from": "human", "value": "2+2?"},
    {"from": "gpt", "value": "4"},
]


def set_up(kind, tmp_path, rows, name="a.jsonl", **options):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ByteTokenizer() if kind is PreferenceDataModule else chat_tokenizer(CHATML)
    data = kind(path, options.pop("tokenizer", given), **options)
    data.setup()
    return data


def pairs(tmp_path, rows, **options):
    return set_up(PreferenceDataModule, tmp_path, rows, **options)


def chats(tmp_path, rows, **options):
    return set_up(ConversationDataModule, tmp_path, rows, **options)


def quiet(make, *args, **options):
    """What is read without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make(*args, **options).fingerprint


def test_a_prompt_under_another_name_is_refused_until_it_is_named(tmp_path):
    rows = [{"question": "1+1?", "chosen": "2", "rejected": "3", "score": 5}]
    message = (
        r"PreferenceDataModule\(paths='.*a\.jsonl'\): line 1 has no column 'prompt', and text that"
        r" is not read in 'question'\. Name the prompt, as in prompt_column='question', or set"
        r" prompt_column=None if"
    )
    with pytest.raises(ValueError, match=message):
        pairs(tmp_path, rows)
    with pytest.warns(UserWarning, match="columns that are not read: 'score'"):
        named = pairs(tmp_path, rows, prompt_column="question")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = pairs(tmp_path, [{"prompt": "1+1?", "chosen": "2", "rejected": "3"}])
    assert named.fingerprint == ours.fingerprint


def test_that_there_is_no_prompt_may_be_said(tmp_path):
    rows = [{"chosen": "1+1? 2", "rejected": "1+1? 3", "source": "a book"}]
    with pytest.raises(ValueError, match=r"no column 'prompt'.*'source'"):
        pairs(tmp_path, rows)
    with pytest.warns(UserWarning, match="not read: 'source'"):
        data = pairs(tmp_path, rows, prompt_column=None)
    assert data.fingerprint == quiet(pairs, tmp_path, [{k: rows[0][k] for k in list(rows[0])[:2]}])


def test_columns_that_nobody_reads_are_named_once(tmp_path):
    rows = [{**PAIR, "id": number, "note": None, "tools": None} for number in range(5)]
    rows[3]["source"] = "a"
    with pytest.warns(UserWarning, match="not read") as caught:
        pairs(tmp_path, rows)
    told = [str(one.message) for one in caught if "not read" in str(one.message)]
    assert len(told) == 1
    assert re.fullmatch(r"Pref.*a\.jsonl'\): columns that are not read: 'id', 'source'", told[0])


def test_all_columns_of_pairs_may_have_other_names(tmp_path):
    rows = [{"prompt": "good", "question": "1+1?", "best": "2", "worst": "3"}]
    with pytest.warns(UserWarning, match="not read: 'prompt'"):
        data = pairs(
            tmp_path, rows, prompt_column="question", chosen_column="best", rejected_column="worst"
        )
    assert data.fingerprint == quiet(
        pairs, tmp_path, [{"prompt": "1+1?", "chosen": "2", "rejected": "3"}]
    )


def test_messages_are_passed_over_where_the_user_says_so(tmp_path):
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]
    rows = [{"messages": talk, "problem": "1+1?", "solution": "2"}]
    names = {"prompt_column": "problem", "completion_column": "solution"}
    with pytest.raises(ValueError, match=r"Set messages_column=None to take the prompt"):
        chats(tmp_path, rows, **names)
    with pytest.warns(UserWarning, match="not read: 'messages'"):
        data = chats(tmp_path, rows, **names, messages_column=None)
    assert data.fingerprint == quiet(chats, tmp_path, [{"prompt": "1+1?", "completion": "2"}])


def test_names_may_be_swapped(tmp_path):
    swapped = {"prompt_column": "completion", "completion_column": "prompt"}
    texts = [{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": "a"}]
    prints = [
        quiet(chats, tmp_path, texts[:1], **swapped),
        quiet(chats, tmp_path, texts[1:]),
        quiet(chats, tmp_path, texts[:1]),
    ]
    assert prints[0] == prints[1] != prints[2]


def test_unpaired_records_under_other_names(tmp_path):
    rows = [{"q": "a", "a": "b", "good": True}, {"q": "b", "a": "b", "good": False}]
    ours = [{"prompt": r["q"], "completion": r["a"], "label": r["good"]} for r in rows]
    names = {"prompt_column": "q", "completion_column": "a", "label_column": "good"}
    assert quiet(pairs, tmp_path, rows, **names) == quiet(pairs, tmp_path, ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "asked"}, "line 1 has no column 'asked', as prompt_column says; colu"),
        ({"chosen_column": ""}, r"chosen_column=''\): must be the name of a column, as text"),
        ({"chosen_column": 3}, r"chosen_column=3\): must be text"),
        ({"chosen_column": "prompt"}, r"chosen_column='prompt'\): is the prompt_column, too"),
    ],
)
def test_names_that_lead_nowhere(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"PreferenceDataModule.*{message}"):
        pairs(tmp_path, [PAIR], **options)


def test_what_is_missing_can_be_named(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'rejected'.*Say with rejected_column what"):
        pairs(tmp_path, [{"prompt": "a", "chosen": "b", "bad": "c"}])
    with pytest.raises(ValueError, match=r"'question', 'answer'\. Name them with messages_column"):
        chats(tmp_path, [{"question": "a", "answer": "b"}])


def test_errors_have_the_files_own_names(tmp_path):
    with pytest.raises(ValueError, match="column 'question' must be text, not int"):
        pairs(tmp_path, [{"question": 1, "chosen": "b", "rejected": "c"}], prompt_column="question")
    with pytest.raises(ValueError, match="column 'chat': message 1 has no role"):
        chats(tmp_path, [{"chat": [{"text": "a"}]}], messages_column="chat")


def test_nothing_left_says_what_was_not_read(tmp_path):
    rows = [{"question": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}]
    with pytest.raises(ValueError, match=r"nothing is left \(columns that are not read: 'question"):
        pairs(tmp_path, rows, tokenizer=chat_tokenizer(CHATML))


# ShareGPT


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"conversations": [{"from": "system", "value": "Add."}, *SHAREGPT]}, {}),
        ({"conversations": SHAREGPT, "system": "Add."}, {}),
        ({"conversations": TALK}, {}),
        ({"messages": [{"from": "system", "value": "Add."}, *SHAREGPT]}, {}),
        ({"chat": [TALK[0], *SHAREGPT]}, {"messages_column": "chat"}),
    ],
)
def test_sharegpt_is_messages(tmp_path, record, options):
    ours = quiet(chats, tmp_path, [{"messages": TALK}])
    assert quiet(chats, tmp_path, [record], **options) == ours


def test_a_speaker_that_nobody_knows(tmp_path):
    talk = [*SHAREGPT[:1], {"from": "narrator", "value": "Later."}]
    with pytest.raises(ValueError, match="line 1: a message is from 'narrator', and must be fro"):
        chats(tmp_path, [{"conversations": talk}])


def test_more_than_is_said_is_named(tmp_path):
    talk = [*SHAREGPT[:1], {**SHAREGPT[1], "weight": 0}]
    with pytest.warns(UserWarning, match=r"not read: 'id', 'messages\[\]\.weight'"):
        chats(tmp_path, [{"conversations": talk, "id": 1}])


def test_sharegpt_pairs(tmp_path):
    answers = {name: {"from": "gpt", "value": PAIR[name]} for name in ("chosen", "rejected")}
    ours = {name: [assistant(PAIR[name])] for name in ("chosen", "rejected")}
    ours["prompt"] = [user("1+1?")]
    theirs = {"conversations": [{"from": "human", "value": "1+1?"}], **answers}
    prints = [
        quiet(pairs, tmp_path, [record], tokenizer=chat_tokenizer(CHATML))
        for record in (ours, theirs)
    ]
    assert prints[0] == prints[1]


# Alpaca


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"instruction": "Add.", "input": "", "output": "2"}, [user("Add."), assistant("2")]),
        ({"instruction": "Add.", "output": "2"}, [user("Add."), assistant("2")]),
        (
            {"instruction": "Add.", "input": "1 and 1", "output": "2"},
            [user("Add.\n\n1 and 1"), assistant("2")],
        ),
        (
            {"instruction": "Add.", "input": None, "output": "2", "system": "Be brief."},
            [system("Be brief."), user("Add."), assistant("2")],
        ),
        (
            {"instruction": "Add.", "input": "", "output": "2", "system": ""},
            [user("Add."), assistant("2")],
        ),
    ],
)
def test_alpaca_is_messages(tmp_path, record, messages):
    ours = quiet(chats, tmp_path, [{"messages": messages}])
    assert quiet(chats, tmp_path, [record]) == ours


def test_alpaca_pairs(tmp_path):
    ours = {
        "prompt": [user("Add.\n\n1+1?")],
        "chosen": [assistant("2")],
        "rejected": [assistant("3")],
    }
    theirs = {"instruction": "Add.", "input": "1+1?", "chosen": "2", "rejected": "3"}
    prints = [
        quiet(pairs, tmp_path, [record], tokenizer=chat_tokenizer(CHATML))
        for record in (ours, theirs)
    ]
    assert prints[0] == prints[1]


def test_alpacas_columns_may_be_named_as_texts(tmp_path):
    rows = [{"instruction": "a", "output": "b"}]
    names = {"prompt_column": "instruction", "completion_column": "output"}
    ours = quiet(chats, tmp_path, [{"prompt": "a", "completion": "b"}])
    assert quiet(chats, tmp_path, rows, **names) == ours


def test_alpaca_needs_a_chat_template(tmp_path):
    rows = [{"instruction": "a", "output": "b"}]
    with pytest.raises(ValueError, match=r"chat_template=None\): the tokenizer has no chat templ"):
        chats(tmp_path, rows, tokenizer=chat_tokenizer())


def test_an_instruction_that_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="line 1: column 'instruction' must be text, not int"):
        chats(tmp_path, [{"instruction": 3, "output": "b"}])


def test_only_other_names_are_kept():
    columns = named_columns("Here", prompt="question", chosen="chosen", rejected=None)
    assert columns.theirs == {"prompt": "question", "rejected": None}
    assert (columns.shown("prompt"), columns.shown("chosen")) == ("question", "chosen")
