"""The settings of a tokenizer as plain data, wherever its class keeps them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

# What transformers keeps beside the settings: where it was loaded from, templates, what is done to
# the ids afterwards, what a call may set, and what follows from the rest.
NO_SETTINGS = re.compile(
    r"name_or_path|.*_file|files_loaded|is_local|local_files_only|init_(kwargs|inputs)|backend"
    r"|.*template|chat_control_tokens|_?processor_class|model_(max_length|input_names)|verbose"
    r"|.*cache.*|.*warnings|(padding|truncation)_side|_pad_token_type_id|clean_up_.*"
    r"|_tokenizer|_special_tokens_map|tokens_trie|_should_update_post_processor"
)
DEEPEST = 8  # objects and containers inside each other


def plain_settings(tokenizer: Any) -> Any:
    """What the attributes of a tokenizer, and of the objects in them, hold: data for JSON.

    Of an object that is not written in Python only the class counts, but for SentencePiece's model.
    """
    return _attributes(tokenizer, DEEPEST)


def _attributes(owner: Any, depth: int) -> dict[str, Any]:
    return {
        name: _plain(value, depth - 1)
        for name, value in sorted(getattr(owner, "__dict__", {}).items())
        if not NO_SETTINGS.fullmatch(name)
    }


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return _hash(value)
    name = type(value).__name__
    if name == "AddedToken":  # of tokenizers, whose state holds the flags
        return str(value.__getstate__() | {"content": value.content})
    if isinstance(value, re.Pattern):
        return [name, str(value.pattern), value.flags]
    if depth == 0:
        return name
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_plain(item, depth - 1)) for item in value)
    if isinstance(value, dict):
        items = [(repr(_plain(key, depth - 1)), item) for key, item in value.items()]
        items.sort(key=lambda item: item[0])
        return [[key, _plain(item, depth - 1)] for key, item in items]
    if hasattr(value, "serialized_model_proto"):
        return _hash(value.serialized_model_proto())
    if callable(value):
        return getattr(value, "__qualname__", name)
    return [name, _attributes(value, depth) if hasattr(value, "__dict__") else None]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
