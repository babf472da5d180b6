"""Tokenizers: loaded, trained, told apart.

Transformers is imported inside the functions: it costs seconds, and most of this package does not
need it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_align._errors import argument_error
from lightning_align.data.hub import resolve_pretrained

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte and the end-of-text token


def load_tokenizer(where: str, tokenizer: Any) -> Any:
    """A transformers tokenizer from a folder, a hub name, or itself.

    Args:
        where: Class the user called.
        tokenizer: A folder, a name on the Hugging Face hub, or a transformers tokenizer.

    Raises:
        ValueError: If it cannot be loaded or has no end-of-text token.
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
    """Hash of all that decides which tokens a text becomes; equal for a copy saved and loaded."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in plain Python
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        # A call with padding or truncation leaves its settings behind; ours are made without.
        rules.update(truncation=None, padding=None)
    special = [tokenizer.eos_token_id, pad_token_id(tokenizer)]
    content = json.dumps([rules, special], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


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
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning that a text is longer than the model's context
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids
