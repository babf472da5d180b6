"""A tokenizer as plain data, so that a checkpoint says how its text became tokens.

One that has a name is kept as the name, for its files are elsewhere already. One that we trained,
or that was passed as an object, exists nowhere else: its files are kept as text.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lightning_align.data.tokenizer import load_tokenizer

# What has a file in it is text, but for old vocabularies (SentencePiece): each of their bytes is
# kept as the character of that number.
TEXT, BYTES = "utf-8", "latin-1"


def pack_tokenizer(tokenizer: Any, name: str | None) -> dict[str, Any]:
    """Plain data that ``unpack_tokenizer`` makes an equal tokenizer of.

    Args:
        tokenizer: A transformers tokenizer.
        name: Folder or hub name that it was loaded from, if any.

    Returns:
        An empty dict for a tokenizer that cannot be saved.
    """
    if name is not None:
        # A datamodule may have put another template in place of the tokenizer's own.
        return {"name": name, "chat_template": getattr(tokenizer, "chat_template", None)}
    if not hasattr(tokenizer, "save_pretrained"):
        return {}
    files: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
            content = path.read_bytes()
            try:
                files[path.name] = {TEXT: content.decode(TEXT)}
            except UnicodeDecodeError:
                files[path.name] = {BYTES: content.decode(BYTES)}
    return {"files": files}


def unpack_tokenizer(state: dict[str, Any], *, where: str) -> Any:
    """The tokenizer of ``pack_tokenizer``.

    Args:
        state: What ``pack_tokenizer`` returned.
        where: Function the user called, for error messages.
    """
    if "name" in state:
        tokenizer = load_tokenizer(where, state["name"])
        if state["chat_template"] is not None:
            tokenizer.chat_template = state["chat_template"]
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        for name, content in state["files"].items():
            # The bare name: a crafted checkpoint must not write elsewhere.
            for encoding, text in content.items():
                Path(folder, Path(name).name).write_bytes(text.encode(encoding))
        return load_tokenizer(where, folder)
