"""Text from a model: the command streams it, stops at the end, and repeats it for a seed."""

import io
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_align import DPOModule, PretrainModule
from lightning_align.__main__ import main
from lightning_align.cli.generate import stream, turns
from lightning_align.data.tokenizer import train_tokenizer
from lightning_align.offload import linked
from tests.helpers.checkpoints import save_checkpoint

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 9
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    trained = train_tokenizer([TEXT], 300)
    trained.chat_template = TEMPLATE
    return trained


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.2, eos_token_id=0, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folder(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def text(model: Any, tokenizer: Any, prompt: Any = "It is", **options: Any) -> str:
    return "".join(stream(model, tokenizer, prompt, **{"max_new_tokens": 24, **options}))


def test_greedy_text_is_that_of_the_model(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer("It is")["input_ids"]])
    with torch.no_grad():
        for _ in range(24):  # the plain loop, without a cache
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    theirs = tokenizer.decode(ids[0, len(tokenizer("It is")["input_ids"]) :])
    assert text(model, tokenizer) == text(model, tokenizer, temperature=0) == theirs


def test_a_seed_repeats_and_another_differs(model: Any, tokenizer: Any) -> None:
    first, again, other = (text(model, tokenizer, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != text(model, tokenizer)


def test_each_number_of_the_sampling_has_an_effect(model: Any, tokenizer: Any) -> None:
    """With one token left to choose from, chance has no say."""
    greedy = text(model, tokenizer)
    assert text(model, tokenizer, top_k=1) == greedy
    assert text(model, tokenizer, top_p=1e-6) == greedy
    assert text(model, tokenizer, temperature=1e-4) == greedy


def test_stops_at_the_end_of_text(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(text(model, tokenizer))["input_ids"]
    end = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = ids[3]
        assert len(text(model, tokenizer)) < len(tokenizer.decode(ids))
    finally:
        model.generation_config.eos_token_id = end


def test_chat_puts_the_prompt_into_the_template(model: Any, tokenizer: Any) -> None:
    assert text(model, tokenizer, "hello", chat=True) == text(
        model, tokenizer, "<user>hello<assistant>"
    )


def test_an_empty_prompt_begins_a_document(model: Any, tokenizer: Any) -> None:
    assert text(model, tokenizer, "") == text(model, tokenizer, tokenizer.eos_token)


def test_a_failure_in_the_middle_reaches_the_reader(model: Any, tokenizer: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no more memory")

    pieces = stream(model, tokenizer, "It is")
    original, model.forward = model.forward, broken
    try:
        with pytest.raises(RuntimeError, match="no more memory"):
            list(pieces)
    finally:
        model.forward = original


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"generate\(max_new_tokens=0\): must be at least 1"),
        ({"temperature": -1.0}, r"generate\(temperature=-1.0\): must be 0 or more"),
        ({"temperature": float("nan")}, r"generate\(temperature=nan\): must be 0 or more"),
        ({"top_p": 1.5}, r"generate\(top_p=1.5\): must be in \(0, 1\]"),
        ({"top_k": 0}, r"generate\(top_k=0\): must be at least 1"),
    ],
)
def test_refuses(model: Any, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text(model, tokenizer, **options)


def test_chat_needs_a_template(model: Any) -> None:
    with pytest.raises(ValueError, match=r"generate\(chat=True\): the tokenizer has no chat temp"):
        text(model, train_tokenizer([TEXT], 300), chat=True)


def test_more_than_the_model_reads_is_refused(model: Any, tokenizer: Any) -> None:
    long = [{"role": "user", "content": "truth " * 300}]
    with pytest.raises(ValueError, match=r"tokens were said, and the model reads 256\. Begin anew"):
        text(model, tokenizer, long, chat=True)


# As a command


def test_several_prompts_and_standard_input(
    folder: str, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a truth"))
    prompts = ["--prompt", "It is", "--prompt", "-"]
    main(["generate", "--ckpt", folder, *prompts, "--max_new_tokens=24", "--device=cpu"])
    expected = [f"{p}{text(model, tokenizer, p)}\n" for p in ("It is", "a truth")]
    assert capsys.readouterr().out == "".join(expected)


def test_a_conversation_is_answered_in_the_light_of_what_was_said(
    folder: str, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Turn by turn, from arguments as from standard input; an empty line is nobody's turn."""
    answer = partial(text, model, tokenizer, max_new_tokens=9)
    first = answer("<system>brief<user>hello<assistant>")
    second = answer(f"<system>brief<user>hello<assistant>{first}<user>why?<assistant>")
    assert second != answer("<system>brief<user>why?<assistant>")
    command = ["generate", "--ckpt", folder, "--chat", "--system=brief", "--max_new_tokens=9"]
    main([*command, "--device=cpu", "--prompt=hello", "--prompt=why?"])
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nwhy?"))
    main([*command, "--device=cpu"])
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_who_types_is_asked(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    typed = io.StringIO("hello\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    assert list(turns(None)) == ["hello"]
    assert capsys.readouterr().out == "> > "


def test_a_checkpoint_generates(
    tmp_path: Path, folder: str, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", PretrainModule(folder))
    options = ["--chat", "--max_new_tokens=24", "--temperature=0.9", "--seed=3", "--device=cpu"]
    main(["generate", f"--ckpt={checkpoint}", "--prompt=hello", *options])
    ours = text(model, tokenizer, "hello", chat=True, temperature=0.9, seed=3)
    assert capsys.readouterr().out == f"{ours}\n"


@pytest.mark.slow  # `make test-laws` runs it
def test_the_folder_of_an_adapter_generates(
    tmp_path: Path, folder: str, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its model writes with it, which is another text than without."""
    pytest.importorskip("peft")
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}
    module = DPOModule(folder, peft_config=lora)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    options = ["--max_new_tokens=24", "--device=cpu"]
    module.save_pretrained(str(tmp_path / "bare"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    module.save_pretrained(str(tmp_path / "adapter"))
    expected = f"It is{text(module.model.eval(), tokenizer)}\n"
    for place in (["--ckpt", "adapter"], ["--ckpt", "bare", "--tokenizer", folder]):
        place[1] = str(tmp_path / place[1])
        main(["generate", *place, "--prompt=It is", *options])
        assert capsys.readouterr().out == expected
    main(["generate", "--ckpt", folder, "--prompt=It is", *options])
    assert capsys.readouterr().out != expected


@pytest.mark.slow  # `make test-laws` runs it
def test_a_checkpoint_of_links_generates(
    tmp_path: Path, folder: str, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of blocks as `zero_infinity` trained them, here at a learning rate of zero."""
    trainer = pl.Trainer(
        strategy="zero_infinity",
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    ids = torch.ones(1, 9, dtype=torch.long)
    batches = DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    optimizer = partial(torch.optim.AdamW, lr=0.0)
    trainer.fit(PretrainModule(folder, optimizer=optimizer), batches)
    checkpoint = Path(trainer.checkpoint_callback.best_model_path)
    assert linked.is_linked(checkpoint)
    capsys.readouterr()
    options = ["--prompt=It is", "--max_new_tokens=24", "--device=cpu"]
    main(["generate", f"--ckpt={checkpoint}", f"--tokenizer={folder}", *options])
    assert capsys.readouterr().out == f"It is{text(model, tokenizer)}\n"


def test_mistakes_end_in_a_line(tmp_path: Path, folder: str) -> None:
    module = PretrainModule(AutoModelForCausalLM.from_pretrained(folder))
    checkpoint = save_checkpoint(tmp_path / "a.ckpt", module)
    for options, message in [
        (["--top_p=2"], "lightning-align: generate(top_p=2.0): must be in (0, 1]."),
        ([], "Give its name or folder as model (--model)."),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", f"--ckpt={checkpoint}", "--prompt=a", *options])
        assert message in str(stopped.value)


def test_what_is_missing_is_told_before_a_model_is_loaded() -> None:
    for options, message in [
        ([], "generate(prompt=None): is missing. Or talk, with --chat."),
        (["--prompt=a", "--system=b"], "is a message of a conversation. Say --chat, too."),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", "--ckpt=no-such-folder", *options])
        assert message in str(stopped.value)


def test_a_model_without_tokenizer_asks_for_one(tmp_path: Path, model: Any, folder: str) -> None:
    model.save_pretrained(tmp_path / "bare")
    command = ["generate", f"--ckpt={tmp_path / 'bare'}", "--prompt=a", "--max_new_tokens=1"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert "has no tokenizer. Give one with --tokenizer." in str(stopped.value)
    main([*command, f"--tokenizer={folder}"])


def test_a_cuda_build_without_a_gpu_generates_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Of such a build torch names the accelerator that it was built for, unless asked further."""

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    main(["generate", f"--ckpt={folder}", "--prompt=a", "--max_new_tokens=1"])


@pytest.mark.slow  # `make test-laws` runs it
def test_text_is_written_while_it_is_made(folder: str) -> None:
    """A reader of the pipe has the first words long before the program ends."""
    command = [sys.executable, "-m", "lightning_align", "generate", "--ckpt", folder]
    options = ["--prompt", "It is", "--max_new_tokens", "80", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The model is too fast to tell: slow it down from outside, a little at every step.
    slow = (
        "import sys, time, runpy, transformers.generation.streamers as s\n"
        "put = s.TextIteratorStreamer.put\n"
        "def slowly(self, value): time.sleep(0.02); put(self, value)\n"
        "s.TextIteratorStreamer.put = slowly\n"
        f"sys.argv = {['lightning-align', *command[3:], *options]!r}\n"
        "runpy.run_module('lightning_align', run_name='__main__', alter_sys=False)\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, env=environment
    )
    assert program.stdout is not None
    arrivals = []
    while chunk := os.read(program.stdout.fileno(), 4096):
        arrivals.append((time.monotonic(), chunk))
    assert program.wait() == 0
    assert len(arrivals) > 5
    assert arrivals[-1][0] - arrivals[0][0] > 1.0, "eighty steps of 0.02 s lie between"
