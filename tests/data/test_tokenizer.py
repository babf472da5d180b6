import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_align.data.tokenizer import (
    END_OF_TEXT,
    encode,
    load_tokenizer,
    pad_token_id,
    tokenizer_fingerprint,
    train_tokenizer,
)

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
