"""Reading a template, rendering with it, and what is said of messages that are none."""

import pytest

from lightning_align.data.chat_template import (
    CLOCK,
    ChatTemplate,
    check_messages,
    read_chat_template,
    read_tools,
)
from lightning_align.data.paths import find_files
from tests.helpers.chat import CHATML, MARKED, WITH_TOOLS, assistant, chat_tokenizer, user

TALK = [user("Spain?"), assistant("Madrid.")]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (found,) = find_files("Here", "paths", [str(tmp_path / "a.jsonl")])
    return found


def test_text_and_file_are_read_alike(tmp_path):
    (tmp_path / "chat.jinja").write_text(MARKED)
    assert read_chat_template("Here", tmp_path / "chat.jinja") == MARKED
    assert read_chat_template("Here", MARKED) == MARKED


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("no-such-folder/chat.jinja", "the file cannot be read"),
        ("chatml", "must be Jinja text or the path of a .jinja file"),
        ("{% for %}", "must be a Jinja template, but of line 1 Jinja says"),
        ("{% generation %}", "must be a Jinja template"),
    ],
)
def test_what_is_no_template_is_named(template, rule):
    with pytest.raises(ValueError, match=rule) as error:
        read_chat_template("Here", template)
    assert str(error.value).startswith("Here(chat_template=")


def test_a_prompt_ends_where_the_assistant_begins(file):
    template = ChatTemplate(file, chat_tokenizer(CHATML))
    whole = template.render("line 1", TALK, None)
    prompt = template.render("line 1", TALK[:1], None, prompt=True)
    assert whole == prompt + "Madrid.<|im_end|>\n"


def test_generation_tells_the_tokens_of_the_assistant(file):
    template = ChatTemplate(file, chat_tokenizer(MARKED))
    assert template.marks_answers(None)
    assert not ChatTemplate(file, chat_tokenizer(CHATML)).marks_answers(None)
    ids, mask = template.render_marked("line 1", TALK, None)
    marked = [i for i, m in zip(ids, mask, strict=True) if m]
    assert template.tokenizer.decode(marked) == "Madrid.<|im_end|>\n"


def test_tools_reach_the_template(file):
    template = ChatTemplate(file, chat_tokenizer(WITH_TOOLS))
    assert '"name": "clock"' in template.render("line 1", TALK, [{"name": "clock"}])
    assert "tools" not in template.render("line 1", TALK, None)


def test_the_date_of_a_template_is_the_same_every_day(file):
    dated = "{{ strftime_now('%d %b %Y, %A') }}" + CHATML
    text = ChatTemplate(file, chat_tokenizer(dated)).render("line 1", TALK, None)
    assert text.startswith("26 Jul 2024, Friday<|im_start|>")
    assert "strftime_now" in CLOCK


def test_a_tokenizer_without_a_template(file):
    with pytest.raises(ValueError, match=r"chat_template=None\): the tokenizer has no chat"):
        ChatTemplate(file, chat_tokenizer()).text(None)


def test_the_place_of_messages_that_the_template_refuses(file):
    refusing = "{{ raise_exception('roles must alternate') }}"
    template = ChatTemplate(file, chat_tokenizer(refusing))
    with pytest.raises(ValueError, match=r"line 7: .* \(user, assistant\): roles must alternate"):
        template.render("line 7", TALK, None)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("hello", "must be a list of messages, not str"),
        ([], "must hold at least one message"),
        ([TALK[0], "hello"], "message 2 must be an object, not str"),
        ([{"content": "x"}], "message 1 has no role; keys found: 'content'"),
        ([{"role": "user"}], "has neither content nor tool_calls"),
        ([{"role": "user", "content": 3}], "content of type 'int'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content of type 'image'"),
    ],
)
def test_what_are_no_messages(file, value, rule):
    with pytest.raises(ValueError, match=f"line 1: column 'messages'.*{rule}"):
        check_messages(file, "line 1", "messages", value)


def test_messages_are_returned_as_they_are(file):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    assert check_messages(file, "line 1", "messages", [*TALK, calls]) == [*TALK, calls]


@pytest.mark.parametrize(
    ("tools", "found"),
    [(None, None), ([], None), (" ", None), ('[{"a": 1}]', [{"a": 1}]), ([{"a": 1}], [{"a": 1}])],
)
def test_tools_may_be_json_text(file, tools, found):
    assert read_tools(file, "line 1", {"tools": tools}) == found


@pytest.mark.parametrize(
    ("tools", "rule"), [("[{", "must be JSON"), (["clock"], "must be a list of JSON schemas")]
)
def test_what_are_no_tools(file, tools, rule):
    with pytest.raises(ValueError, match=f"line 1: column 'tools' {rule}"):
        read_tools(file, "line 1", {"tools": tools})
