"""The settings of a tokenizer, as its fingerprint sees them."""

import copy
import json
import re
from types import SimpleNamespace

import pytest

from lightning_align.data.tokenizer import encode, tokenizer_fingerprint
from lightning_align.data.tokenizer_settings import plain_settings
from tests.helpers.byte_tokenizer import ByteTokenizer


def wordpiece(folder, **settings):
    """A tokenizer in plain Python, as the ones with custom code on the hub are."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[SEP]", "[CLS]", "a", "A"]))
    return BertTokenizerLegacy(str(folder / "vocab.txt"), eos_token="[SEP]", **settings)


def test_the_fingerprint_follows_settings_of_tokenizers_in_plain_python(tmp_path):
    one, same = (wordpiece(tmp_path, do_lower_case=True) for _ in range(2))
    other = wordpiece(tmp_path, do_lower_case=False)
    assert encode(one, ["A"]) != encode(other, ["A"])
    assert one.get_vocab() == other.get_vocab()
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    one.save_pretrained(tmp_path / "saved")
    loaded = type(one).from_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(loaded)


@pytest.mark.parametrize("setting", [{"a", "b"}, {"a": 1}, [1, 2], "a", b"a", re.compile("a"), 0.5])
def test_the_fingerprint_follows_attributes_of_any_kind(setting):
    one, other = ByteTokenizer(), ByteTokenizer()
    one.part, other.part = SimpleNamespace(x=setting), SimpleNamespace(x=None)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    other.part.x = copy.copy(setting)
    other.cache = {"what": "it has met"}
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


def test_what_calls_set_and_where_it_came_from_is_left_out() -> None:
    one = SimpleNamespace(
        lower=True,
        vocab_file="/one/vocab.txt",
        chat_template="x",
        padding_side="left",
        _cached_tokens=["a"],
    )
    assert plain_settings(one) == {"lower": True}


def test_what_refers_to_itself_ends() -> None:
    loop = SimpleNamespace()
    loop.itself = loop
    assert "SimpleNamespace" in str(plain_settings(loop))
    json.dumps(plain_settings(loop))


def test_sets_and_mappings_have_one_order_and_bytes_a_digest() -> None:
    one = SimpleNamespace(part={"b", "a"}, table={"y": 1, "x": b"secret"})
    other = SimpleNamespace(table={"x": b"secret", "y": 1}, part={"a", "b"})
    assert plain_settings(one) == plain_settings(other)
    assert "secret" not in str(plain_settings(one))
