"""Tokenizers: loaded, trained, told apart.

Transformers is imported inside the functions: it costs seconds, and most of this package does not
need it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning_align._errors import argument_error
from lightning_align.data.chat_template import read_chat_template
from lightning_align.data.hub import resolve_pretrained
from lightning_align.data.tokenizer_settings import plain_settings

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte and the end-of-text token

# What tokenizers treat differently: case, accents (composed and not), digits, white space,
# punctuation, scripts without spaces, compatibility forms, control characters, text like tokens.
PROBES = (
    "The QUICK brown fox's naïve café can't.",
    "nai\u0308ve e\u0301cole NAI\u0308VE E\u0301COLE ΟΔΟΣ Straße İstanbul",
    "1234567 3.14 1,000 x2 2nd",
    "  two  spaces,\ta tab\nand\r\n\n lines ",
    "<s>[INST] <|user|></s> don't--stop... «quote» https://a.b/c?d=e_f",
    "漢字とカタカナ 한국어 ไทย العربية 👩‍👩‍👧 \ufb01 ² \uff46\uff55ll",
    "zero\u200bwidth nb\xa0space soft\xadhyphen \x01 \ufffd",
)


def load_tokenizer(where: str, tokenizer: Any, chat_template: str | Path | None = None) -> Any:
    """A transformers tokenizer from a folder, a hub name, or itself.

    Args:
        where: Class the user called.
        tokenizer: A folder, a name on the Hugging Face hub, or a transformers tokenizer.
        chat_template: Jinja text or .jinja file that takes the place of the tokenizer's own, so
            that it is saved with it; a tokenizer that the user passed stays as it is.

    Raises:
        ValueError: If it cannot be loaded or has no end-of-text token, or the template cannot be
            read.
    """
    name = tokenizer
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _from_pretrained(where, str(tokenizer))
    elif not hasattr(tokenizer, "eos_token_id"):
        rule = "must be a folder, a hub name or a transformers tokenizer"
        raise argument_error(where, "tokenizer", type(tokenizer).__name__, rule)
    else:
        name = type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        rule = "has no end-of-text token, and documents are closed by one"
        way_out = "Set its eos_token, for instance tokenizer.eos_token = '</s>', and save it"
        raise argument_error(where, "tokenizer", name, rule, way_out)
    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = read_chat_template(where, chat_template)
    return tokenizer


def _from_pretrained(where: str, name: str) -> Any:
    resolve_pretrained(where, "tokenizer", name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        rule = f"transformers cannot load a tokenizer from it ({error})"
        raise argument_error(where, "tokenizer", name, rule) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of at most ``vocab_size`` tokens; the same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All bytes, seen or not: no text is out of vocabulary.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return trained_tokenizer(backend.to_str())


def trained_tokenizer(rules: str) -> Any:
    """A tokenizer that we trained, from its ``backend_tokenizer.to_str()``."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    wrap: Any = PreTrainedTokenizerFast  # its constructor is not annotated
    return wrap(
        tokenizer_object=Tokenizer.from_str(rules), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of all that decides which tokens a text becomes; equal for a copy saved and loaded.

    Rules, every setting that transformers or a tokenizer in plain Python keeps, and, since the
    settings of a class are what its author made them, the tokens of a probe. A chat template is no
    part of it: it decides which text a conversation becomes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in plain Python
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        # A call with padding or truncation leaves its settings behind; ours are made without.
        rules.update(truncation=None, padding=None)
    special = [tokenizer.eos_token_id, pad_token_id(tokenizer)]
    settings = [type(tokenizer).__name__, plain_settings(tokenizer)]
    content = json.dumps([rules, special, settings, _probe(tokenizer)], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _probe(tokenizer: Any) -> list[Any]:
    tokens: list[Any] = []
    for text in [*PROBES, *map(str, getattr(tokenizer, "all_special_tokens", ()))]:
        try:
            tokens += [*encode(tokenizer, [text]), "next"]
        except Exception as error:  # noqa: PERF203  # not every tokenizer takes every text
            tokens.append(type(error).__name__)
    return tokens


def pad_token_id(tokenizer: Any) -> int:
    """What fills up a batch: the tokenizer's own token, or else its end-of-text token."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def encode(
    tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """The tokens of each text, of any length."""
    if not texts:
        return []
    ids_only = {"return_attention_mask": False, "return_token_type_ids": False}
    ids_only["verbose"] = False  # no warning that a text is longer than the model's context
    encoded = tokenizer(texts, add_special_tokens=add_special_tokens, **ids_only)
    return list(encoded["input_ids"])


def with_whole_offsets(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that counts the space before a word to its token's characters.

    GPT-NeoX's leaves such spaces to no token. Then transformers, which looks for the token of the
    first and the last character under ``{% generation %}``, drops an answer that begins with a
    space and all that follow, and learns to the end of the conversation if it ends with one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not any(getattr(part, "trim_offsets", False) for part in _post_processors(backend)):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    for part in _post_processors(tokenizer.backend_tokenizer):
        if hasattr(part, "trim_offsets"):
            part.trim_offsets = False  # the tokens stay the same
    return tokenizer


def _post_processors(backend: Any) -> list[Any]:
    from tokenizers.processors import Sequence

    last = getattr(backend, "post_processor", None)
    parts: Any = last  # its items are not annotated
    return list(parts) if isinstance(last, Sequence) else [last]


class Encoded(NamedTuple):
    """The tokens of a text, and the characters of it that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # first character, and the one after the last


def encode_with_offsets(tokenizer: Any, texts: list[str]) -> list[Encoded]:
    """The tokens of each text, of any length, and their places; fast tokenizers only."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(map(Encoded, encoded["input_ids"], encoded["offset_mapping"]))


def encode_prompts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of the beginnings of texts: first the token that the tokenizer begins a text with."""
    begin = [tokenizer.bos_token_id]
    if encode(tokenizer, [""], add_special_tokens=True)[0][:1] != begin:
        begin = []  # this tokenizer does not begin a text with a token of its own
    return [begin + ids for ids in encode(tokenizer, texts)]


def encode_completions(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that go on after a prompt, so that no token reaches back into it.

    Llama 2's tokenizer and its kin put a space before every text: tokenised on its own, " yes"
    would come to stand two spaces behind a prompt, and "yes" one. In mid-text they put none, so
    such texts are tokenised behind a line break, which no other token reaches into.
    """
    line_break = encode(tokenizer, ["\n"])[0]
    alone = encode(tokenizer, texts)
    if len(line_break) == 1:  # nothing is put before a text
        return alone
    behind = encode(tokenizer, ["\n" + text for text in texts])
    start = len(line_break)
    return [
        ids[start:] if ids[:start] == line_break else as_is
        for ids, as_is in zip(behind, alone, strict=True)
    ]
