import json
import math

import numpy as np
import pytest
import transformers

from lightning_align.__main__ import main
from lightning_align.data.difficulty import DifficultyIndex
from lightning_align.data.tokenizer import train_tokenizer
from tests.data.test_deepspeed_index import VALUES, prefix  # noqa: F401
from tests.helpers.byte_tokenizer import ByteTokenizer


@pytest.fixture
def config(tmp_path):
    """Conversations of 5 to 24 bytes, and what the command passes over."""
    pairs = [{"prompt": "say", "completion": "y" * (1 + i % 20)} for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    init = {"paths": str(tmp_path / "chat.jsonl"), "tokenizer": TOKENIZER, "val_fraction": 0}
    data = {"class_path": "ConversationDataModule", "init_args": init}
    (tmp_path / "run.yaml").write_text(json.dumps({"data": data, "trainer": {"max_steps": 3}}))
    return tmp_path / "run.yaml"


TOKENIZER = {"class_path": "tests.helpers.byte_tokenizer.ByteTokenizer"}


def test_an_index_is_built_from_a_configuration_and_shown(config, tmp_path, capsys):
    out, png = tmp_path / "out", tmp_path / "h.png"
    arguments = ["--config", str(config), "--out", str(out), "--metrics"]
    main(["difficulty", *arguments, "length,tests.cli.test_difficulty.rows", "--png", str(png)])
    shown = capsys.readouterr().out
    assert "80 difficulties computed, 0 were there" in shown
    assert "length: 40 samples, 20 levels" in shown
    assert png.stat().st_size > 1000
    index = DifficultyIndex.open(out / "length")
    assert np.diff(index.levels).tolist() == [1] * 19
    assert index.fingerprint.startswith("conversations ")
    main(["difficulty", str(out / "length")])
    assert "length: 40 samples, 20 levels" in capsys.readouterr().out


def rows(sample):
    return int(sample["input_ids"].sum()) * len(sample["input_ids"])


@pytest.fixture
def reference(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_losses_under_a_reference_model(config, reference, tmp_path, capsys):
    arguments = ["--metrics", "reference_loss", "--reference", str(reference), "--device", "cpu"]
    main(["difficulty", "--config", str(config), "--out", str(tmp_path / "out"), *arguments])
    assert "40 difficulties computed" in capsys.readouterr().out
    losses = DifficultyIndex.open(tmp_path / "out/reference_loss").values
    # Small random weights: all of 258 tokens are about as likely.
    assert losses == pytest.approx(math.log(258), abs=1)


def test_a_reference_of_other_tokens_is_refused(config, reference, tmp_path):
    tokenizer = train_tokenizer(["say y"], 257)
    tokenizer.save_pretrained(reference)
    text = config.read_text().replace(
        TOKENIZER["class_path"], "tests.cli.test_difficulty.SameTokens"
    )
    config.write_text(text)
    arguments = ["--metrics", "reference_loss", "--reference", str(reference)]
    with pytest.raises(SystemExit, match="reads other tokens than those of the data: 256, such as"):
        main(["difficulty", "--config", str(config), "--out", str(tmp_path / "out"), *arguments])


class SameTokens(ByteTokenizer):
    """The tokens of the trained one, each with the number of the next."""

    def get_vocab(self):
        known = train_tokenizer(["say y"], 257).get_vocab()
        return {token: i + 1 if i else 0 for token, i in known.items()}


def test_workers_share_the_work(config, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["difficulty", "--config", str(config), "--out", str(out), "--num_workers", "2"]
    with pytest.raises(SystemExit, match="one of several workers cannot do all"):
        main(arguments)
    for worker in "01":
        main([*arguments, "--worker_id", worker, "--step", "map"])
    main([*arguments, "--step", "reduce"])
    assert "length: 40 samples" in capsys.readouterr().out


def test_an_index_of_deepspeed_is_shown(prefix, capsys):  # noqa: F811
    main(["difficulty", str(prefix)])
    assert f"seqlen: {len(VALUES)} samples, 4 levels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["nowhere"], "is no usable difficulty index"),
        (["--config", "nowhere.yaml"], "cannot be read"),
        (["-c", "CONFIG", "--metrics", "lenght"], r"must be one of .*\. Did you mean length\?"),
        (["-c", "CONFIG", "--metrics", "math.sqrt"], r"'sqrt'\): failed on sample 0 \(TypeError"),
        (["-c", "CONFIG", "--step", "reduce"], "Run map.. of every worker to its end"),
        (
            ["-c", "CONFIG", "--metrics", "reference_loss", "--reference", "no.ckpt"],
            r"difficulty\(reference='no.ckpt'\): must be a checkpoint file",
        ),
        (["--config", "CONFIG", "--metrics", "reference_loss"], "reference_loss needs a model"),
        (
            ["--config", "CONFIG", "--metrics", "a.b,length"],
            r"or module.function. No module named",
        ),
        (["--config", "CONFIG", "--metrics", "length,length"], "two would have one name"),
        (["--config", "CONFIG", "--step", "map_reduce"], "must be one of 'all', 'map', 'reduce'"),
    ],
)
def test_mistakes_are_told(config, tmp_path, monkeypatch, arguments, rule):
    monkeypatch.chdir(tmp_path)
    given = [str(config) if word == "CONFIG" else word for word in arguments]
    with pytest.raises(SystemExit, match=rule):
        main(["difficulty", *given])
    assert not list(tmp_path.glob("outputs/difficulty/length"))


def test_without_anything_the_way_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["difficulty"])
    assert "give an index, or --config or --data" in capsys.readouterr().err
