"""Text from a checkpoint, a folder or a hub name, written as it is made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_align._errors import argument_error, check_least
from lightning_align.cli.commands import CommandParser

Conversation = list[dict[str, str]]  # messages: role and content


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str | Conversation,
    *,
    max_new_tokens: int = 100,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[str]:
    """Yield what follows ``prompt``, piece by piece, up to an end-of-text token.

    Where a value is None, the model's generation config decides; a temperature of 0 takes the
    likeliest token each time.

    Args:
        model: A Hugging Face model in evaluation mode.
        tokenizer: The one that the model was trained with; its chat template is for ``chat``.
        prompt: Text to go on from; with ``chat`` what the user says, or a conversation that ends
            with it.
        max_new_tokens: Tokens to generate at most.
        temperature: Above 1 more varied, below 1 more predictable, 0 without chance.
        top_p: Keep the likeliest tokens that together have this probability.
        top_k: Keep this many of the likeliest tokens.
        seed: Seed of the samples.
        chat: Whether the prompt is a message, to be put into the tokenizer's chat template.

    Raises:
        ValueError: If a number is out of its range, a chat template is missing, or more was said
            than the model reads.
    """
    check_sampling(max_new_tokens, temperature, top_p, top_k)
    import torch

    ids = _prompt_ids(tokenizer, prompt, chat)
    length = getattr(model.config, "max_position_embeddings", None)
    if length is not None and ids.shape[1] >= length:
        rule = f"{ids.shape[1]} tokens were said, and the model reads {length}"
        raise argument_error("generate", "prompt", "...", rule, "Begin anew with fewer")
    options = _sampling(temperature, top_p, top_k)
    torch.manual_seed(seed)
    yield from _generate(model, tokenizer, ids.to(model.device), max_new_tokens, options)


def check_sampling(
    max_new_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None
) -> None:
    """Refuse numbers out of their range.

    Raises:
        ValueError: If one is.
    """
    check_least("generate", 1, max_new_tokens=max_new_tokens)
    if temperature is not None and not temperature >= 0:
        raise argument_error("generate", "temperature", temperature, "must be 0 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise argument_error("generate", "top_p", top_p, "must be in (0, 1]")
    if top_k is not None:
        check_least("generate", 1, top_k=top_k)


def _prompt_ids(tokenizer: Any, prompt: str | Conversation, chat: bool) -> Any:
    import torch

    if not chat:
        ids = tokenizer(prompt)["input_ids"]
        if not ids:  # an empty prompt begins where documents begin
            ids = [tokenizer.eos_token_id if (b := tokenizer.bos_token_id) is None else b]
        return torch.tensor([ids])
    if not getattr(tokenizer, "chat_template", None):
        rule = "the tokenizer has no chat template"
        raise argument_error("generate", "chat", True, rule, "Leave --chat out to continue a text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def _sampling(temperature: float | None, top_p: float | None, top_k: int | None) -> dict[str, Any]:
    """Arguments of ``model.generate``; sampling is on as soon as one of its numbers is given."""
    if temperature == 0:
        # transformers refuses a temperature of 0, and warns of top_p and top_k without sampling.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in options.items() if value is not None}
    return {"do_sample": True, **given} if given else {}


def _generate(
    model: Any, tokenizer: Any, ids_1T: Any, max_new_tokens: int, options: dict[str, Any]
) -> Iterator[str]:
    """Run ``model.generate`` beside the reader of its text."""
    from threading import Thread

    import torch
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []
    ends = model.generation_config.eos_token_id
    pad = model.generation_config.pad_token_id

    def run() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    ids_1T,
                    attention_mask=torch.ones_like(ids_1T),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=tokenizer.eos_token_id if ends is None else ends,
                    pad_token_id=tokenizer.eos_token_id if pad is None else pad,
                    streamer=streamer,
                    **options,
                )
        except BaseException as error:
            failures.append(error)
            streamer.end()  # type: ignore[no-untyped-call]  # or the reader would wait for ever

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failures:
        raise failures[0]


def parser() -> CommandParser:
    """Options of ``lightning-align generate``."""
    parser = CommandParser("lightning-align generate", "Write text with a trained model.")
    help_ckpt = "Lightning checkpoint, Hugging Face folder (also of an adapter) or hub name."
    parser.add_argument("--ckpt", type=str, required=True, help=help_ckpt)
    help_prompt = (
        "Text to go on from; may be repeated, and - reads it from standard input. With --chat what"
        " the user says, turn by turn; left out there, each line of standard input is a turn."
    )
    parser.add_argument("--prompt", type=str, action="append", help=help_prompt)
    skip: set[str | int] = {"model", "tokenizer", "prompt", "chat"}
    parser.add_function_arguments(stream, as_group=False, skip=skip)
    help_chat = "Talk: each prompt is a message, answered in the light of what was said before."
    parser.add_argument("--chat", action="store_true", help=help_chat)
    help_system = "What the model is told before the conversation, with --chat."
    parser.add_argument("--system", type=str | None, help=help_system)
    help_model = "Folder or hub name of the architecture, if the checkpoint does not tell its own."
    parser.add_argument("--model", type=str | None, help=help_model)
    help_tokenizer = "Folder or hub name of another tokenizer than the checkpoint's."
    parser.add_argument("--tokenizer", type=str | None, help=help_tokenizer)
    help_dtype = "float32, bfloat16 or float16; left out, that of the checkpoint."
    parser.add_argument("--dtype", type=str | None, help=help_dtype)
    help_device = "cpu, cuda, mps ...; left out, an accelerator if there is one."
    parser.add_argument("--device", type=str | None, help=help_device)
    help_revision = "Branch, tag or commit of a hub name."
    parser.add_argument("--revision", type=str, default="main", help=help_revision)
    help_trust = "Allow code that comes with the model to run."
    parser.add_argument("--trust_remote_code", action="store_true", help=help_trust)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align generate``."""
    options = parser().parse_args(list(arguments)).as_dict()
    sampling = {name: options[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    check_sampling(**sampling)  # before seconds of loading
    if not options["chat"] and options["prompt"] is None:
        raise argument_error("generate", "prompt", None, "is missing", "Or talk, with --chat")
    if not options["chat"] and options["system"] is not None:
        rule = "is a message of a conversation"
        raise argument_error("generate", "system", options["system"], rule, "Say --chat, too")
    import torch

    from lightning_align.models.trained import load_trained

    names = ("model", "tokenizer", "dtype", "revision", "trust_remote_code")
    loading = {name: options[name] for name in names}
    trained = load_trained(Path(options["ckpt"]), where="generate", **loading)
    if trained.tokenizer is None:
        rule = "has no tokenizer"
        raise argument_error("generate", "ckpt", options["ckpt"], rule, "Give one with --tokenizer")
    found = torch.accelerator.current_accelerator(
        check_available=True
    )  # a CUDA build has no GPU yet
    device = options["device"] or str(found or "cpu")
    model: Any = trained.model.to(torch.device(device))  # type: ignore[arg-type]
    talk: Any = partial(stream, model, trained.tokenizer, **sampling, seed=options["seed"])
    if options["chat"]:
        converse(partial(talk, chat=True), turns(options["prompt"]), options["system"])
        return
    for prompt in turns(options["prompt"]):
        write(prompt)
        for piece in talk(prompt):
            write(piece)
        write("\n")


def turns(prompts: Sequence[str] | None) -> Iterator[str]:
    """Prompts that were given, or each line of standard input, asked for if somebody types it."""
    if prompts is not None:
        yield from (sys.stdin.read() if prompt == "-" else prompt for prompt in prompts)
        return
    asked = sys.stdin.isatty()
    while True:
        if asked:
            write("> ")
        if not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.rstrip("\n")


def converse(
    talk: Callable[[Conversation], Iterator[str]], messages: Iterable[str], system: str | None
) -> Conversation:
    """Answer message after message, each in the light of those before.

    Args:
        talk: Continues a conversation.
        messages: Of the user.
        system: What the model is told first; None says nothing.

    Returns:
        The whole conversation.
    """
    said = [] if system is None else [{"role": "system", "content": system}]
    for message in messages:
        said.append({"role": "user", "content": message})
        answer = ""
        for piece in talk(said):
            write(piece)
            answer += piece
        write("\n")
        said.append({"role": "assistant", "content": answer})
    return said


def write(text: str) -> None:
    """Write to standard output at once, also into a pipe."""
    sys.stdout.write(text)
    sys.stdout.flush()
