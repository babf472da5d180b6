import json

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_align.data.tokenizer import train_tokenizer
from lightning_align.modules.preference_data import PreferenceDataModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.chat import CHATML, assistant, chat_tokenizer, user
from tests.helpers.recorder import Recorder, recorded, samples, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": chr(65 + i), "chosen": "good" * (1 + i % 3), "rejected": "bad"}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preference(paths, **options):
    return PreferenceDataModule(paths, ByteTokenizer(), **{"batch_size": 3, **options})


def test_training_covers_every_pair_once(tmp_path, pairs):
    data = preference(pairs, val_fraction=0.2)
    fitter = trainer(tmp_path, max_steps=6, num_sanity_val_steps=0)
    fitter.fit(Recorder(tmp_path), data)
    train, val = samples(tmp_path, "train"), samples(tmp_path, "val")
    assert [len(batch) // 2 for batch in train] == [3, 3, 3, 3, 3, 1]
    assert all(batch[: len(batch) // 2] == batch[len(batch) // 2 :] for batch in train + val)
    seen = [[prompt for batch in part for prompt in batch[::2]] for part in (train, val)]
    prompts = [
        {prompt for batch in part for prompt in batch[: len(batch) // 2]} for part in (train, val)
    ]
    assert (len(prompts[0]), len(prompts[1])) == (16, 4)
    assert prompts[0] | prompts[1] == {2 + 65 + i for i in range(20)}
    assert sum(map(len, seen)) == 20


def test_pairs_of_val_paths(tmp_path, pairs):
    other = tmp_path / "val.jsonl"
    other.write_text('{"prompt": "?", "chosen": "a", "rejected": "b"}\n')
    data = preference(str(pairs), val_paths=other)
    data.setup()
    assert (len(data.train_dataset), len(data.val_dataset)) == (20, 1)
    assert np.array_equal(data.val_dataset.pairs[0].prompt, [2 + ord("?")])


def test_max_length_and_append_eos_reach_the_batch(pairs):
    data = preference(pairs, max_length=4, append_eos=False)
    data.setup()
    batch = data.train_dataset[[2]]
    assert batch["input_ids"].shape == (2, 4)
    assert not (batch["input_ids"] == ByteTokenizer.eos_token_id).any()


def test_a_resumed_preference_run_sees_the_tail(tmp_path, pairs):
    for stop, ckpt_path in ((4, None), (9, tmp_path / "a.ckpt")):
        fitter = trainer(tmp_path, max_steps=stop)
        fitter.fit(Recorder(tmp_path), preference(pairs), ckpt_path=ckpt_path, weights_only=True)
        fitter.save_checkpoint(tmp_path / "a.ckpt")
    whole = tmp_path / "whole"
    whole.mkdir()
    trainer(whole, max_steps=9).fit(Recorder(whole), preference(pairs))
    assert recorded(tmp_path, "train") == recorded(whole, "train")


def test_other_pairs_are_refused_on_resume(tmp_path, pairs):
    fitter = trainer(tmp_path)
    fitter.fit(Recorder(tmp_path), preference(pairs))
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"PreferenceDataModule\(fingerprint='pairs .*'\): the ch"):
        trainer(tmp_path, max_steps=2).fit(
            Recorder(tmp_path), preference(pairs, max_length=5), ckpt_path=tmp_path / "a.ckpt"
        )


def test_another_truncation_is_refused_on_resume(tmp_path, pairs):
    """Where it cuts other tokens; where nothing is too long the batches are the same."""
    for kind in (pairs, write_records(tmp_path / "records.jsonl")):
        modes = [
            preference(kind, max_length=5, truncation_mode=mode)
            for mode in ("keep_start", "keep_end")
        ]
        fitter = trainer(tmp_path)
        fitter.fit(Recorder(tmp_path), modes[0])
        fitter.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"PreferenceDataModule\(fingerprint='.*'\): the ch"):
            trainer(tmp_path, max_steps=2).fit(
                Recorder(tmp_path), modes[1], ckpt_path=tmp_path / "a.ckpt", weights_only=True
            )
    contents = [
        preference(pairs, max_length=20, truncation_mode=mode)
        for mode in ("keep_start", "keep_end")
    ]
    for data in contents:
        data.setup()
    assert contents[0].fingerprint == contents[1].fingerprint


def test_keep_end_reaches_the_batch(pairs):
    data = preference(pairs, max_length=4, truncation_mode="keep_end", val_fraction=0.5)
    data.setup()
    for dataset in (data.train_dataset, data.val_dataset):
        batch = dataset[[*range(len(dataset))]]
        assert batch["input_ids"].shape == (20, 4)
        assert (batch["input_ids"] == ByteTokenizer.eos_token_id).any(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"truncation_mode": "end"},
            r"truncation_mode='end'\): must be one of 'keep_start', 'keep",
        ),
        ({"batch_size": 0}, r"PreferenceDataModule\(batch_size=0\): must be at least 1"),
        ({"max_length": 1}, r"PreferenceDataModule\(max_length=1\): must be at least 2"),
        ({"val_fraction": 1.5}, r"PreferenceDataModule\(val_fraction=1\.5\): must be in \[0, 1\)"),
    ],
)
def test_bad_preference_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        preference("pairs.jsonl", **options)


def test_missing_pairs(tmp_path):
    with pytest.raises(ValueError, match=r"PreferenceDataModule\(paths='.*pairs\.jsonl'\): is nei"):
        preference(tmp_path / "pairs.jsonl").setup()


def test_a_trained_tokenizer_prepares_pairs(pairs):
    data = PreferenceDataModule(pairs, train_tokenizer(["good or bad"], 300))
    data.setup()
    pair = data.train_dataset.pairs[0]
    assert data.tokenizer.decode(np.concatenate([pair.prompt, pair.chosen])) == "Agood<|endoftext|>"


def test_a_hub_name_without_a_network(pairs, offline):
    with pytest.raises(ValueError, match=r"\(tokenizer='acme/tok'\).*HF_HUB_OFFLINE.*folder"):
        PreferenceDataModule(pairs, "acme/tok").prepare_data()


def test_the_command_line_knows_every_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(PreferenceDataModule)
    given = ["--paths=a.jsonl", "--tokenizer=folder", "--chat_template=chat.jinja"]
    options = parser.parse_args([*given, "--batch_size=3", '--val_paths=["b.jsonl"]'])
    data = PreferenceDataModule(**options.as_dict())
    assert (data.batch_size, data.val_paths) == (3, ["b.jsonl"])
    assert data.chat_template == "chat.jinja"
    help_text = " ".join(parser.format_help().split())
    for sentence in (
        "Pairs per batch and rank",
        "keep_end (the prompt loses its beginning)",
        "saved with the tok",
    ):
        assert sentence in help_text


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [
        {"prompt": [user(f"q{i}")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
        for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_chat_template_is_saved_with_a_copy_of_the_tokenizer(tmp_path, chats):
    from transformers import AutoTokenizer

    given = chat_tokenizer()
    data = PreferenceDataModule(chats, given, chat_template=CHATML)
    data.setup()
    assert given.chat_template is None
    data.tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == CHATML
    pair = data.train_dataset.pairs[0]
    assert data.tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n")
    assert data.tokenizer.decode(pair.chosen) == "yes<|im_end|>\n"


def test_another_template_is_other_data_on_resume(tmp_path, chats):
    def build(template):
        return PreferenceDataModule(chats, chat_tokenizer(), chat_template=template)

    fitter = trainer(tmp_path)
    fitter.fit(Recorder(tmp_path), build(CHATML))
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert saved["chat_template"] == CHATML
    with pytest.raises(ValueError, match=r"PreferenceDataModule\(fingerprint='pairs .*'\): the ch"):
        trainer(tmp_path, max_steps=2).fit(
            Recorder(tmp_path), build(CHATML + " "), ckpt_path=tmp_path / "a.ckpt"
        )


def test_dpo_on_conversations_prefers_the_chosen_answers(tmp_path, chats):
    """A tiny Llama learns from messages, through the command line's own classes."""
    from lightning_align.cli.app import AlignCLI

    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chat.jinja").write_text(CHATML)
    model = {
        "class_path": "transformers.LlamaConfig",
        "init_args": {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    }
    recipe = {
        "model": {
            "class_path": "DPOModule",
            "init_args": {
                "model": model,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "PreferenceDataModule",
            "init_args": {
                "paths": str(chats),
                "tokenizer": str(tmp_path / "tokenizer"),
                "chat_template": str(tmp_path / "chat.jinja"),
                "batch_size": 5,
            },
        },
        "trainer": {
            "max_epochs": 5,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        },
    }
    (tmp_path / "dpo.yaml").write_text(json.dumps(recipe))
    cli = AlignCLI(args=["fit", "-c", str(tmp_path / "dpo.yaml")])
    assert cli.trainer.global_step == 10
    assert cli.trainer.callback_metrics["rewards/accuracies"] == 1
    assert cli.trainer.callback_metrics["rewards/margins"] > 0.05


# Unpaired records


def write_records(path, number=20, label=lambda i: i % 3 > 0):
    rows = [
        {"prompt": chr(65 + i), "completion": "good" if label(i) else "bad", "label": label(i)}
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_unpaired_records_are_trained_on_once(tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    data = preference(records, val_fraction=0.2)
    fitter = trainer(tmp_path, max_steps=6, num_sanity_val_steps=0)
    fitter.fit(Recorder(tmp_path), data)
    train, val = samples(tmp_path, "train"), samples(tmp_path, "val")
    assert [len(batch) for batch in train] == [3, 3, 3, 3, 3, 1]
    seen = [{prompt for batch in part for prompt in batch} for part in (train, val)]
    assert (len(seen[0]), len(seen[1])) == (16, 4)
    assert seen[0] | seen[1] == {2 + 65 + i for i in range(20)}
    assert data.fingerprint.startswith("records ")


def test_unpaired_records_of_val_paths_may_have_one_label(tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    val = write_records(tmp_path / "val.jsonl", number=2, label=lambda i: True)
    data = preference(records, val_paths=val)
    data.setup()
    assert (len(data.train_dataset), len(data.val_dataset)) == (20, 2)
    with pytest.raises(ValueError, match="the label of all 2 records to train on is True"):
        preference(val).setup()


def test_pairs_and_unpaired_records_do_not_mix(tmp_path, pairs):
    records = write_records(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="line 1 has no column 'completion'"):
        preference([records, pairs]).setup()
    with pytest.raises(ValueError, match="line 1 has no column 'chosen'"):
        preference([pairs, records]).setup()


def test_numbers_of_what_is_held_out_follow_those_of_training(pairs):
    data = preference(pairs, val_fraction=0.2)
    data.setup()
    completions = data.completions()
    assert len(completions) == 20
    for dataset, first in ((data.train_dataset, 0), (data.val_dataset, 16)):
        assert dataset[[0, 1]]["number"].tolist() == [first, first + 1]
        for index, pair in enumerate(dataset.pairs):
            (prompt, chosen), (_, rejected) = completions[first + index]
            assert all(map(np.array_equal, (prompt, chosen, rejected), pair))
