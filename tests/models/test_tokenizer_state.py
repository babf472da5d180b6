"""The tokenizer of a checkpoint: by name where there is one, else file by file."""

import pytest
import torch

from lightning_align.data.tokenizer import tokenizer_fingerprint, train_tokenizer
from lightning_align.models.tokenizer_state import pack_tokenizer, unpack_tokenizer
from lightning_align.modules.preference_data import PreferenceDataModule
from lightning_align.modules.text_data import TextDataModule
from tests.helpers.byte_tokenizer import ByteTokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def trained():
    tokenizer = train_tokenizer(["It is a truth universally acknowledged."], 280)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def through_a_file(state, folder):
    torch.save(state, folder / "state.ckpt")
    return torch.load(folder / "state.ckpt", weights_only=True)


def test_an_object_comes_back_equal(trained, tmp_path):
    state = through_a_file(pack_tokenizer(trained, None), tmp_path)
    again = unpack_tokenizer(state, where="test")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained)
    assert again.chat_template == TEMPLATE
    assert (again.eos_token, again.pad_token) == (trained.eos_token, trained.pad_token)


def test_a_name_stays_a_name_with_the_template_in_use(trained, tmp_path):
    trained.save_pretrained(tmp_path / "tokenizer")
    trained.chat_template = "another"
    state = through_a_file(pack_tokenizer(trained, str(tmp_path / "tokenizer")), tmp_path)
    assert state == {"name": str(tmp_path / "tokenizer"), "chat_template": "another"}
    again = unpack_tokenizer(state, where="test")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained)
    assert again.chat_template == "another"


def test_bytes_that_are_no_text_survive(trained, tmp_path):
    class WithVocabulary:
        def save_pretrained(self, folder):
            trained.save_pretrained(folder)
            (tmp_path / "old.model").write_bytes(bytes(range(256)))
            (type(tmp_path)(folder) / "old.model").write_bytes(bytes(range(256)))

    (content,) = pack_tokenizer(WithVocabulary(), None)["files"]["old.model"].items()
    assert content[1].encode(content[0]) == bytes(range(256))


def test_a_crafted_name_stays_in_its_folder(trained, tmp_path):
    state = pack_tokenizer(trained, None)
    outside = tmp_path / "outside.txt"
    state["files"][str(outside)] = {"utf-8": "trap"}
    unpack_tokenizer(state, where="test")
    assert not outside.exists()


def test_what_cannot_be_saved_is_left_out():
    assert pack_tokenizer(ByteTokenizer(), None) == {}


def test_datamodules_keep_their_tokenizer(trained, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("It is a truth universally acknowledged.\n" * 40)
    options = {"block_size": 8, "val_fraction": 0, "cache_dir": tmp_path / "cache"}
    trained.save_pretrained(tmp_path / "tokenizer")
    ours = TextDataModule(str(corpus), vocab_size=270, **options)
    assert "tokenizer" not in ours.state_dict(), "none yet"
    given = TextDataModule(str(corpus), trained, **options)
    named = TextDataModule(str(corpus), str(tmp_path / "tokenizer"), **options)
    for data in (ours, given, named):
        data.setup()
        again = unpack_tokenizer(data.state_dict()["tokenizer"], where="test")
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(data.tokenizer)
    assert named.state_dict()["tokenizer"]["name"] == str(tmp_path / "tokenizer")
    assert "files" in ours.state_dict()["tokenizer"]
    assert ours.state_dict()["tokenizer"] is ours.state_dict()["tokenizer"], "made once"


def test_a_preference_datamodule_keeps_an_object(trained, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    data = PreferenceDataModule(str(tmp_path / "pairs.jsonl"), trained)
    data.setup()
    assert "files" in data.state_dict()["tokenizer"]
