import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.tokenizer import (
    END_OF_TEXT,
    encode,
    encode_completions,
    encode_prompts,
    encode_with_offsets,
    load_tokenizer,
    pad_token_id,
    tokenizer_fingerprint,
    train_tokenizer,
)
from tests.helpers.byte_tokenizer import ByteTokenizer

TEXTS = ["It is a truth universally acknowledged, that a single man " * 3, "must be in want"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter(TEXTS), 300)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    other = train_tokenizer(TEXTS[:1], 300)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_the_end_of_text_token_ends_and_pads(tokenizer):
    assert len(tokenizer) <= 300
    assert tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.decode([tokenizer.eos_token_id]) == END_OF_TEXT


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_is_encoded_without_loss(text):
    tokenizer = _shared()
    [ids] = encode(tokenizer, [text])
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def _shared(cache=[]):  # noqa: B006
    if not cache:
        cache.append(train_tokenizer(TEXTS, 300))
    return cache[0]


def test_the_fingerprint_survives_saving_and_use(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer("X", str(tmp_path))
    loaded(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_a_tokenizer_object_is_taken_as_it_is(tokenizer):
    assert load_tokenizer("X", tokenizer) is tokenizer


def test_padding_falls_back_to_the_end_of_text_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer("X", str(tmp_path))
    loaded.pad_token = None
    assert pad_token_id(loaded) == loaded.eos_token_id


def test_no_end_of_text_token(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer("X", str(tmp_path))
    loaded.eos_token = None
    with pytest.raises(
        ValueError, match=r"X\(tokenizer='TokenizersBackend'\): has no end-of-text"
    ) as e:
        load_tokenizer("X", loaded)
    assert "tokenizer.eos_token =" in str(e.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"X\(tokenizer='.*'\): transformers cannot load a tok"):
        load_tokenizer("X", str(tmp_path))


def test_something_else():
    with pytest.raises(ValueError, match=r"X\(tokenizer='int'\): must be a folder"):
        load_tokenizer("X", 3)


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def test_a_chat_template_is_set_on_a_copy_and_saved(tokenizer, tmp_path):
    loaded = load_tokenizer("X", tokenizer, TEMPLATE)
    assert tokenizer.chat_template is None
    assert len(loaded) == len(tokenizer)
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer("X", str(tmp_path)).chat_template == TEMPLATE
    assert load_tokenizer("X", str(tmp_path), "{{ 1 }}").chat_template == "{{ 1 }}"


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_chat_template_from_a_file(tokenizer, tmp_path, as_type):
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    assert load_tokenizer("X", tokenizer, as_type(path)).chat_template == TEMPLATE


def test_a_chat_template_with_what_transformers_offers(tokenizer):
    text = (
        "{%- for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
        "{% generation %}{{ raise_exception('x') }}{%- endgeneration -%}"
    )
    assert load_tokenizer("X", tokenizer, text).chat_template == text


BAD_TEMPLATES = {
    "missing": ("no.jinja", r"chat_template='no\.jinja'\): the file cannot be read \(.*no\.jinja"),
    "a name": (
        "chatml",
        r"chat_template='chatml'\): must be Jinja text or the path of a \.jinja f",
    ),
    "syntax": (
        "a\n{% if %}",
        r"must be a Jinja template, but of line 2 Jinja says: Expected an ex",
    ),
    "open mark": ("{% generation %}", r"must be a Jinja template, but of line 1 Jinja says: Unexp"),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_bad_chat_templates(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer("X", tokenizer, template)


def test_the_fingerprint_of_texts_is_not_that_of_conversations(tokenizer):
    """Text does not pass through the template, so that a token cache of it stays good."""
    other = load_tokenizer("X", tokenizer, TEMPLATE)
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)


def test_the_fingerprint_follows_whether_special_tokens_are_split(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.split_special_tokens = True
    assert encode(tokenizer, [END_OF_TEXT]) != encode(other, [END_OF_TEXT])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)


def test_the_fingerprint_follows_what_a_class_does():
    """No attribute tells them apart, and the second refuses some texts."""

    class Bytes(ByteTokenizer):
        def __call__(self, texts, **options):
            return super().__call__([text.replace("e\u0301", "\xe9") for text in texts])

    class Ascii(ByteTokenizer):
        def __call__(self, texts, **options):
            return super().__call__([text.encode("ascii").decode() for text in texts])

    Bytes.__name__ = Ascii.__name__ = "ByteTokenizer"
    prints = {tokenizer_fingerprint(one()) for one in (ByteTokenizer, Bytes, Ascii)}
    assert len(prints) == 3


def with_space_before_texts():
    """Byte-fallback BPE that begins every text with a space, as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["it is a truth"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("completion", [" is a truth", "is", "\nis", "", "\n\nis  a"])
def test_completions_go_on_in_mid_text(tokenizer, completion):
    spaced = with_space_before_texts()
    assert spaced.decode(encode(spaced, ["it", "is"])[0] + encode(spaced, ["is"])[0]) == "it is"
    for one in (tokenizer, spaced):
        [prompt], [rest] = encode_prompts(one, ["it"]), encode_completions(one, [completion])
        assert one.decode(prompt + rest, clean_up_tokenization_spaces=False) == "it" + completion


def test_prompts_begin_with_the_token_that_texts_begin_with(tokenizer):
    from tests.helpers.chat import chat_tokenizer

    begins = chat_tokenizer(bos=True)
    assert begins.decode(encode_prompts(begins, ["it"])[0]) == "<s>it"
    assert begins.decode(encode_completions(begins, ["it"])[0]) == "it"
    assert encode_prompts(tokenizer, ["it"]) == encode(tokenizer, ["it"])


def test_offsets_tell_the_characters_of_each_token(tokenizer):
    [encoded] = encode_with_offsets(tokenizer, ["aé "])
    assert encoded.ids == encode(tokenizer, ["aé "])[0]
    assert encoded.offsets == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert encode_with_offsets(tokenizer, []) == []


def test_a_tokenizer_with_slots_has_a_fingerprint() -> None:
    class Slotted:
        __slots__ = ("eos_token_id", "pad_token_id")

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [list(text.encode()) for text in texts]}

    tokenizer: Any = Slotted()
    tokenizer.eos_token_id, tokenizer.pad_token_id = 0, None
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(tokenizer)
