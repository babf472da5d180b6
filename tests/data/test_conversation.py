import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel

from lightning_align.data.conversation import (
    ConversationDataset,
    collate_conversations,
    hold_out_conversations,
    read_conversations,
)
from lightning_align.data.conversation_formats import ConversationReader, Example
from lightning_align.data.files import InputFile
from lightning_align.data.paths import find_files
from lightning_align.data.sampler import padding
from lightning_align.data.tokenizer import load_tokenizer
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.chat import (
    CHATML,
    FORGETFUL,
    MARKED,
    WITH_TOOLS,
    assistant,
    chat_tokenizer,
    system,
    user,
)

CHAT = [system("Be brief."), user("1+1?"), assistant("2"), user("2+2?"), assistant("4")]


@pytest.fixture(scope="module")
def plain():
    return chat_tokenizer(CHATML)


@pytest.fixture(scope="module")
def marked():
    return chat_tokenizer(MARKED)


def read(tmp_path, rows, tokenizer, *, max_length=1000, **options):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = find_files("ConversationDataModule", "paths", str(path))
    return read_conversations(files, tokenizer, max_length=max_length, **options)


def learned_runs(example, tokenizer):
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(example.learned, prepend=False, append=False))
    runs = [example.ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def text(example, tokenizer):
    return tokenizer.decode(example.ids, clean_up_tokenization_spaces=False)


# What is learned


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_worked_conversation(tmp_path, template):
    """ChatML by hand: the answers and what ends them are learned, nothing else."""
    tokenizer = chat_tokenizer(template)
    [example] = read(tmp_path, [{"messages": CHAT}], tokenizer)
    assert text(example, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert learned_runs(example, tokenizer) == ["2<|im_end|>\n", "4<|im_end|>\n"]
    batch = collate_conversations([example], pad_token_id=0)
    kept = batch["labels"][0] != -100
    assert kept.sum() == 6
    assert torch.equal(batch["labels"][0][kept], batch["input_ids"][0][kept])


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), contents), max_size=5)


@settings(max_examples=60, deadline=None)
@given(first=contents, turns=turns, answer=contents, use=st.sampled_from([CHATML, MARKED]))
def test_learned_tokens_are_exactly_the_answers(first, turns, answer, use):
    """Bytes and special tokens alone, so that no token can reach across."""
    tokenizer = _cached(use, 257)
    messages = [user(first), *({"role": r, "content": c} for r, c in turns), assistant(answer)]
    example = read_one(messages, tokenizer)
    answers = [m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant"]
    assert learned_runs(example, tokenizer) == answers
    assert text(example, tokenizer) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(" \n?anstwer Paris", max_size=12), min_size=2, max_size=6))
def test_a_token_that_reaches_into_the_prompt_is_not_learned(texts):
    """With merges a line break of the answer may join that before it: only that token is left."""
    tokenizer = _cached(CHATML, 600)
    messages = [(assistant if i % 2 else user)(content) for i, content in enumerate(texts)]
    messages.append(assistant("answer"))
    example = read_one(messages, tokenizer)
    answers = [m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant"]
    runs = learned_runs(example, tokenizer)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        missing = answer.removesuffix(run)
        assert answer.endswith(run)
        assert not missing.strip("\n ")
    whole = tokenizer(text(example, tokenizer), add_special_tokens=False)["input_ids"]
    assert example.ids.tolist() == whole


def _cached(template, size, cache={}):  # noqa: B006
    key = (template, size)
    if key not in cache:
        cache[key] = chat_tokenizer(template, size=size)
    return cache[key]


class OneRecord(InputFile):
    """A file that exists in memory."""

    def records(self, columns=None):
        yield "line 1", json.loads(self.url)


def read_one(messages, tokenizer, **options):
    file = OneRecord("X", "paths", json.dumps({"messages": messages}))
    options = {"assistant_only_loss": True, "append_eos": True, **options}
    [example] = ConversationReader(tokenizer, **options).read(file)
    return example


def test_a_token_across_the_boundary_belongs_to_the_prompt(tmp_path):
    """The template ends the prompt with a space that " yes" takes: nothing of " yes" is learned."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chat_tokenizer(template, size=600)
    assert len(tokenizer(" yes")["input_ids"]) == 1
    [example] = read(tmp_path, [{"messages": [user("?"), assistant("yes and no")]}], tokenizer)
    assert learned_runs(example, tokenizer) == [" and no\n"]


def test_a_token_across_the_end_of_an_answer_is_not_learned(tmp_path):
    """The space behind each message belongs to " user" or " assistant" once they follow."""
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = chat_tokenizer(template, size=600)
    chat = [user("a"), assistant(" yes"), user("b"), assistant(" no")]
    [example] = read(tmp_path, [{"messages": chat}], tokenizer)
    assert learned_runs(example, tokenizer) == [" yes", " no "]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_spaces_belong_to_a_token_also_where_offsets_leave_them_out(tmp_path, template):
    """GPT-NeoX's tokenizer trims the offsets of its tokens."""
    template = template.replace("assistant\n", "assistant: ").replace(
        "{{ message.role }}\n", "{{ message.role }}: "
    )
    answers = [" 2", "5 ", "4"]
    chat = [message for answer in answers for message in (user("?"), assistant(answer))]
    tokenizer = chat_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    [example] = read(tmp_path, [{"messages": chat}], tokenizer)
    ends = [f"{answer}<|im_end|>\n" for answer in answers]
    assert learned_runs(example, tokenizer) == ends
    assert tokenizer.backend_tokenizer.post_processor.trim_offsets


def test_half_of_a_surrogate_pair_is_no_text(tmp_path, plain):
    with pytest.raises(ValueError, match=r"line 1.* message 2 must be text, but it holds half of"):
        read(tmp_path, [{"messages": [user("?"), assistant("a \ud83d b")]}], plain)


def test_all_tokens(tmp_path, plain):
    [example] = read(tmp_path, [{"messages": CHAT}], plain, assistant_only_loss=False)
    assert example.learned.all()
    batch = collate_conversations([example, Example(example.ids[:3], example.learned[:3], b"")], 7)
    assert (batch["labels"][1] == -100).tolist() == [False] * 3 + [True] * (len(example.ids) - 3)


def test_all_tokens_of_a_conversation_without_answers(tmp_path, plain):
    rows = [{"messages": [user("a")]}]
    [example] = read(tmp_path, rows, plain, assistant_only_loss=False)
    assert example.learned.all()


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_answers_of_a_prompt_are_not_learned(tmp_path, template):
    tokenizer = chat_tokenizer(template)
    rows = [{"prompt": CHAT[:4], "completion": [*CHAT[4:], user("thanks"), assistant("welcome")]}]
    [example] = read(tmp_path, rows, tokenizer)
    assert learned_runs(example, tokenizer) == ["4<|im_end|>\n", "welcome<|im_end|>\n"]
    [everything] = read(tmp_path, rows, tokenizer, assistant_only_loss=False)
    assert everything.learned.all()


def test_prompt_and_completion_as_text(tmp_path, plain):
    rows = [{"prompt": "Q: ", "completion": "yes"}]
    [example] = read(tmp_path, rows, plain)
    assert learned_runs(example, plain) == ["yes<|endoftext|>"]
    [example] = read(tmp_path, rows, plain, append_eos=False)
    assert (text(example, plain), learned_runs(example, plain)) == ("Q: yes", ["yes"])
    [example] = read(tmp_path, rows, plain, assistant_only_loss=False)
    assert learned_runs(example, plain) == ["Q: yes<|endoftext|>"]


def test_an_empty_prompt_may_be_learned_from(tmp_path):
    tokenizer = chat_tokenizer(bos=True)
    [example] = read(tmp_path, [{"prompt": "", "completion": "yes"}], tokenizer)
    assert text(example, tokenizer) == "<s>yes<|endoftext|>"
    assert learned_runs(example, tokenizer) == ["yes<|endoftext|>"]


def test_texts_need_neither_a_template_nor_a_fast_tokenizer(tmp_path):
    [example] = read(tmp_path, [{"prompt": "a", "completion": "b"}], ByteTokenizer())
    assert example.ids.tolist() == [2 + ord("a"), 2 + ord("b"), 0]
    assert example.learned.tolist() == [False, True, True]


def test_tools_reach_the_template(tmp_path):
    tokenizer = chat_tokenizer(WITH_TOOLS)
    tool = {"type": "function", "function": {"name": "clock"}}
    rows = [{"messages": CHAT, "tools": tools} for tools in ([tool], json.dumps([tool]), None, [])]
    first, second, *without = read(tmp_path, rows, tokenizer)
    assert '[{"type": "function", "function": {"name": "clock"}}]' in text(first, tokenizer)
    assert text(second, tokenizer) == text(first, tokenizer)
    assert all("tools" not in text(example, tokenizer) for example in without)
    assert learned_runs(first, tokenizer) == ["2<|im_end|>\n", "4<|im_end|>\n"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(tmp_path, template):
    dated = "{{ strftime_now('%d %b %Y') }}" + template
    tokenizer = chat_tokenizer(dated)
    [example] = read(tmp_path, [{"messages": CHAT}], tokenizer)
    assert text(example, tokenizer).startswith("26 Jul 2024<|im_start|>system")


def test_a_message_may_be_tool_calls_alone(tmp_path):
    template = CHATML.replace("message.content", "(message.content or message.tool_calls | tojson)")
    tokenizer = chat_tokenizer(template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    [example] = read(tmp_path, [{"messages": [user("time?"), call]}], tokenizer)
    assert learned_runs(example, tokenizer) == ['[{"name": "clock"}]<|im_end|>\n']


def test_content_in_parts_of_text(tmp_path):
    tokenizer = chat_tokenizer(CHATML.replace("message.content", "message.content[0].text"))
    parts = [user([{"type": "text", "text": "a"}]), assistant([{"type": "text", "text": "b"}])]
    [example] = read(tmp_path, [{"messages": parts}], tokenizer)
    assert learned_runs(example, tokenizer) == ["b<|im_end|>\n"]


def test_a_prompt_beside_messages_is_a_column_like_any_other(tmp_path, plain):
    rows = [{"messages": CHAT, "prompt": "1+1?", "completion": None}]
    [example] = read(tmp_path, rows, plain)
    assert learned_runs(example, plain)[0] == "2<|im_end|>\n"


UNCLOSED = {
    "marks end early": MARKED.replace(
        "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
    ),
    # As in GLM-4.5, where the user's turn is what ends the assistant's.
    "nothing ends a turn": CHATML.replace("<|im_end|>\n", ""),
}


@pytest.mark.parametrize("template", UNCLOSED.values(), ids=UNCLOSED)
def test_answers_that_no_special_token_ends_are_warned_of(tmp_path, template):
    tokenizer = chat_tokenizer(template)
    with pytest.warns(UserWarning, match=r"in 2 conv.*, first .*line 1, no special token") as w:
        examples = read(tmp_path, [{"messages": CHAT}] * 2, tokenizer)
    assert len(w) == 1
    assert learned_runs(examples[0], tokenizer) == ["2", "4"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("template", [CHATML, MARKED, CHATML.replace("|", "")])
def test_no_warning_without_need(tmp_path, template):
    """The last template has no special tokens at all: its turns end in plain text."""
    read(tmp_path, [{"messages": CHAT}], chat_tokenizer(template))


# What is dropped


def test_the_end_of_long_conversations_is_cut_and_what_is_left_empty_dropped(tmp_path, plain):
    rows = [{"messages": CHAT}, {"messages": [user("x" * 50), assistant("a")]}]
    with pytest.warns(UserWarning, match="1 of 2 conversations dropped") as warned:
        [example] = read(tmp_path, rows, plain, max_length=60)
    assert len(warned) == 1
    assert re.search(
        r"ConversationDataModule\(paths='.*chats\.jsonl'\): 1 of 2 conversations dropped: "
        r"1 because nothing to learn is left within max_length=60 tokens",
        str(warned[0].message),
    )
    assert len(example.ids) == 60
    assert learned_runs(example, plain) == ["2<|im_end|>\n"]


def test_useless_conversations_are_counted(tmp_path, plain):
    rows = [{"messages": CHAT}, {"messages": [user("a")]}, {"messages": [system("b"), user("c")]}]
    with pytest.warns(UserWarning, match="2 of 3 conv.*: 2 because the assistant says nothing"):
        assert len(read(tmp_path, rows, plain)) == 1
    rows = [{"prompt": "a", "completion": c} for c in ("", "b")]
    with pytest.warns(UserWarning, match="1 because the completion is empty"):
        assert len(read(tmp_path, rows, plain)) == 1


def test_a_single_token_cannot_be_learned(tmp_path, plain):
    """It is predicted from nothing."""
    rows = [{"prompt": "", "completion": c} for c in ("a", "ab")]
    with pytest.warns(UserWarning, match="1 of 2 conversations dropped: 1 because nothing to lea"):
        [example] = read(tmp_path, rows, plain, append_eos=False)
    assert text(example, plain) == "ab"


def test_nothing_left(tmp_path, plain):
    with pytest.raises(ValueError, match=r"nothing is left \(1 of 1 conversations dropped"):
        read(tmp_path, [{"messages": [user("a")]}], plain)


def test_a_template_that_marks_nothing(tmp_path):
    template = CHATML.replace(
        "{% for", "{% if false %}{% generation %}{% endgeneration %}{% endif %}{% for"
    )
    with pytest.raises(ValueError, match="marks nothing as said by the assistant"):
        read(tmp_path, [{"messages": CHAT}], chat_tokenizer(template))


# Bad input

BAD_RECORDS = {
    "not a list": ({"messages": "hello"}, "'messages' must be a list of messages, not str"),
    "empty": ({"messages": []}, "'messages' must hold at least one message"),
    "no object": ({"messages": ["hello"]}, "message 1 must be an object, not str"),
    "no role": (
        {"messages": [user("a"), {"text": "b"}]},
        "message 2 has no role; keys found: 'text'. A message is",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 has neither content nor tool_ca"),
    "number": ({"messages": [user(3)]}, "message 1 has content of type 'int', and must have text"),
    "image": (
        {"messages": [user([{"type": "image", "url": "a.png"}])]},
        "message 1 has content of type 'image', and must have text",
    ),
    "tools": ({"messages": CHAT, "tools": "{"}, "column 'tools' must be JSON, but"),
    "deep tools": (
        {"messages": CHAT, "tools": "[" * 100_000 + "]" * 100_000},
        "column 'tools' must not nest lists and objects more than 100 deep",
    ),
    "tool names": ({"messages": CHAT, "tools": ["clock"]}, "'tools' must be a list of JSON schem"),
    "both": ({"messages": CHAT, "completion": "b"}, "has both messages and a completion"),
    "neither": (
        {"prompt": "a", "response": "b"},
        "has neither messages nor a prompt and a completion; columns found: 'prompt', 'response'",
    ),
    "text and messages": (
        {"prompt": "a", "completion": [assistant("b")]},
        "prompt and completion must both be text or both be messages",
    ),
    "a number": ({"prompt": "a", "completion": 3}, "column 'completion' must be text, not int"),
    "assistant first": ({"messages": CHAT[2:]}, "the assistant speaks first, and the template do"),
}


@pytest.mark.parametrize(("record", "rule"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records_are_named(tmp_path, plain, record, rule):
    with pytest.raises(ValueError, match=re.escape(rule)) as failure:
        read(tmp_path, [record], plain)
    assert re.match(r"ConversationDataModule\(paths='.*jsonl'\): line 1", str(failure.value))


def test_two_formats_in_one_file(tmp_path, plain):
    rows = [{"messages": CHAT}, {"prompt": "a", "completion": "b"}]
    message = (
        r"line 2 holds a prompt and a completion as text, but line 1 messages, and a file has one "
        r"format\. Write them to two files"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path, rows, plain)


def test_two_files_may_have_two_formats(tmp_path, plain):
    for name, row in (("a", {"messages": CHAT}), ("b", {"prompt": "a", "completion": "b"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = find_files("X", "paths", f"{tmp_path}/*.jsonl")
    assert len(read_conversations(files, plain, max_length=100)) == 2


def test_an_empty_file(tmp_path, plain):
    with pytest.raises(ValueError, match="is empty, and must hold conversations"):
        read(tmp_path, [], plain)


def test_messages_without_a_template(tmp_path):
    message = r"ConversationDataModule\(chat_template=None\): the tokenizer has no chat template, "
    for tokenizer in (chat_tokenizer(), ByteTokenizer()):
        with pytest.raises(ValueError, match=message + ".*jsonl' holds messages. Pass one, as Jin"):
            read(tmp_path, [{"messages": CHAT}], tokenizer)


def test_messages_without_a_fast_tokenizer(tmp_path):
    class Slow(ByteTokenizer):
        is_fast = False
        chat_template = CHATML

        def get_chat_template(self, tools):
            return CHATML

    with pytest.raises(ValueError, match=r"Module\(tokenizer='Slow'\): must be a fast tokenizer"):
        read(tmp_path, [{"messages": CHAT}], Slow())


def test_a_template_that_refuses_a_conversation(tmp_path):
    raising = "{% if messages[0].role != 'user' %}{{ raise_exception('users first') }}{% endif %}"
    message = r"line 2: the chat template refuses the messages \(assistant, user\): users first"
    rows = [{"messages": messages} for messages in (CHAT[1:], CHAT[2:4])]
    for template in (CHATML, MARKED):
        tokenizer = chat_tokenizer(raising + template)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, rows, tokenizer)


def test_a_template_without_the_prefix_property(tmp_path):
    message = r"line 1: the chat template writes .* message 2 in another way.*Put {% generation %}"
    chat = [user("a"), assistant("bb"), user("c"), assistant("d")]
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [{"messages": chat}], chat_tokenizer(FORGETFUL))
    opening = CHATML.replace("assistant\n{% endif %}", "assistant\nHm{% endif %}")
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [{"messages": chat[:2]}], chat_tokenizer(opening))
    # Marks are the way out that the error names.
    way_out = MARKED.replace("message.content", "(message.content if loop.last else 'x')")
    tokenizer = chat_tokenizer(way_out)
    [example] = read(tmp_path, [{"messages": chat}], tokenizer)
    assert learned_runs(example, tokenizer) == ["x<|im_end|>\n", "d<|im_end|>\n"]


# Batches


def example(ids, learned, prompt=b""):
    return Example(np.array(ids, dtype=np.int32), np.array(learned, dtype=np.bool_), prompt)


def test_worked_batch():
    batch = collate_conversations([example([5, 6, 7], [0, 1, 1]), example([8, 1], [0, 1])], 1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_padding_index_has_nothing_to_learn():
    dataset = ConversationDataset([example([5, 6], [0, 1]), example([7, 8], [0, 1])], 0)
    real, empty = dataset[[1]], dataset[[padding(1)]]
    assert torch.equal(real["input_ids"], empty["input_ids"])
    assert (real["labels"] != -100).any()
    assert (empty["labels"] == -100).all()


def test_the_content_follows_tokens_and_what_is_learned():
    variants = [
        [example([5, 6], [0, 1]), example([7], [1])],
        [example([7], [1]), example([5, 6], [0, 1])],
        [example([5, 6], [1, 1]), example([7], [1])],
        [example([5], [0]), example([6, 7], [1, 1])],
    ]
    assert len({ConversationDataset(variant, 0).content for variant in variants}) == 4
    assert (
        ConversationDataset(variants[0], 0).content == ConversationDataset(variants[0], 9).content
    )


# Held out


def test_what_begins_alike_is_held_out_together(tmp_path, plain):
    rows = [{"messages": [user(f"q{i % 10}"), assistant(f"a{i}")]} for i in range(40)]
    examples = read(tmp_path, rows, plain)
    train, val = hold_out_conversations("X", examples, 0.3, seed=0)
    begins = [{one.prompt for one in part} for part in (train, val)]
    assert (len(begins[0]), len(begins[1])) == (7, 3)
    assert not begins[0] & begins[1]
    assert len(train) + len(val) == 40


def test_a_greeting_is_not_the_prompt(tmp_path, plain):
    """Conversations that all open with one greeting differ in what the user says next."""
    greeting = [system("s"), assistant("How can I help?")]
    rows = [{"messages": [*greeting, user(f"q{i}"), assistant("a")]} for i in range(4)]
    assert len({one.prompt for one in read(tmp_path, rows, plain)}) == 4


def test_forms_of_one_conversation_have_one_prompt(tmp_path, plain):
    [first] = read(tmp_path, [{"messages": CHAT}], plain)
    [second] = read(tmp_path, [{"prompt": CHAT[:2], "completion": CHAT[2:]}], plain)
    assert first.prompt == second.prompt
    assert np.array_equal(first.learned, second.learned)


def test_a_single_prompt_cannot_be_held_out():
    examples = [example([5, 6], [0, 1], b"same")] * 3
    with pytest.raises(ValueError, match=r"X\(val_fraction=0\.5\): holds out whole prompts"):
        hold_out_conversations("X", examples, 0.5, seed=0)


# Parity

# Templates as their models have them, next to which TRL has a copy with marks.
BOTH_WAYS = ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "qwen3_instruct_2507"]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*no special token ends")  # ours lacks the tokens they write
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_rendering_parts_finds_what_marks_of_trl_mark(tmp_path, name):
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    chat = [user("1+1?"), assistant("2"), user("Sure?\n"), assistant("Yes, it is 2.")]
    found = []
    for file in (f"{name}.jinja", f"{name}_training.jinja"):
        tokenizer = load_tokenizer("X", chat_tokenizer(size=600, bos=True), folder / file)
        assert ("generation %}" in tokenizer.chat_template) == file.endswith("_training.jinja")
        [one] = read(tmp_path, [{"messages": chat}], tokenizer, max_length=3000)
        found.append((one.ids.tolist(), one.learned.tolist()))
    assert found[0] == found[1]
    assert sum(found[0][1]) > 10


REFUSED = ["deepseekv3", "phi3", "qwen3"]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*no special token ends")
@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_write_earlier_turns_in_another_way_are_refused(tmp_path, name):
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = load_tokenizer("X", chat_tokenizer(), folder / f"{name}.jinja")
    with pytest.raises(ValueError, match="in another way when more follow"):
        read(tmp_path, [{"messages": CHAT[1:]}], tokenizer)
    marked = load_tokenizer("X", chat_tokenizer(), folder / f"{name}_training.jinja")
    [one] = read(tmp_path, [{"messages": CHAT[1:]}], marked)
    assert len(learned_runs(one, marked)) == 2


SPLIT = [
    {"prompt": CHAT[:2], "completion": CHAT[2:3]},
    {"prompt": CHAT[:4], "completion": CHAT[4:]},
]
QUESTIONS = [{"prompt": f"What is {i}?", "completion": f" The answer{'!' * i}"} for i in range(9)]
TRL_CASES = {
    "messages": (MARKED, [{"messages": CHAT}, {"messages": CHAT[1:3]}], True),
    "prompt and completion as messages": (CHATML, SPLIT, False),
    "marked prompt and completion": (MARKED, SPLIT, True),
    "prompt and completion as text": (None, QUESTIONS, False),
}


@pytest.mark.peer
@pytest.mark.parametrize(
    ("template", "rows", "assistant_only_loss"), TRL_CASES.values(), ids=TRL_CASES
)
@pytest.mark.parametrize("size", [257, 600])
def test_tokens_and_labels_match_trl(tmp_path, template, rows, assistant_only_loss, size):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = chat_tokenizer(template, size=size)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        SFTConfig(
            str(tmp_path),
            assistant_only_loss=assistant_only_loss,
            max_length=70,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer("X", tokenizer),
    )
    theirs = trainer.train_dataset
    ours = read(tmp_path, rows, tokenizer, max_length=70)
    assert len(ours) == len(theirs) == len(rows)
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids.tolist() == other["input_ids"]
        labels = np.where(one.learned, one.ids, -100).tolist()
        assert labels == other["labels"]


@pytest.mark.peer
def test_batches_match_trl():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    examples = [example([5, 6, 7], [0, 1, 1]), example([8, 9], [0, 1])]
    rows = [
        {"input_ids": one.ids.tolist(), "labels": np.where(one.learned, one.ids, -100).tolist()}
        for one in examples
    ]
    theirs = DataCollatorForLanguageModeling(pad_token_id=1)(rows)
    ours = collate_conversations(examples, 1)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
