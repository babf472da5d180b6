import csv
import json
import math
import re

import datasets
import fsspec
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import LlamaConfig

from lightning_align.modules.pretrain import PretrainModule
from lightning_align.modules.text_data import TextDataModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.recorder import Recorder, samples, trainer
from tests.helpers.tiny_models import TINY_MODELS, TiedDecoder

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


def test_tables_of_all_kinds_give_the_same_tokens(tmp_path, jsonl):
    rows = [{"text": text, "number": i} for i, text in enumerate(TEXTS)]
    with (tmp_path / "texts.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["number", "text"])
        writer.writeheader()
        writer.writerows(rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "texts.parquet")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "saved")
    contents, keys = set(), set()
    for name in ("texts.jsonl", "texts.csv", "texts.parquet", "saved/train"):
        data = TextDataModule(tmp_path / name, ByteTokenizer(), block_size=8)
        data.setup()
        contents.add((data.train_dataset.split.content, data.val_dataset.split.content))
        keys.add(data.train_dataset.split.folder)
    assert len(contents) == 1
    assert len(keys) == 4


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
    "no paths": ({"paths": []}, r"TextDataModule\(paths=\[\]\): must name at least one file"),
    "no weights": ({"paths": {}}, r"TextDataModule\(paths=\{\}\): must name at least one file"),
    "weight 0": (
        {"paths": {"a.txt": 0.0}},
        r"TextDataModule\(paths\['a\.txt'\]=0\.0\): a weight mu",
    ),
    "weight below": (
        {"paths": {"a.txt": 1, "b.txt": -1}},
        r"\(paths\['b\.txt'\]=-1\): a weight mus",
    ),
    "weight nan": (
        {"paths": {"a.txt": math.nan}},
        r"\(paths\['a\.txt'\]=nan\): a weight must be a",
    ),
    "weight inf": ({"paths": {"a.txt": math.inf}}, r"a weight must be a positive, finite number"),
    "weight text": ({"paths": {"a.txt": "1"}}, r"\(paths\['a\.txt'\]='1'\): a weight must be"),
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
    (tmp_path / "ragged.csv").write_text("text,n\na,1\nb\n")
    (tmp_path / "columns.csv").write_text("body,n\na,1\n")
    (tmp_path / "header.csv").write_text("text,n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    cases = {
        "missing.txt": "is neither a file nor an embedded corpus",
        "*.nothing": "no file matches",
        "empty.txt": "is empty, and must hold text",
        "binary.txt": "must be text, but it holds NUL bytes",
        "columns.jsonl": "line 1 has no column 'text'; columns found: 'body'",
        "broken.jsonl": "line 2 must be JSON",
        "ragged.csv": "row 2 has 1 cells, and the header 2 columns",
        "columns.csv": "row 1 has no column 'text'; columns found: 'body', 'n'",
        "header.csv": "is empty, and must hold text",
        "broken.parquet": "must be a complete Parquet file",
        "one.txt": "holds out whole documents, or of a single one its end, and it is but one line",
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


def test_a_block_larger_than_the_corpus(jsonl):
    data = TextDataModule(jsonl, ByteTokenizer(), block_size=10_000, val_fraction=0)
    message = r"TextDataModule\(block_size=\d+\): the train split has \d+ tokens.*Lower block_s"
    with pytest.raises(ValueError, match=message):
        data.setup()


def test_what_is_validated_on_may_be_less_than_a_block(jsonl):
    data = TextDataModule(jsonl, ByteTokenizer(), block_size=300)
    data.setup()
    split = data.val_dataset.split
    assert split.num_tokens < 300
    [batch] = data.val_dataloader()
    assert batch["labels"].shape == (1, 301)
    assert (batch["labels"] != -100).sum() == split.num_tokens


def test_a_text_of_ones_own_as_it_is(tmp_path, caplog):
    """The first thing that anybody tries: one document, all options at their defaults."""
    paragraphs = [f"Paragraph {i} says {'very ' * (i % 9)}little.\n" for i in range(400)]
    (tmp_path / "my.txt").write_text("\n".join(paragraphs))
    for _ in range(2):  # the second time from the cache
        data = TextDataModule(str(tmp_path / "my.txt"))
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            data.setup("fit")
        told = re.search(
            r"TextDataModule\(val_fraction=0\.1\): the text is one document, of which its last"
            r" (\d+) paragraphs \(([\d.]+)% of its characters\) are held out\.",
            caplog.text,
        )
        assert told
        assert float(told[2]) == pytest.approx(10, abs=0.3)
        number = int(told[1])
        caplog.clear()
        assert text_of(data, "val").removesuffix("<|endoftext|>") == "\n".join(paragraphs[-number:])
        assert text_of(data, "train").startswith("Paragraph 0 says")
    assert [batch["labels"].shape[1] for batch in data.val_dataloader()] == [513]


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


def small_llama(**options):
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PretrainModule(config)


def separate(paths, **options):
    options = {"block_size": 40, "batch_size": 3, "separate_documents": True, **options}
    return TextDataModule(paths, ByteTokenizer(), **options)


def fit(folder, module, data, ckpt_path=None, **options):
    fitter = trainer(folder, **options)
    fitter.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return fitter


def test_separate_documents_reach_the_batch(jsonl):
    data = separate(jsonl, val_fraction=0.1, batch_size=50)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        after_end = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        after_end[:, 1:] = batch["input_ids"][:, :-1] == ByteTokenizer.eos_token_id
        after_end[:, 0] = True
        real = batch["input_ids"] != ByteTokenizer.pad_token_id
        assert torch.equal((batch["position_ids"] == 0)[real], after_end[real])
        assert torch.equal(batch["labels"][real] == -100, after_end[real])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_over_separate_documents_is_bit_identical(tmp_path, jsonl, num_workers):
    whole, first, again = small_llama(), small_llama(), small_llama()
    data = {"num_workers": num_workers, "val_fraction": 0}
    fit(tmp_path, whole, separate(jsonl, **data), max_steps=11, max_epochs=-1)
    fit(tmp_path, first, separate(jsonl, **data), max_steps=4).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, again, separate(jsonl, **data), tmp_path / "a.ckpt", max_steps=11, max_epochs=-1)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    other = small_llama()
    fit(tmp_path, other, separate(jsonl, separate_documents=False, **data), max_steps=11)
    assert not torch.equal(next(whole.parameters()), next(other.parameters()))


def test_the_loss_of_a_document_does_not_depend_on_its_neighbours(tmp_path):
    """Summed over a row of two documents, it is the sum of the two alone."""
    texts = ["A truth universally acknowledged.", "In want of a wife."]
    losses = []
    for number, group in enumerate([texts, texts[:1], texts[1:]]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in group))
        tokens = sum(len(text) + 1 for text in group)
        data = separate(path, block_size=tokens - 1, val_fraction=0)
        data.setup()
        [batch] = data.train_dataloader()
        module = small_llama()
        with torch.no_grad():
            hidden = module.forward_hidden(**module.model_inputs(batch))
            loss, sums = module.loss_from_hidden(hidden, batch)
        losses.append((loss, sums["tokens"][0]))
    (both, count), *alone = losses
    assert count == sum(n for _, n in alone) == len(texts[0]) + len(texts[1])
    torch.testing.assert_close(both, sum(loss for loss, _ in alone))


@pytest.mark.parametrize("name", ["opt", "falcon", "tied"])
def test_a_model_whose_documents_see_each_other_is_refused_before_training(tmp_path, jsonl, name):
    model = {**TINY_MODELS, "tied": TiedDecoder}[name](vocab_size=258)
    data = separate(jsonl)
    message = (
        rf"{type(model).__name__}'\): .*(must not see each other|takes no position_ids).*Set s"
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, PretrainModule(model), data)


def test_a_checkpoint_without_separate_documents_is_refused(tmp_path, jsonl):
    fit(tmp_path, Recorder(tmp_path), separate(jsonl, separate_documents=False)).save_checkpoint(
        tmp_path / "a.ckpt"
    )
    with pytest.raises(ValueError, match=r"fingerprint='.*, separate documents'\): the checkpoint"):
        fit(tmp_path, Recorder(tmp_path), separate(jsonl), tmp_path / "a.ckpt", max_steps=2)


@pytest.fixture
def corpora(tmp_path):
    """Three corpora of numbered letters, each of its own letter: tokens tell them apart."""
    for letter, number in {"a": 20, "b": 60, "c": 5}.items():
        rows = [{"text": letter * 9} for _ in range(number)]
        path = tmp_path / f"{letter}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def mixture(folder, weights, **options):
    paths = {f"{folder}/{name}.jsonl": weight for name, weight in weights.items()}
    options = {"block_size": 5, "batch_size": 4, "val_fraction": 0, **options}
    return TextDataModule(paths, ByteTokenizer(), **options)


def letters(batch):
    """How many blocks of a batch are of which corpus."""
    rows = batch["input_ids"].tolist()
    found = [chr(max(row) - 2) for row in rows]
    assert all(set(row) <= {0, 1, max(row)} for row in rows), "no block is of two corpora"
    return found


def test_a_mixture_has_its_weights_in_every_pass(corpora):
    data = mixture(corpora, {"a": 2, "[b]": 1, "c": 0.5})
    data.setup()
    sizes = {"a": 40, "b": 120, "c": 10}
    assert data.train_dataset.sizes == list(sizes.values())
    loader = data.train_dataloader()
    shares = {"a": 97, "b": 49, "c": 24}  # 170 times 4/7, 2/7 and 1/7, by largest remainder
    found = [letter for batch in loader for letter in letters(batch)]
    assert {letter: found.count(letter) for letter in shares} == shares


def test_a_mixture_is_resumed_and_refuses_other_weights(tmp_path, corpora):
    weights = {"a": 1, "b": 1, "c": 2}
    whole = tmp_path / "whole"
    whole.mkdir()
    options = {"max_epochs": -1}
    fit(whole, Recorder(whole), mixture(corpora, weights), max_steps=60, **options)
    fitter = fit(tmp_path, Recorder(tmp_path), mixture(corpora, weights), max_steps=47, **options)
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    again = mixture(corpora, weights, num_workers=2)
    fit(tmp_path, Recorder(tmp_path), again, tmp_path / "a.ckpt", max_steps=60, **options)
    assert samples(tmp_path, "train") == samples(whole, "train")
    for other in (mixture(corpora, {**weights, "c": 1}), TextDataModule(again.paths, block_size=5)):
        other.batch_size = 4
        with pytest.raises(ValueError, match=r"fingerprint='tokens .*the checkpoint's run has"):
            fit(tmp_path, Recorder(tmp_path), other, tmp_path / "a.ckpt", max_steps=61)


def test_two_ranks_share_a_mixture(tmp_path, corpora):
    weights = {"a": 1, "b": 2}
    data = mixture(corpora, weights, batch_size=2, num_workers=1)
    fit(tmp_path, Recorder(tmp_path), data, strategy="ddp_fork", devices=2, max_steps=4)
    alone = tmp_path / "alone"
    alone.mkdir()
    fit(alone, Recorder(alone), mixture(corpora, weights), max_steps=4)
    ranks = [samples(tmp_path, "train", rank) for rank in (0, 1)]
    together = [first + second for first, second in zip(*ranks, strict=True)]
    assert together == samples(alone, "train")


def test_a_mixture_shares_the_cache_of_a_list_and_validates_without_weights(corpora):
    both = mixture(corpora, {"a": 3, "b": 1}, val_fraction=0.2)
    listed = TextDataModule(both.paths, ByteTokenizer(), block_size=5, val_fraction=0.2)
    for data in (both, listed):
        data.setup()
    assert both.train_dataset.split.folder == listed.train_dataset.split.folder
    assert listed.train_mixture is None
    batches = [data.val_dataset[range(len(data.val_dataset))] for data in (both, listed)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_a_mixture_of_separate_documents(corpora):
    data = mixture(corpora, {"a": 3, "b": 1}, separate_documents=True)
    data.setup()
    for batch in data.train_dataloader():
        letters(batch)
        assert ((batch["labels"] != -100) <= (batch["position_ids"] > 0)).all()


def test_a_mixture_travels_through_a_checkpoint(tmp_path, corpora):
    paths = {f"{corpora}/a.jsonl": np.float64(1.5), corpora / "b.jsonl": 1}
    data = TextDataModule(paths, vocab_size=300, block_size=5, cache_dir=tmp_path / "cache")
    fit(tmp_path, Recorder(tmp_path), data).save_checkpoint(tmp_path / "a.ckpt")
    again = TextDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again.setup()
    assert again.weights == [1.5, 1.0]
    assert again.fingerprint == data.fingerprint


def test_a_corpus_too_small_for_its_weight_or_for_a_block(corpora):
    cases = {
        r"paths\['.*c\.jsonl'\]=0\.001\): gives it not one of the \d+ blocks of an": {
            "a": 1,
            "c": 1e-3,
        },
        r"paths='.*c\.jsonl'\): has 50 training tokens, and a block needs 61": {"a": 1, "c": 1},
    }
    for (message, weights), block_size in zip(cases.items(), (5, 60), strict=True):
        with pytest.raises(ValueError, match=message):
            mixture(corpora, weights, block_size=block_size).setup()
    with pytest.raises(ValueError, match=r"paths='.*nope\.jsonl'\): is neither a file nor"):
        mixture(corpora, {"a": 1, "nope": 1}).setup()
    with pytest.raises(ValueError, match=r"no file matches this pattern"):
        mixture(corpora, {"a": 1, "no*": 1}).setup()


@pytest.mark.parametrize("form", ["an argument", "a file"])
def test_the_command_line_takes_a_mapping(tmp_path, form):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TextDataModule, "data")
    (tmp_path / "a.yaml").write_text("data:\n  paths:\n    a.jsonl: 0.7\n    s3://x/*.csv: 3\n")
    argument = '--data.paths={"a.jsonl": 0.7, "s3://x/*.csv": 3}'
    options = parser.parse_args(
        [argument if form == "an argument" else f"--config={tmp_path}/a.yaml"]
    )
    data = TextDataModule(**options.data.as_dict())
    assert data.paths == ["a.jsonl", "s3://x/*.csv"]
    assert data.weights == [0.7, 3.0]
    printed = parser.parse_string(parser.dump(options))
    assert printed.data.paths == options.data.paths


def test_the_keys_of_a_batch_are_those_of_one_sample(jsonl):
    """Two pieces of documents may be of two lengths, which no batch holds."""

    class OfOneLength:
        def __len__(self):
            return 9

        def __getitem__(self, indices):
            assert len(indices) == 1
            return {"input_ids": torch.zeros(1, 8)}

    data = TextDataModule(jsonl, ByteTokenizer(), block_size=8)
    data.setup()
    data.train_dataset = OfOneLength()
    assert data.batch_keys == {"input_ids"}
