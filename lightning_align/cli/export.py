"""From a Lightning checkpoint to a folder that transformers, vLLM and others load."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_align._errors import argument_error
from lightning_align.cli.commands import CommandParser


def export(
    ckpt: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    merge: bool = False,
    overwrite: bool = False,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint's model, tokenizer, chat template and generation config as a folder.

    The folder appears at once, when it is complete. Checkpoints are read as plain data only.

    Args:
        ckpt: Checkpoint of a PretrainModule or DPOModule, a Hugging Face folder or hub name, or the
            folder of an adapter.
        output: Folder to write.
        model: Folder or hub name of the architecture, for a checkpoint whose module was given a
            model that was built already, or of the model that an adapter belongs to.
        tokenizer: Folder or hub name of another tokenizer than the checkpoint's.
        dtype: float32, bfloat16 or float16; None keeps the data type of the checkpoint.
        merge: Whether to fold adapters into the weights, for programs that load no adapters.
        overwrite: Whether to replace a model that is in the folder.
        revision: Branch, tag or commit of a hub name.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder is in use, the checkpoint cannot be read or is of a model that is
            not Hugging Face's, or there are no adapters to merge.
    """
    folder = Path(output).expanduser().resolve()
    _check_folder(folder, str(output), overwrite, Path(ckpt))
    # transformers takes seconds to load
    from lightning_align.models.build import save_pretrained
    from lightning_align.models.trained import load_trained

    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    trained = load_trained(
        ckpt, where="export", model=model, tokenizer=tokenizer, dtype=dtype, **hub
    )
    if merge and trained.wrapper is None:
        rule = "it has no adapters that could be merged"
        raise argument_error("export", "merge", merge, rule, "Leave merge (--merge) out")
    if merge:
        trained.merge()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the rename at the end is all or nothing.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        complete = Path(temporary, "model")
        save_pretrained(trained.model, complete, trained.tokenizer)
        _put(complete, folder, Path(temporary, "old"))
    return folder


def _put(complete: Path, folder: Path, old: Path) -> None:
    """Move ``complete`` to ``folder``, and what is there to ``old``; both or neither."""
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(complete, folder)
    except BaseException:
        if old.exists():  # it would be deleted with the temporary folder around it
            os.replace(old, folder)
        raise


def _check_folder(folder: Path, output: str, overwrite: bool, ckpt: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise argument_error("export", "output", output, "must be a folder, and it is a file")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        way_out = "Give another folder, or overwrite (--overwrite)"
        raise argument_error("export", "output", output, "the folder is not empty", way_out)
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        rule = "the folder holds no model (no config.json), and will not be replaced"
        raise argument_error("export", "output", output, rule, "Give another folder")
    if ckpt.exists() and ckpt.resolve().is_relative_to(folder):
        rule = "the folder holds what is to be exported"
        raise argument_error("export", "output", output, rule, "Give another folder")


def parser() -> CommandParser:
    """Options of ``lightning-align export``."""
    about = "Write a checkpoint as a Hugging Face folder: model and tokenizer."
    parser = CommandParser("lightning-align export", about)
    parser.add_function_arguments(
        export, as_group=False, skip={"merge", "overwrite", "trust_remote_code"}
    )
    help_merge = "Fold adapters into the weights, for programs that load no adapters."
    parser.add_argument("--merge", action="store_true", help=help_merge)
    help_overwrite = "Replace a model that is in the folder."
    parser.add_argument("--overwrite", action="store_true", help=help_overwrite)
    help_trust = "Allow code that comes with the model to run."
    parser.add_argument("--trust_remote_code", action="store_true", help=help_trust)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``lightning-align export``."""
    options = parser().parse_args(list(arguments))
    folder = export(**options.as_dict())
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder} ({size / 1e6:.1f} MB)")  # noqa: T201
