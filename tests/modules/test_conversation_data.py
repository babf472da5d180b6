import json
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_align.modules.conversation_data import ConversationDataModule
from lightning_align.modules.pretrain import PretrainModule
from tests.helpers.byte_tokenizer import ByteTokenizer
from tests.helpers.chat import CHATML, MARKED, assistant, chat_tokenizer, system, user
from tests.helpers.recorder import Recorder, recorded, samples, trainer
from tests.helpers.tiny_models import TINY_MODELS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


@pytest.fixture
def chats(tmp_path):
    """Twenty conversations; the first token of a text tells which it is."""
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [system("Add."), user(f"{i}+1?"), assistant(str(i + 1)), user("!")]}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": chr(65 + i), "completion": "good" * (1 + i % 3)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(paths, **options):
    return ConversationDataModule(paths, ByteTokenizer(), **{"batch_size": 3, **options})


def chat(paths, **options):
    options = {"batch_size": 3, "chat_template": CHATML, **options}
    return ConversationDataModule(paths, chat_tokenizer(), **options)


def test_training_covers_every_conversation_once(tmp_path, texts):
    data = plain(texts, val_fraction=0.2)
    fitter = trainer(tmp_path, max_steps=6, num_sanity_val_steps=0)
    fitter.fit(Recorder(tmp_path), data)
    train, val = samples(tmp_path, "train"), samples(tmp_path, "val")
    assert [len(batch) for batch in train] == [3, 3, 3, 3, 3, 1]
    seen = [[first for batch in part for first in batch] for part in (train, val)]
    assert (len(seen[0]), len(seen[1])) == (16, 4)
    assert sorted(seen[0] + seen[1]) == [2 + 65 + i for i in range(20)]


def test_batches_of_messages(chats):
    data = chat(chats)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    shapes = {tuple(value.shape) for value in batch.values()}
    assert len(shapes) == 1
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert batch["attention_mask"][kept].all()
    for row, ids in zip(kept, batch["input_ids"], strict=True):
        whole = data.tokenizer.decode(ids)
        assert data.tokenizer.decode(ids[row]) == whole.split("assistant\n")[1].split("<|im_s")[0]


def test_val_paths(tmp_path, texts):
    other = tmp_path / "val.jsonl"
    other.write_text('{"prompt": "?", "completion": "a"}\n')
    data = plain(str(texts), val_paths=other)
    data.setup()
    assert (len(data.train_dataset), len(data.val_dataset)) == (20, 1)
    assert data.val_dataset.examples[0].ids[0] == 2 + ord("?")


def test_options_reach_the_batch(texts):
    data = plain(texts, max_length=4, append_eos=False, assistant_only_loss=False)
    data.setup()
    batch = data.train_dataset[[2]]
    assert batch["input_ids"].shape == (1, 4)
    assert not (batch["input_ids"] == ByteTokenizer.eos_token_id).any()
    assert (batch["labels"] != -100).all()


def test_tables_of_all_kinds_give_the_same_conversations(tmp_path, chats):
    """Tables have every key in every message, empty where a message lacks it."""
    from datasets import Dataset

    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    rows[0]["messages"][1]["name"] = "Anne"
    table = Dataset.from_list(rows)
    assert table[1]["messages"][0]["name"] is None
    table.to_parquet(str(tmp_path / "chats.parquet"))
    table.save_to_disk(str(tmp_path / "folder"))
    (tmp_path / "shards").mkdir()
    table.to_parquet(str(tmp_path / "shards/part-0.parquet"))
    prints = set()
    for name in ("chats.jsonl", "chats.parquet", "folder", "shards"):
        data = chat(tmp_path / name)
        data.setup()
        prints.add(data.fingerprint)
    assert len(prints) == 1


def test_a_resumed_run_sees_the_tail(tmp_path, texts):
    for stop, ckpt_path in ((4, None), (9, tmp_path / "a.ckpt")):
        fitter = trainer(tmp_path, max_steps=stop)
        fitter.fit(Recorder(tmp_path), plain(texts), ckpt_path=ckpt_path, weights_only=True)
        fitter.save_checkpoint(tmp_path / "a.ckpt")
    whole = tmp_path / "whole"
    whole.mkdir()
    trainer(whole, max_steps=9).fit(Recorder(whole), plain(texts))
    assert recorded(tmp_path, "train") == recorded(whole, "train")


@pytest.mark.parametrize(
    "options", [{"max_length": 45}, {"assistant_only_loss": False}, {"chat_template": MARKED + " "}]
)
def test_other_data_are_refused_on_resume(tmp_path, chats, options):
    fitter = trainer(tmp_path)
    fitter.fit(Recorder(tmp_path), chat(chats))
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    rule = r"ConversationDataModule\(fingerprint='conversations .*'\): the checkpoint's run has"
    with pytest.raises(ValueError, match=rule):
        trainer(tmp_path, max_steps=2).fit(
            Recorder(tmp_path), chat(chats, **options), ckpt_path=tmp_path / "a.ckpt"
        )


def test_two_ranks_share_the_batches(tmp_path, texts):
    fitter = trainer(tmp_path, strategy="ddp_fork", devices=2, max_steps=4, num_sanity_val_steps=0)
    fitter.fit(Recorder(tmp_path), plain(texts))
    alone = plain(texts, batch_size=6)
    alone.setup()
    ranks = [samples(tmp_path, "train", rank) for rank in (0, 1)]
    together = [first + second for first, second in zip(*ranks, strict=True)]
    assert together == [batch["input_ids"][:, 0].tolist() for batch in alone.train_dataloader()]
    assert recorded(tmp_path, "train", 0)[3]["learns"] == [True]


def test_workers_yield_the_same_batches(texts):
    batches = []
    for num_workers in (0, 2):
        data = plain(texts, num_workers=num_workers)
        data.setup()
        batches.append([batch["labels"] for batch in data.train_dataloader()])
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_the_chat_template_is_saved_with_a_copy_of_the_tokenizer(tmp_path, chats):
    from transformers import AutoTokenizer

    given = chat_tokenizer()
    (tmp_path / "chat.jinja").write_text(MARKED)
    data = ConversationDataModule(chats, given, chat_template=tmp_path / "chat.jinja")
    data.prepare_data()
    data.setup()
    assert given.chat_template is None
    data.tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == MARKED
    again = ConversationDataModule(chats, str(tmp_path / "saved"))
    again.setup()
    assert again.fingerprint == data.fingerprint


def test_hyperparameters_are_plain(tmp_path, chats):
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chat.jinja").write_text(CHATML)
    data = ConversationDataModule(
        chats, tmp_path / "tokenizer", chat_template=tmp_path / "chat.jinja"
    )
    fitter = trainer(tmp_path)
    fitter.fit(Recorder(tmp_path), data)
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    again = ConversationDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.hparams["chat_template"] == str(tmp_path / "chat.jinja")
    again.setup()
    assert again.fingerprint == data.fingerprint


def test_the_command_line_knows_every_argument():
    parser = ArgumentParser()
    parser.add_class_arguments(ConversationDataModule)
    given = ["--paths=a.jsonl", "--tokenizer=folder", "--chat_template=chat.jinja"]
    options = parser.parse_args([*given, "--assistant_only_loss=false", "--batch_size=3"])
    data = ConversationDataModule(**options.as_dict())
    assert (data.batch_size, data.assistant_only_loss) == (3, False)
    assert data.chat_template == "chat.jinja"
    help_text = " ".join(parser.format_help().split())
    for sentence in ("Conversations per batch and rank", "learn the assistant's tokens"):
        assert sentence in help_text


BAD_OPTIONS = {
    "batch_size": ({"batch_size": 0}, r"DataModule\(batch_size=0\): must be at least 1"),
    "max_length": ({"max_length": 1}, r"DataModule\(max_length=1\): must be at least 2"),
    "val_fraction": (
        {"val_fraction": 1.5},
        r"DataModule\(val_fraction=1\.5\): must be in",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_numbers_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match="Conversation" + message):
        plain("chats.jsonl", **options)


def test_bad_files_and_templates_are_refused_before_training(tmp_path, chats):
    cases = [
        (plain(tmp_path / "no.jsonl"), r"\(paths='.*no\.jsonl'\): is n"),
        (plain(chats), r"\(chat_template=None\): the tokenizer has no chat template"),
        (chat(chats, chat_template="no.jinja"), r"\(chat_template='no\.jinja'\): the file cannot"),
        (chat(chats, chat_template="{% if %}"), r"must be a Jinja template, but of line 1 Jinja"),
        (chat(chats, val_paths="no.jsonl"), r"\(val_paths='no\.jsonl'\): is n"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).fit(Recorder(tmp_path), data)
    assert not list(tmp_path.glob("train*"))


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_fine_tuning_from_yaml_learns_the_answers(tmp_path, chats):
    """A tiny Llama memorises two answers; what it saved answers with the template it was given."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_align.cli.app import AlignCLI

    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"messages": [user(str(i) * 9), assistant(str(i + 1))]} for i in range(2)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chat.jinja").write_text(CHATML)
    model = {"vocab_size": len(tokenizer), **LLAMA}
    recipe = {
        "model": {
            "class_path": "PretrainModule",
            "init_args": {
                "model": {"class_path": "transformers.LlamaConfig", "init_args": model},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
            },
        },
        "data": {
            "class_path": "ConversationDataModule",
            "init_args": {
                "paths": str(chats),
                "tokenizer": str(tmp_path / "tokenizer"),
                "chat_template": str(tmp_path / "chat.jinja"),
                "batch_size": 4,
            },
        },
        "trainer": {
            "max_steps": 80,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        },
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(recipe))
    cli = AlignCLI(args=["fit", "-c", str(tmp_path / "sft.yaml")])
    assert cli.trainer.callback_metrics["train_loss"] < 0.1
    cli.model.save_pretrained(str(tmp_path / "saved"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for row in rows:
        prompt = saved.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt"
        )
        end = saved.convert_tokens_to_ids("<|im_end|>")
        out = model.generate(
            **prompt, max_new_tokens=4, do_sample=False, eos_token_id=end, pad_token_id=0
        )
        answer = saved.decode(out[0, prompt["input_ids"].shape[1] :])
        assert answer == row["messages"][1]["content"] + "<|im_end|>"


# Packing


@pytest.fixture
def uneven(tmp_path):
    """Conversations of very unequal length, of which more or less is learned."""
    path = tmp_path / "uneven.jsonl"
    rows = [
        {"prompt": chr(65 + i) * (1 + 5 * i % 7), "completion": "yes " * (1 + i * i % 5)}
        for i in range(14)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def llama():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=258, **LLAMA)).double()
    return PretrainModule(model, optimizer=partial(torch.optim.SGD, lr=0.1))


def summed_loss(data, size):
    """Loss, weight and gradient of all that is to be learned, in batches of so many rows."""
    data.setup()
    module = llama()
    numbers = list(range(len(data.train_dataset)))
    batches = [data.train_dataset[numbers[i : i + size]] for i in numbers[::size]]
    loss = weight = 0
    for batch in batches:
        hidden = module.forward_hidden(**module.model_inputs(batch))
        one, sums = module.loss_from_hidden(hidden, batch)
        loss, weight = loss + one, weight + int(sums["tokens"][0])
    loss.backward()
    return loss.detach(), weight, [p.grad for p in module.parameters()]


@pytest.mark.parametrize("assistant_only_loss", [True, False])
def test_packed_conversations_have_the_losses_of_separate_rows(uneven, assistant_only_loss):
    options = {"assistant_only_loss": assistant_only_loss, "max_length": 40}
    packed = plain(uneven, packing=True, **options)
    ours = summed_loss(packed, 2)
    theirs = summed_loss(plain(uneven, **options), 3)
    assert len(packed.train_dataset) == 7  # rows, of 14 conversations
    assert ours[1] == theirs[1]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-12)


def test_two_ranks_with_packed_rows_take_the_step_of_one_with_separate_ones(tmp_path, uneven):
    """The ranks have unequal numbers of tokens to learn, and one of them a row of none."""
    alone, two = llama(), llama()
    options = {"max_epochs": 1, "max_steps": -1, "num_sanity_val_steps": 0}
    trainer(tmp_path, **options).fit(alone, plain(uneven, batch_size=14))
    data = plain(uneven, packing=True, max_length=40, batch_size=4)
    data.setup()
    assert len(data.train_dataset) == 7  # one step of twice 4
    trainer(tmp_path, strategy="ddp_fork", devices=2, **options).fit(two, data)
    assert not torch.equal(next(two.parameters()), next(llama().parameters()))
    for ours, theirs in zip(two.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_packed_rows_of_what_is_held_out_have_the_same_validation(tmp_path, uneven):
    losses = []
    for packing in (False, True):
        module = llama()
        options = {"packing": packing, "max_length": 40, "val_fraction": 0.5}
        fitter = trainer(tmp_path)
        losses.append(fitter.validate(module, plain(uneven, **options), verbose=False))
    assert losses[0] == [pytest.approx(losses[1][0], rel=1e-6)]


def test_a_packed_run_resumes_to_the_bit_and_refuses_other_rows(tmp_path, uneven):
    options = {"max_length": 24, "batch_size": 2, "packing": True}
    whole, again = llama(), llama()
    trainer(tmp_path, max_steps=7).fit(whole, plain(uneven, **options))
    first = trainer(tmp_path, max_steps=3)
    first.fit(llama(), plain(uneven, **options))
    first.save_checkpoint(tmp_path / "a.ckpt")
    saved = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    trainer(tmp_path, max_steps=7).fit(again, plain(uneven, **options), **saved)
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for other in ({"packing": False}, {"max_length": 30}):
        with pytest.raises(ValueError, match=r"fingerprint='conversations .*'\): the checkpoint's"):
            trainer(tmp_path, max_steps=7).fit(
                llama(), plain(uneven, **{**options, **other}), **saved
            )


def test_a_model_whose_conversations_see_each_other_is_refused(tmp_path, uneven):
    module = PretrainModule(TINY_MODELS["opt"](vocab_size=258))
    with pytest.raises(ValueError, match=r"must not see each other.* Set .*packing=False"):
        trainer(tmp_path).fit(module, plain(uneven, packing=True))
