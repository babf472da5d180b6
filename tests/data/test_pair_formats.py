import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.files import InputFile
from lightning_align.data.pair_formats import Pair, PairReader
from lightning_align.data.paths import find_files
from lightning_align.data.preference import read_pairs
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.chat import CHATML, WITH_TOOLS, assistant, chat_tokenizer, system, user

QUESTION = [system("Be brief."), user("1+1?")]
CHOSEN, REJECTED = [assistant("2")], [assistant("11")]
RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
ASKED = RENDERED + "<|im_start|>assistant\n"
EXPLICIT = {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}
WHOLE = {"chosen": QUESTION + CHOSEN, "rejected": QUESTION + REJECTED}


@pytest.fixture(scope="module")
def chatml():
    return chat_tokenizer(CHATML)


class InMemory(InputFile):
    """A file whose name is its records."""

    def records(self, columns=None):
        for number, record in enumerate(json.loads(self.url), start=1):
            yield f"line {number}", record


def tokenise(records, tokenizer, append_eos=True):
    reader = PairReader(tokenizer, append_eos)
    return list(reader.read(InMemory("X", "paths", json.dumps(records))))


def texts(pair, tokenizer):
    if isinstance(pair, str):
        return pair
    return tuple(tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in pair)


def from_file(tmp_path, rows, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = find_files("PreferenceDataModule", "paths", str(path))
    return read_pairs(files, tokenizer, max_length=1000, append_eos=True)


# Texts that begin with their prompt


def implicit(chosen, rejected, tokenizer=None, **options):
    tokenizer = tokenizer or chat_tokenizer()
    [pair] = tokenise([{"chosen": chosen, "rejected": rejected}], tokenizer, **options)
    return texts(pair, tokenizer)


def test_the_prompt_is_what_two_texts_have_in_common():
    ours = implicit("Q: 1+1? A: two", "Q: 1+1? A: eleven")
    assert ours == ("Q: 1+1? A: ", "two<|endoftext|>", "eleven<|endoftext|>")


def test_the_prompt_ends_between_tokens():
    """ " yes" and " yet" are split alike by characters, and are two tokens."""
    tokenizer = chat_tokenizer(size=600)
    one, other = " question", " user"
    assert [len(tokenizer(text)["input_ids"]) for text in (one, other)] == [1, 1]
    pair = implicit(f"the{one}", f"the{other}", tokenizer)
    assert pair == ("the", f"{one}<|endoftext|>", f"{other}<|endoftext|>")


def test_equal_texts_are_no_pair(tmp_path):
    """TRL 1.16 makes ("ab", "c", "c") of ("abc", "abc")."""
    with pytest.raises(ValueError, match="1 because chosen and rejected are the same"):
        from_file(tmp_path, [{"chosen": "abc", "rejected": "abc"}], chat_tokenizer())


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_text_that_begins_the_other_keeps_all_characters(append_eos):
    """Of ("same", "same longer") both completions keep the token before the parting."""
    pair = implicit("same", "same longer", append_eos=append_eos)
    end = "<|endoftext|>" * append_eos
    assert pair == ("sam", f"e{end}", f"e longer{end}")
    assert implicit("same longer", "same", append_eos=append_eos) == (pair[0], pair[2], pair[1])


@pytest.mark.parametrize("bos", [True, False])
def test_texts_without_a_common_beginning_are_no_pair(bos):
    """TRL 1.16 makes ("x y", " ", "w") of ("x y ", "z w"): characters of neither."""
    pair = implicit("x y ", "z w", chat_tokenizer(bos=bos))
    assert pair == "chosen and rejected do not begin with a common prompt"


@pytest.mark.parametrize(("chosen", "rejected"), [("", "a"), ("a", ""), ("", "")])
def test_an_empty_text_is_no_pair(chosen, rejected):
    """TRL 1.16 raises UnboundLocalError."""
    for tokenizer in (ByteTokenizer(), chat_tokenizer(bos=True)):
        [pair] = tokenise([{"chosen": chosen, "rejected": rejected}], tokenizer)
        assert pair == "chosen or rejected is empty"


words = st.text("ab yes", max_size=12)


@settings(max_examples=100, deadline=None)
@given(prompt=words, chosen=words, rejected=words, bos=st.booleans())
def test_no_character_of_two_texts_is_lost(prompt, chosen, rejected, bos):
    tokenizer = _cached(bos)
    pair = implicit(prompt + chosen, prompt + rejected, tokenizer)
    if isinstance(pair, str):
        return
    begin, end = "<s>" * bos, "<|endoftext|>"
    assert pair[0] + pair[1] == begin + prompt + chosen + end
    assert pair[0] + pair[2] == begin + prompt + rejected + end
    assert len(pair[0]) > len(begin)
    assert end not in (pair[1], pair[2])


def _cached(bos, cache={}):  # noqa: B006
    if bos not in cache:
        cache[bos] = chat_tokenizer(size=600, bos=bos)
    return cache[bos]


# Messages


@pytest.mark.parametrize(
    "record",
    [
        EXPLICIT,
        WHOLE,
        {**WHOLE, "prompt": "1+1?"},
        {**WHOLE, "prompt": None},
        {**WHOLE, "prompt": QUESTION},
    ],
    ids=["explicit", "whole", "prompt as text", "prompt is null", "prompt repeated"],
)
def test_all_forms_of_messages_give_one_pair(chatml, record):
    [pair] = tokenise([record], chatml)
    assert texts(pair, chatml) == (ASKED, "2<|im_end|>\n", "11<|im_end|>\n")


def test_turns_that_both_conversations_begin_with_are_prompt(chatml):
    begin = [*QUESTION, assistant("2"), user("sure?")]
    [pair] = tokenise(
        [{"chosen": [*begin, assistant("yes")], "rejected": [*begin, assistant("no")]}], chatml
    )
    assert texts(pair, chatml) == (
        ASKED + "2<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
    )


def test_tools_reach_the_template():
    tokenizer = chat_tokenizer(WITH_TOOLS)
    [pair] = tokenise([{**EXPLICIT, "tools": [{"name": "clock"}]}], tokenizer)
    begin = '<|im_start|>tools\n[{"name": "clock"}]<|im_end|>\n'
    assert texts(pair, tokenizer) == (begin + ASKED, "2<|im_end|>\n", "11<|im_end|>\n")


UNUSABLE = {
    "equal": ({**EXPLICIT, "rejected": CHOSEN}, "chosen and rejected are the same"),
    "equal conversations": ({**WHOLE, "rejected": WHOLE["chosen"]}, "are the same"),
    "one begins the other": ({**WHOLE, "rejected": QUESTION}, "chosen or rejected is empty"),
    "other questions": (
        {"chosen": [user("a"), *CHOSEN], "rejected": [user("b"), *REJECTED]},
        "are not answers of the assistant to one prompt",
    ),
    "other questions to one system": (
        {
            "chosen": [system("s"), user("a"), *CHOSEN],
            "rejected": [system("s"), user("b"), *REJECTED],
        },
        "are not answers of the assistant to one prompt",
    ),
    "another prompt than that given": (
        {**WHOLE, "prompt": [user("else")]},
        "are not answers of the assistant to one prompt",
    ),
}


@pytest.mark.parametrize(("record", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_conversations_that_are_no_pair(chatml, record, reason):
    [pair] = tokenise([record], chatml)
    assert isinstance(pair, str)
    assert reason in pair


def test_unusable_conversations_are_counted(tmp_path, chatml):
    rows = [EXPLICIT, {**EXPLICIT, "rejected": CHOSEN}]
    with pytest.warns(UserWarning, match="1 of 2 pairs dropped: 1 because chosen and rejected are"):
        assert len(from_file(tmp_path, rows, chatml)) == 1


def test_a_token_across_the_boundary_is_warned_of_once(tmp_path):
    """The prompt ends with a space that belongs to " yes" and " no" once they follow."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chat_tokenizer(template, size=600)
    row = {"prompt": [user("?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    rows = [{**row, "chosen": [assistant("-")], "rejected": [assistant("+")]}, row, row]
    rule = r"the tokens of 2 prompt\(s\), first .*pairs\.jsonl, line 2, are no beginning"
    with pytest.warns(UserWarning, match=rule) as warned:
        pairs = from_file(tmp_path, rows, tokenizer)
    assert len(warned) == 1
    assert texts(pairs[0], tokenizer) == ("user: ?\nassistant: ", "-\n", "+\n")
    assert texts(pairs[1], tokenizer) == ("user: ?\nassistant:", " yes\n", " no\n")


def test_prompts_that_are_written_in_another_way_are_warned_of(tmp_path):
    """As DeepSeek-R1's template opens a thought that a finished conversation lacks."""
    tokenizer = chat_tokenizer(CHATML.replace("assistant\n{% endif %}", "assistant\nHm{% endif %}"))
    with pytest.warns(UserWarning, match="line 1, are no beginning of those of the whole"):
        [pair] = from_file(tmp_path, [EXPLICIT], tokenizer)
    assert texts(pair, tokenizer) == (ASKED, "2<|im_end|>\n", "11<|im_end|>\n")


# Bad input

BAD_RECORDS = {
    "text and messages": (
        {**EXPLICIT, "rejected": "11"},
        "line 1: chosen and rejected must both be text or both be messages",
    ),
    "messages and text": ({"chosen": "2", "rejected": REJECTED}, "must both be text or both"),
    "a prompt of messages": (
        {"prompt": QUESTION, "chosen": "2", "rejected": "11"},
        "line 1: the prompt is messages, so chosen and rejected must be, too",
    ),
    "no rejected": ({"chosen": "2"}, "line 1 has no column 'rejected'; columns found: 'chosen'"),
    "null": ({"chosen": "2", "rejected": None}, "column 'rejected' must be text, not NoneType"),
    "null prompt": ({"prompt": None, "chosen": "2", "rejected": "3"}, "'prompt' must be text, n"),
    "a number": ({"chosen": 2, "rejected": "11"}, "column 'chosen' must be text, not int"),
    "a number and messages": (
        {"chosen": CHOSEN, "rejected": 11},
        "column 'rejected' must be a list of messages, not int",
    ),
    "no message": ({**EXPLICIT, "chosen": []}, "'chosen' must hold at least one message"),
    "no role": (
        {**EXPLICIT, "prompt": [{"text": "a"}]},
        "column 'prompt': message 1 has no role; keys found: 'text'",
    ),
    "tools": ({**EXPLICIT, "tools": "no JSON"}, "column 'tools' must be JSON"),
}


@pytest.mark.parametrize(("record", "rule"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records_are_named(tmp_path, chatml, record, rule):
    with pytest.raises(ValueError, match=re.escape(rule)) as failure:
        from_file(tmp_path, [record], chatml)
    assert re.match(r"PreferenceDataModule\(paths='.*jsonl'\): line 1", str(failure.value))


def test_two_formats_in_one_file(tmp_path, chatml):
    rows = [{"chosen": "a b", "rejected": "a c"}, EXPLICIT]
    message = (
        "line 2 holds a prompt and two completions as messages, but line 1 two texts that begin "
        "with their prompt, and a file has one format"
    )
    with pytest.raises(ValueError, match=message):
        from_file(tmp_path, rows, chatml)


def test_messages_without_a_template(tmp_path):
    for tokenizer in (chat_tokenizer(), ByteTokenizer()):
        with pytest.raises(ValueError, match=r"Module\(chat_template=None\): the tokenizer"):
            from_file(tmp_path, [EXPLICIT], tokenizer)


# Parity

TRL_CASES = {
    "texts": [
        {"prompt": f"What is {i}?", "chosen": f" The answer{'!' * i}", "rejected": " no"}
        for i in range(5)
    ],
    "messages": [EXPLICIT, {**EXPLICIT, "prompt": [user("1+1?")]}],
    "conversations": [WHOLE, {"chosen": WHOLE["chosen"][1:], "rejected": WHOLE["rejected"][1:]}],
}


@pytest.mark.peer
@pytest.mark.parametrize("rows", TRL_CASES.values(), ids=TRL_CASES)
@pytest.mark.parametrize("size", [257, 600])
def test_tokens_match_trl(tmp_path, rows, size):
    """Where no token reaches across the boundary, which is where rules could differ."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = chat_tokenizer(CHATML, size=size)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **sizes)
    trainer = DPOTrainer(
        LlamaForCausalLM(config),
        LlamaForCausalLM(config),
        args=DPOConfig(str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    theirs = [tuple(row[name] for name in names) for row in trainer.train_dataset]
    ours = [tuple(part.tolist() for part in pair) for pair in tokenise(rows, tokenizer)]
    assert ours == theirs
    assert isinstance(tokenise(rows, tokenizer)[0], Pair)
