import json
import re

import fsspec
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_align.modules.text_data import TextDataModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.recorder import Recorder, samples, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
TEXTS = [f"Text number {i} says {'very ' * (i % 7)}little." for i in range(40)]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def text_of(data, split):
    return data.tokenizer.decode(getattr(data, f"{split}_dataset").split.tokens)


def test_the_embedded_novel_out_of_the_box():
    data = TextDataModule(vocab_size=1024, block_size=64)
    data.prepare_data()
    data.setup()
    assert data.train_dataset.split.num_documents == 55
    assert data.val_dataset.split.num_documents == 6
    assert len(data.tokenizer) == 1024
    assert "truth universally acknowledged" in text_of(data, "train") + text_of(data, "val")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert {name: tuple(value.shape) for name, value in batch.items()} == {
            "input_ids": (8, 65),
            "labels": (8, 65),
        }


def test_training_and_validation_cover_every_block_once(tmp_path, jsonl):
    data = TextDataModule(jsonl, ByteTokenizer(), block_size=16, batch_size=3)
    steps = -(-sum(map(len, TEXTS)) // 16)
    fitter = trainer(tmp_path, max_epochs=1, max_steps=steps, num_sanity_val_steps=0)
    fitter.fit(Recorder(tmp_path), data)
    for split in ("train", "val"):
        dataset = getattr(data, f"{split}_dataset")
        firsts = dataset.split.tokens[: -1 : dataset.block_size]
        seen = [first for batch in samples(tmp_path, split) for first in batch]
        assert sorted(seen) == sorted(firsts.tolist())
        if split == "val":
            assert seen == firsts.tolist(), "validation keeps the order"


def test_setup_alone_builds_too(jsonl):
    data = TextDataModule(str(jsonl), ByteTokenizer(), block_size=8)
    data.setup()
    assert sum(map(len, (data.train_dataset, data.val_dataset))) > 100


def test_two_ranks_open_what_one_has_built(tmp_path, jsonl):
    """The tokenizer is trained on rank 0; the other learns the key of the cache from it."""

    class Noting(TextDataModule):
        def prepare_data(self):
            super().prepare_data()
            (tmp_path / f"prepared-{self.trainer.global_rank}").touch()

    data = Noting(jsonl, vocab_size=300, block_size=8, batch_size=2)
    fitter = trainer(tmp_path, strategy="ddp_fork", devices=2, max_steps=4, num_sanity_val_steps=0)
    fitter.fit(Recorder(tmp_path), data)
    assert [path.name for path in tmp_path.glob("prepared-*")] == ["prepared-0"]
    alone = TextDataModule(jsonl, vocab_size=300, block_size=8, batch_size=4)
    alone.setup()
    ranks = [samples(tmp_path, "train", rank) for rank in (0, 1)]
    together = [first + second for first, second in zip(*ranks, strict=True)]
    expected = [batch["input_ids"][:, 0].tolist() for batch in alone.train_dataloader()]
    assert together == expected[:4]


def test_files_of_all_kinds_give_the_same_tokens(tmp_path, jsonl):
    with fsspec.open("memory://kinds/texts.jsonl.gz", "wt", compression="infer") as stream:
        stream.write(jsonl.read_text())
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    options = {"tokenizer": ByteTokenizer(), "block_size": 8, "val_fraction": 0}
    contents = set()
    for paths in (jsonl, str(jsonl), f"{tmp_path}/*.jsonl", "memory://kinds/texts.jsonl.gz"):
        data = TextDataModule(paths, **options)
        data.setup()
        contents.add(data.train_dataset.split.content)
    assert len(contents) == 1


def test_a_pattern_makes_documents_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Text {i}\nbody\n" for i in range(10)))
    data = TextDataModule(
        tmp_path / "a.txt", ByteTokenizer(), document_pattern=r"^Text \d$", block_size=4
    )
    data.setup()
    assert data.train_dataset.split.num_documents == 9
    assert data.val_dataset.split.num_documents == 1


def test_another_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    data = TextDataModule(
        tmp_path / "a.jsonl", ByteTokenizer(), text_column="body", block_size=2, val_fraction=0
    )
    data.setup()
    assert data.train_dataset.split.num_documents == 2
    assert data.val_dataset is None


def test_a_trained_tokenizer_can_be_saved_and_gives_the_same_tokens(tmp_path, jsonl):
    trained = TextDataModule(jsonl, vocab_size=300, block_size=8)
    trained.setup()
    trained.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = TextDataModule(jsonl, str(tmp_path / "tokenizer"), block_size=8)
    loaded.setup()
    assert loaded.fingerprint == trained.fingerprint


def test_changed_files_are_tokenised_anew(jsonl):
    data = TextDataModule(jsonl, ByteTokenizer(), block_size=8)
    data.setup()
    before = data.fingerprint
    jsonl.write_text(jsonl.read_text() + '{"text": "more"}\n')
    data.prepare_data()
    data.setup()
    assert data.fingerprint != before


def test_the_fingerprint_follows_the_block_size(jsonl):
    prints = set()
    for block_size in (8, 9):
        data = TextDataModule(jsonl, ByteTokenizer(), block_size=block_size)
        data.setup()
        prints.add(data.fingerprint)
    assert len(prints) == 2


def test_workers_yield_the_same_batches(jsonl):
    batches = []
    for num_workers in (0, 2):
        data = TextDataModule(jsonl, ByteTokenizer(), block_size=8, num_workers=num_workers)
        data.setup()
        batches.append([batch["input_ids"] for batch in data.train_dataloader()])
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_hyperparameters_are_plain(tmp_path, jsonl):
    for tokenizer in (ByteTokenizer(), None):
        data = TextDataModule(jsonl, tokenizer, vocab_size=300, block_size=8, cache_dir=tmp_path)
        fitter = trainer(tmp_path)
        fitter.fit(Recorder(tmp_path), data)
        fitter.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
        assert saved["paths"] == [str(jsonl)]
        assert ("tokenizer" in saved) == (tokenizer is None)
    again = TextDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again.setup()
    assert again.fingerprint == data.fingerprint


def test_the_command_line_knows_every_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule)
    options = parser.parse_args(["--batch_size=3", '--val_paths=["b.jsonl"]'])
    data = TextDataModule(**options.as_dict())
    assert data.batch_size == 3
    assert data.val_paths == ["b.jsonl"]
    help_text = " ".join(parser.format_help().split())
    for sentence in ("Tokens predicted per sample", "Samples per batch and rank"):
        assert sentence in help_text


BAD_TEXT = {
    "batch_size": ({"batch_size": 0}, r"TextDataModule\(batch_size=0\): must be at least 1"),
    "block_size": ({"block_size": 0}, r"TextDataModule\(block_size=0\): must be at least 1"),
    "val_fraction above": ({"val_fraction": 1.0}, r"\(val_fraction=1\.0\): must be in \[0, 1\)"),
    "val_fraction below": ({"val_fraction": -0.1}, r"\(val_fraction=-0\.1\): must be in \[0, 1\)"),
    "val_fraction nan": ({"val_fraction": float("nan")}, r"must be in \[0, 1\)"),
    "vocab_size": ({"vocab_size": 256}, r"TextDataModule\(vocab_size=256\): must be at least 257"),
    "pattern": ({"document_pattern": "("}, r"\(document_pattern='\('\): must be a regular"),
    "cache_dir": ({"cache_dir": "s3://bucket"}, r"\(cache_dir='s3://bucket'\): must be a local"),
}


@pytest.mark.parametrize(("options", "message"), BAD_TEXT.values(), ids=BAD_TEXT)
def test_bad_numbers_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**options)


def test_bad_files_are_refused_before_training(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\x02")
    (tmp_path / "columns.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "one.txt").write_text("a single document")
    cases = {
        "missing.txt": "is neither a file nor an embedded corpus",
        "*.nothing": "no file matches",
        "empty.txt": "is empty, and must hold text",
        "binary.txt": "must be text, but it holds NUL bytes",
        "columns.jsonl": "line 1 has no column 'text'; columns found: 'body'",
        "broken.jsonl": "line 2 must be JSON",
        "one.txt": "holds out whole documents, and there is only one",
    }
    for name, rule in cases.items():
        data = TextDataModule(f"{tmp_path}/{name}", ByteTokenizer())
        with pytest.raises(ValueError, match=re.escape(rule)) as failure:
            trainer(tmp_path).fit(Recorder(tmp_path), data)
        assert str(failure.value).startswith("TextDataModule(")
    assert not list(tmp_path.glob("train*"))
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]


def test_bad_validation_files_are_named_by_their_argument(tmp_path, jsonl):
    data = TextDataModule(jsonl, ByteTokenizer(), val_paths="missing.txt")
    with pytest.raises(ValueError, match=r"TextDataModule\(val_paths='missing\.txt'\): is neither"):
        data.setup()


@pytest.mark.parametrize(
    ("options", "split"), [({"val_fraction": 0}, "train"), ({"block_size": 300}, "val")]
)
def test_a_block_larger_than_the_corpus(jsonl, options, split):
    data = TextDataModule(jsonl, ByteTokenizer(), **{"block_size": 10_000, **options})
    message = rf"TextDataModule\(block_size=\d+\): the {split} split has \d+ tokens.*Lower block_s"
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_a_block_may_be_exactly_the_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("12345678")
    for block_size in (8, 9):
        data = TextDataModule(
            tmp_path / "a.txt", ByteTokenizer(), block_size=block_size, val_fraction=0
        )
        if block_size == 8:  # eight characters and the end-of-text token
            data.setup()
            assert data.train_dataset[[0]]["labels"].min() >= 0
        else:
            with pytest.raises(ValueError, match="9 tokens"):
                data.setup()


def test_a_tokenizer_without_an_end_of_text_token(jsonl):
    tokenizer = ByteTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="has no end-of-text token"):
        TextDataModule(jsonl, tokenizer).setup()


def test_a_hub_name_without_a_network(jsonl, offline):
    with pytest.raises(ValueError, match=r"\(tokenizer='acme/tok'\).*HF_HUB_OFFLINE.*folder"):
        TextDataModule(jsonl, "acme/tok").prepare_data()
