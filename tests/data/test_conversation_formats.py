"""Which form a record has, and where the answers stand in the text of a conversation."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_align.data.chat_template import ChatTemplate
from lightning_align.data.conversation_formats import (
    MESSAGES,
    TEXTS,
    TWO_MESSAGES,
    Conversation,
    ConversationReader,
    answer_spans,
    format_of,
)
from lightning_align.data.paths import find_files
from tests.helpers.chat import CHATML, FORGETFUL, MARKED, assistant, chat_tokenizer, system, user

TALK = [system("Be brief."), user("Spain?"), assistant("Madrid."), user("France?")]
TALK = [*TALK, assistant("Paris.")]
TOKENIZER = chat_tokenizer(CHATML)


class NamedFile:
    """Where a record comes from."""

    where, url = "Here", "a.jsonl"

    def error(self, rule, way_out=""):
        return ValueError(f"{rule}. {way_out}")


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": TALK}, MESSAGES),
        ({"messages": TALK, "prompt": "a column like any other"}, MESSAGES),
        ({"prompt": "a", "completion": "b"}, TEXTS),
        ({"prompt": TALK[:2], "completion": TALK[2:3], "messages": None}, TWO_MESSAGES),
    ],
)
def test_format_of_a_record(record, form):
    assert format_of(NamedFile(), "line 1", record) == form


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ({"messages": TALK, "completion": "b"}, "both messages and a completion"),
        ({"text": "a"}, "columns found: 'text'"),
        ({"prompt": "a", "completion": TALK}, "must both be text or both be messages"),
    ],
)
def test_records_of_no_form(record, rule):
    with pytest.raises(ValueError, match=f"line 1.*{rule}"):
        format_of(NamedFile(), "line 1", record)


@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=4))
def test_answers_are_found_by_rendering_parts(turns):
    messages = [m for asked, said in turns for m in (user(asked), assistant(said))]
    template = ChatTemplate(NamedFile(), TOKENIZER)
    text = template.render("line 1", messages, None)
    spans = answer_spans(template, Conversation("line 1", messages, None, 0), text)
    assert [text[a:b] for a, b in spans] == [f"{said}<|im_end|>\n" for _, said in turns]


def test_answers_before_the_first_are_the_prompts():
    template = ChatTemplate(NamedFile(), TOKENIZER)
    text = template.render("line 1", TALK, None)
    spans = answer_spans(template, Conversation("line 1", TALK, None, 3), text)
    assert [text[a:b] for a, b in spans] == ["Paris.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "messages", "rule"),
    [
        (FORGETFUL, TALK, "writes the messages before and up to message 3 in another way"),
        (CHATML, TALK[2:], "the assistant speaks first"),
    ],
)
def test_parts_that_are_no_beginnings(template, messages, rule):
    template = ChatTemplate(NamedFile(), chat_tokenizer(template))
    text = template.render("line 1", messages, None)
    with pytest.raises(ValueError, match=f"{rule}.*Put {{% generation %}}"):
        answer_spans(template, Conversation("line 1", messages, None, 0), text)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by rendering", "by marks"])
def test_both_ways_learn_the_same_tokens(tmp_path, template):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    (file,) = find_files("Here", "paths", [str(path)])
    (example,) = ConversationReader(chat_tokenizer(template), True, True).read(file)
    learned = TOKENIZER.decode(example.ids[example.learned].tolist())
    assert learned == "Madrid.<|im_end|>\nParis.<|im_end|>\n"
